"""A processor's output with fewer image tokens: what `forward` and `generate` take in its place."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from squeezevit.errors import ConfigError
from squeezevit.vlm import host
from squeezevit.vlm.groups import Budget, Groups, even, group, join, redundancy
from squeezevit.vlm.host import HOOK, Image, Seen
from squeezevit.vlm.question import Asked
from squeezevit.vlm.tower import Watch

NAMED = ("even", "redundancy", "tower", "question")
Scores = Literal["even", "redundancy", "tower", "question"] | Callable[[Tensor, Image], Tensor]
Places = Literal["compact", "original"]


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """What became of one image, tile or video of a prompt. Of its N features from the encoder, K are left."""

    modality: str  # "image" or "video"
    row: int  # of the batch
    places: Tensor  # [N] int64, where the N stood in the row's original tokens
    kept: Tensor  # [K] int64, which of them are left, ascending
    groups: Tensor  # [N] int64, for each the left one it ended in, 0 to K - 1; -1 where it was dropped
    scores: Tensor  # [N] float32, by which they were chosen
    separators: Tensor  # [N] bool, marks of a line's end or of a view's, which always stay
    columns: int | None  # how many of those that are no separators a line of the image has; None where nothing tells

    @property
    def sizes(self) -> Tensor:
        """How many of the N each left token stands for: [K] int64. The dropped count nowhere."""
        return torch.bincount(self.groups[self.groups >= 0], minlength=len(self.kept))

    def members(self, token: int) -> Tensor:
        """Which of the N the left token of that number stands for: [size] int64."""
        return (self.groups == token).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Prompt(Mapping[str, Any]):
    """A squeezed prompt, a mapping for `model(**prompt)` and `model.generate(**prompt)`, with the account of what was done.

    It may be used any number of times: the model gets copies of what it writes into. T' below is the longest reduced row.
    """

    inputs: Mapping[str, Any]  # input_ids [B, T'], attention_mask, ..., and the encoder's output
    ids: Tensor  # [B, T], the original tokens
    kept: Tensor  # [B, T] bool, which of them, padding in front and behind apart, are in the reduced prompt
    images: tuple[ImageTokens, ...]  # images first, then videos, each in the order of the prompt

    def __getitem__(self, name: str) -> Any:
        value = self.inputs[name]
        return {modality: host.copy_of(out) for modality, out in value.items()} if name == HOOK else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        before, after = (sum(len(getattr(i, name)) for i in self.images) for name in ("groups", "kept"))
        shape, new = list(self.ids.shape), list(self["input_ids"].shape)
        return f"Prompt({len(self.images)} images, {before} -> {after} image tokens, input_ids {shape} -> {new})"


def squeeze_prompt(
    model: nn.Module,
    inputs: Mapping[str, Any],
    keep: float | None = None,
    *,
    tokens: int | None = None,
    fuse: bool = True,
    scores: Scores = "even",
    places: Places = "original",
) -> Prompt:
    """A processor's output with fewer image tokens, as `model(**prompt)` and `model.generate(**prompt)` take it.

    The model's own encoder and projector run here, once. Of each image's N projected tokens the K of highest score stay, and each
    other one is squeezed into the one of them most like it (eq. 4, Wei et al. 2023). The same places leave all that has an entry
    for each token (input_ids and labels [B, T], masks, token types). Features for deeper layers are squeezed by the same groups,
    and videos as images are. A tile that the encoder counts as an image is one here.

    model: a vision-language model of transformers that takes `mm_encoder_outputs`. inputs: input_ids [B, T] and whatever else its
    processor returned; what is not known here is passed on as it is.
    keep: the share of each image's tokens that stay, K = ceil(keep * N), half of them unless told. tokens: their number instead.
    fuse: False drops the others, for comparison.
    scores: "even", evenly over the image, whatever it shows; "redundancy", how little of a token others already say; "tower", the
    attention of the vision tower's last block, of its class token or received from all patches, for towers that SqueezeViT knows;
    "question", the attention that the words behind an image give it in an early layer of the language model, whose layers up to
    that one run on the whole prompt for it; or a function (features [N, C], `Image`) -> [N].
    places: of models that count positions one by one, "original" as in the whole prompt, "compact" as the host counts the shorter
    one. Models with positions in time, height and width always have those of the whole prompt, and what they keep for the tokens to
    come (`rope_deltas`) is set as their own forward would set it.

    Separators (LLaVA-NeXT's image_newline) always stay, and count neither in N nor in K. Gradients reach projector and tower.
    Raises ConfigError on budgets and prompts that cannot be meant, UnsupportedError where the model does not take features, and
    DataError where features and places differ in number.

    >>> prompt = squeeze_prompt(model, processor(images=photo, text=text, return_tensors="pt"), keep=0.5)  # doctest: +SKIP
    >>> model.generate(**prompt)[:, prompt["input_ids"].shape[1] :]  # doctest: +SKIP
    """
    budget = Budget(0.5 if keep is None and tokens is None else keep, tokens)
    check_choices(scores, places)
    if isinstance(inputs, Prompt):
        raise ConfigError(f"{inputs!r} is squeezed already; give what the processor returned")
    base, ids = host.base_of(model), host.require_plain(inputs)
    arguments = host.shown(base, inputs)
    if not arguments:
        raise ConfigError(
            f"there is no image in the prompt: it has {', '.join(inputs)}; give what the processor returned for text and images, "
            "or call the model itself"
        )
    mask = torch.ones_like(ids) if inputs.get("attention_mask") is None else inputs["attention_mask"]
    rule = host.positions(base, {**inputs, "attention_mask": mask})
    seen, watched = _encoded(model, base, arguments, ids, scores)
    across = None if rule is None else rule[0][-1]
    parts = [_parts(base, one, across) for one in seen]
    if scores == "question":
        places_of = {} if rule is None else {"position_ids": rule[0]}
        whole = {**places_of, **inputs, "attention_mask": mask}
        rated = _asked(Asked(model, base, whole, {one.modality: host.copy_of(one.output) for one in seen}), seen)
    else:
        rated = [_scored(those, scores, watch) for those, watch in zip(parts, watched, strict=True)]
    stays, new, images = torch.ones_like(ids, dtype=torch.bool), {}, list[ImageTokens]()
    for one, those, given in zip(seen, parts, rated, strict=True):
        groups, told = _squeezed(one, those, given, budget, fuse)
        new[one.modality] = host.with_features(one.output, [g.apply(x) for g, x in zip(groups, one.features, strict=True)], groups)
        left = [torch.zeros(g.n, dtype=torch.bool, device=ids.device).scatter(0, g.kept, True) for g in groups]
        stays = stays.masked_scatter(one.placeholders, torch.cat(left))
        images += told
    own = inputs.get("position_ids")
    positions, later = (own, None) if own is not None else _positions(rule, mask, stays, places)
    if later is not None:
        base.rope_deltas = later
    return _cut(model, base, inputs, mask, positions, stays, new, tuple(images))


def check_choices(scores: object, places: object) -> None:
    """Raises ConfigError on scores and places that there are not."""
    if not callable(scores) and scores not in NAMED:
        known = ", ".join(map(repr, NAMED))
        raise ConfigError(f"scores={scores!r} is unknown; give one of {known} or a function (features [N, C], image) -> [N]")
    if places not in ("compact", "original"):
        raise ConfigError(f"places={places!r} is unknown; give 'compact' or 'original'")


def _encoded(
    model: nn.Module, base: Any, arguments: Mapping[str, Mapping[str, Any]], ids: Tensor, scores: Scores
) -> tuple[list[Seen], list[Watch | None]]:
    """What the encoders see in the images and in the videos, and what was watched of their towers."""
    first = 0
    found: list[Seen] = []
    watched: list[Watch | None] = []
    for modality, given in arguments.items():
        with Watch(base) if scores == "tower" else nullcontext() as watch:
            output = host.encode(base, modality, given)
        found.append(host.placed(getattr(model, "config", None), modality, output, ids, len(arguments) == 1, first))
        watched.append(watch)
        first += sum(map(len, found[-1].images))
    return found, watched


def _asked(asked: Asked, seen: list[Seen]) -> list[list[Tensor]]:
    """A score for each feature of each image, by what the words look at: [N] float32."""
    placeholders = torch.stack([one.placeholders for one in seen]).any(dim=0)
    images = [[image for images in one.images for image in images] for one in seen]
    rated = iter(asked.scores(placeholders, [image for those in images for image in those]))
    return [[next(rated) for _ in those] for those in images]


class Part(NamedTuple):
    """The features of one image, also where the encoder put several images into one."""

    x: Tensor  # [N, C]
    image: Image
    marks: Tensor  # [N] bool, separators
    columns: int | None


@torch.no_grad()
def _parts(base: Any, seen: Seen, across: Tensor | None) -> list[Part]:
    """across: the prompt's positions in width, [B, T], where the host has such."""
    found: list[Part] = []
    for x, images in zip(seen.features, seen.images, strict=True):
        pieces = x.split([len(image.places) for image in images]) if images else ()
        for piece, image in zip(pieces, images, strict=True):
            marks = host.separators(base, piece)
            found.append(Part(piece, image, marks, host.columns(image, marks, across)))
    return found


@torch.no_grad()
def _scored(parts: list[Part], scores: Scores, watch: Watch | None) -> list[Tensor]:
    """A score for each feature of each image: [N] float32."""
    if watch is not None:
        return watch.scores([len(part.x) for part in parts])
    if scores == "even":
        return [even(part.x, part.marks, part.columns) for part in parts]
    if not callable(scores):
        return [redundancy(part.x) for part in parts]
    return [_checked(scores(part.x, part.image), part.x, part.image) for part in parts]


def _checked(scores: Any, x: Tensor, image: Image) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != x.shape[:1] or scores.isnan().any():
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        nan = ", NaN among them" if isinstance(scores, Tensor) and scores.isnan().any() else ""
        raise ConfigError(
            f"the score function returned {found}{nan} for {image.modality} {image.number}; return one number for each of its "
            f"{len(x)} features, [{len(x)}]"
        )
    return scores.float()


def _squeezed(
    seen: Seen, parts: list[Part], scores: list[Tensor], budget: Budget, fuse: bool
) -> tuple[list[Groups], list[ImageTokens]]:
    """Groups of each of the encoder's features, and what became of each image."""
    made, told = [], []
    for (x, image, marks, columns), score in zip(parts, scores, strict=True):
        made.append(g := group(x, budget.count(int((~marks).sum())), score, marks, fuse))
        told.append(ImageTokens(image.modality, image.row, image.places, g.kept, g.destinations, score, marks, columns))
    left = iter(made)
    return [join([next(left) for _ in images]) for images in seen.images], told


def _cut(
    model: Any,
    base: Any,
    inputs: Mapping[str, Any],
    mask: Tensor,
    positions: Tensor | None,
    stays: Tensor,
    encoded: dict[str, Any],
    images: tuple[ImageTokens, ...],
) -> Prompt:
    """The prompt without the places that do not stay, padded where it was padded, on the left where it was not."""
    ids = inputs["input_ids"]
    rest = {name: value for name, value in inputs.items() if name not in host.encoder_names(base)}
    whole = bool(stays.all())
    frame = Frame.of(mask, stays)
    fills = {"input_ids": _padding(model), "labels": -100}
    out = {
        name: frame.cut(value, fills.get(name, 0))
        if isinstance(value, Tensor) and value.shape == ids.shape and not whole
        else value
        for name, value in rest.items()
        if name != "position_ids"
    }
    if not whole and inputs.get("attention_mask") is None and frame.pads:
        out["attention_mask"] = frame.cut(mask, 0)
    if positions is not None:
        out["position_ids"] = positions if whole else frame.cut(positions, 0)
    return Prompt({**out, HOOK: encoded}, ids, stays & _inside(mask), images)


def _positions(
    rule: tuple[Tensor, Tensor] | None, mask: Tensor, stays: Tensor, places: Places
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the whole prompt, [B, T] or [3, B, T], and the host's `rope_deltas` [B, 1], each where the host must be told.

    rule: both by the host's own rule, where it has one.
    """
    attended = mask.long()
    if rule is not None:
        grid, later = rule
        return grid, later + (attended * ~stays).sum(dim=1, keepdim=True).to(later)
    told = places == "original" and not bool(stays.all())
    return ((attended.cumsum(dim=1) - 1).clamp(min=0) if told else None), None


def _padding(model: Any) -> int:
    """The token that pads, where the text model or its generation names one."""
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    named = (getattr(config, "pad_token_id", None) for config in configs)
    return next((token for token in named if isinstance(token, int)), 0)


def _inside(mask: Tensor) -> Tensor:
    """All but the padding in front and behind: [B, T] bool."""
    attended = mask.bool()
    return (attended.cumsum(dim=1) > 0) & (attended.flip(1).cumsum(dim=1).flip(1) > 0)


@dataclass(frozen=True)
class Frame:
    """Where the tokens that stay go: the source of each of T' places in each row."""

    source: Tensor  # [B, T'] int64
    filled: Tensor  # [B, T'] bool, False where there is padding

    @classmethod
    def of(cls, mask: Tensor, stays: Tensor) -> "Frame":
        inside = _inside(mask)
        left = stays & inside
        counts = left.sum(dim=1, keepdim=True)
        longest = int(counts.max())
        order = left.long().argsort(dim=1, descending=True, stable=True)[:, :longest]  # those that stay in their order, then others
        filled = torch.arange(longest, device=mask.device) < counts
        if not (inside[:, 0] & ~inside[:, -1]).any():  # padded on the left, or not at all
            order, filled = (_turned(x, longest - counts) for x in (order, filled))
        return cls(order, filled)

    @property
    def pads(self) -> bool:
        return not bool(self.filled.all())

    def cut(self, x: Tensor, fill: int) -> Tensor:
        """[..., B, T] -> [..., B, T']."""
        index = self.source.expand(*x.shape[:-2], *self.source.shape)
        return x.gather(-1, index).masked_fill(~self.filled, fill)


def _turned(x: Tensor, by: Tensor) -> Tensor:
    """Each row moved to the right by its number, round the end: [B, T'], [B, 1] -> [B, T']."""
    index = (torch.arange(x.shape[1], device=x.device) - by) % x.shape[1]
    return x.gather(1, index)
