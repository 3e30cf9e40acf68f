"""What is asked of a vision-language model of transformers: by signatures and by its own rules, never by its class."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from squeezevit.errors import ConfigError, DataError, UnsupportedError

MODALITIES = ("image", "video")
HOOK = "mm_encoder_outputs"


class Image(NamedTuple):
    """Where one image, tile or video of a prompt is, for a score function."""

    number: int  # among all that the prompt shows, images first
    modality: str  # "image" or "video"
    row: int  # of the batch
    places: Tensor  # [N], of its features in the row
    ids: Tensor  # [T], the row's tokens, unreduced


@dataclass(frozen=True, eq=False)
class Seen:
    """What the encoder made of the images or of the videos of a batch."""

    modality: str
    output: Any  # as the model's own forward takes it
    features: list[Tensor]  # [N, C] each, as the encoder put them out
    images: list[list[Image]]  # of each of these: one, or several where the encoder put several images into one
    placeholders: Tensor  # [B, T] bool, the prompt's tokens that stand for them


def base_of(model: nn.Module) -> Any:
    """What encodes images and runs the language model. Raises UnsupportedError where that cannot be handed features."""
    adapted: Any = model
    inside: Any = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted  # of peft
    base = getattr(inside, "base_model", inside)
    if not any(hasattr(base, f"get_{modality}_features") for modality in MODALITIES):
        raise UnsupportedError(
            f"{type(model).__name__} has neither get_image_features nor get_video_features: it sees no images; give a "
            "vision-language model of transformers, as LlavaForConditionalGeneration"
        )
    takes = inspect.signature(inside.forward).parameters
    if HOOK not in takes:
        raise UnsupportedError(
            f"the forward of {type(inside).__name__} takes no {HOOK} (transformers {version('transformers')}), so it cannot be "
            "given fewer image tokens; use transformers 5.18 or later, and the model without wrappers around it"
        )
    if asks := [n for n, p in takes.items() if n.startswith("pixel_values") and p.default is p.empty]:
        raise UnsupportedError(
            f"the forward of {type(inside).__name__} asks for {', '.join(asks)} even where images are encoded already, so it "
            "cannot be given fewer image tokens; leave this model unreduced"
        )
    return base


def require_plain(inputs: Mapping[str, Any]) -> Tensor:
    """The tokens [B, T] of a processor's output. Raises ConfigError where it is something else."""
    if inputs.get(HOOK) is not None:
        both = sorted(name for name in inputs if name.startswith("pixel_values") and inputs[name] is not None)
        case = f"both {', '.join(both)} and {HOOK}" if both else f"{HOOK}, which is encoded or squeezed already,"
        raise ConfigError(f"the prompt has {case}; give what the processor returned, once")
    if inputs.get("inputs_embeds") is not None:
        raise ConfigError("the prompt has inputs_embeds, where image tokens cannot be told from text; give input_ids")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        found = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ConfigError(f"input_ids is {found}; give [B, T], as the processor does with return_tensors='pt'")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ConfigError(f"attention_mask is {list(mask.shape)} and input_ids {list(ids.shape)}; give a mask of the same shape")
    return ids


def shown(base: Any, inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each encoder takes of the inputs, for the modalities whose pixels are there."""
    found = {}
    for modality in MODALITIES:
        if (encode := getattr(base, f"get_{modality}_features", None)) is not None:
            names = [name for name in inspect.signature(encode).parameters if name not in ("self", "kwargs")]
            if names and inputs.get(names[0]) is not None:
                found[modality] = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return found


def encoder_names(base: Any) -> set[str]:
    """All that the encoders take, which the language model does not."""
    encoders = [getattr(base, f"get_{modality}_features", None) for modality in MODALITIES]
    return {name for encode in encoders if encode is not None for name in inspect.signature(encode).parameters}


def encode(base: Any, modality: str, arguments: Mapping[str, Any]) -> Any:
    return getattr(base, f"get_{modality}_features")(**arguments, return_dict=True)


def placed(config: Any, modality: str, output: Any, ids: Tensor, alone: bool, first: int) -> Seen:
    """The features of an encoder with the places in the prompt that wait for them.

    alone: whether the prompt shows nothing of the other modality. first: the number of the first of these images. Raises DataError
    where there are more or fewer places than features.
    """
    pooled = output.pooler_output
    features = [pooled] if isinstance(pooled, Tensor) and pooled.dim() == 2 else list(pooled)
    waiting = _placeholders(config, modality, ids, alone)
    count = sum(map(len, features))
    if int(waiting.sum()) != count:
        raise DataError(
            f"the encoder made {count} {modality} features, but the prompt has {int(waiting.sum())} places for them (token "
            f"{_token(config, modality)}); give the text and the pixels of one call of the processor, not truncated"
        )
    rows, places = waiting.nonzero(as_tuple=True)
    images, numbers = [], iter(range(first, first + count))
    cuts = _cuts(rows, places, _encoded(output))
    start = 0
    for x in features:
        parts = _between(start, start + len(x), cuts)
        images.append([Image(next(numbers), modality, int(rows[a]), places[a:b], ids[int(rows[a])]) for a, b in parts])
        start += len(x)
    return Seen(modality, output, features, images, waiting)


def _token(config: Any, modality: str) -> int:
    """The token that waits for features of this modality; -1 where there is none."""
    return getattr(config, f"{modality}_token_id", getattr(config, f"{modality}_token_index", -1))


def _placeholders(config: Any, modality: str, ids: Tensor, alone: bool) -> Tensor:
    """Where the prompt waits for features; some hosts mark videos as they mark images."""
    waiting, as_images = (torch.isin(ids, _token(config, m)) for m in (modality, MODALITIES[0]))
    return as_images if alone and not waiting.any() else waiting


def _encoded(output: Any) -> int:
    """How many images the vision tower had in its batch."""
    last = getattr(output, "last_hidden_state", None)
    return last.shape[0] if isinstance(last, Tensor) and last.dim() == 3 else 0


def _cuts(rows: Tensor, places: Tensor, encoded: int) -> set[int]:
    """Numbers of the features where one image ends, within what the encoder put into one.

    Rows of the batch never share an image. Where the prompt has as many runs of places as the tower had images, a run is an image.
    """
    new_row = rows[1:] != rows[:-1]
    new_run = new_row | (places[1:] != places[:-1] + 1)
    ends = new_run if int(new_run.sum()) + 1 == encoded else new_row
    return set((ends.nonzero()[:, 0] + 1).tolist())


def _between(start: int, end: int, cuts: set[int]) -> Iterator[tuple[int, int]]:
    return pairwise([start, *sorted(c for c in cuts if start < c < end), end]) if end > start else iter(())


def separators(base: nn.Module, x: Tensor) -> Tensor:
    """Which of an image's features are learned marks of a line's or a view's end: [N, C] -> [N] bool.

    They are parameters of the model itself, as wide as a feature, and stand among the features as they are.
    """
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for mark in base.parameters(recurse=False):
        if mark.shape == x.shape[1:]:
            found |= (x == mark.to(x)).all(dim=-1)
    return found


def columns(image: Image, marks: Tensor, across: Tensor | None) -> int | None:
    """How many features a line of an image has; None where nothing tells.

    marks: [N] bool, its separators. across: [B, T], the prompt's positions in width, where the host has such. Otherwise lines are
    told by what stands between them, or the image is a square.
    """
    places, count = image.places, int((~marks).sum())
    if across is not None:
        width = len(across[image.row, places][~marks].unique())
        return width if width and count % width == 0 else None
    new = torch.ones_like(marks)
    new[1:] = (places[1:] != places[:-1] + 1) | (marks[1:] != marks[:-1])
    runs = torch.bincount((new.cumsum(dim=0) - 1)[~marks])
    lengths, times = runs[runs > 0].unique(return_counts=True)
    if count and int(times.max()) > 1:
        return int(lengths[times.argmax()])
    side = math.isqrt(count)
    return side if side and side * side == count else None


def copy_of(output: Any) -> Any:
    """An encoder's output that may be written into, with what models add to it beside its fields."""
    fresh = type(output)(**output)
    for name, value in vars(output).items():
        if getattr(fresh, name, None) is not value:
            setattr(fresh, name, value)
    return fresh


def with_features(output: Any, new: Sequence[Tensor], groups: Sequence[Any]) -> Any:
    """An encoder's output with other features, and with the same groups made of those for deeper layers of the language model."""
    fresh = copy_of(output)
    old = output.pooler_output
    fresh.pooler_output = type(old)(new) if not isinstance(old, Tensor) else torch.stack(list(new)) if old.dim() == 3 else new[0]
    if (deep := getattr(output, "deepstack_features", None)) is not None:
        fresh.deepstack_features = [_same_groups(level, groups) for level in deep]
    return fresh


def _same_groups(level: Any, groups: Sequence[Any]) -> Any:
    """Features of one deeper layer, for all images: a list of them, one tensor, or either with the number of the layer."""
    counts = [g.n for g in groups]
    if isinstance(level, Tensor) and level.dim() == 2 and len(level) == sum(counts):
        return torch.cat([g.apply(x) for g, x in zip(groups, level.split(counts), strict=True)])
    if isinstance(level, tuple) and len(level) == 2 and isinstance(level[0], int):
        return level[0], _same_groups(level[1], groups)
    if not isinstance(level, Tensor) and [len(x) for x in level] == counts:
        return type(level)(g.apply(x) for g, x in zip(groups, level, strict=True))
    found = list(level.shape) if isinstance(level, Tensor) else type(level).__name__
    raise UnsupportedError(
        f"features of deeper layers come as {found} for images of {counts} tokens, and cannot be squeezed alike; leave this model "
        "unreduced"
    )


def positions(base: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Positions in time, height and width of the whole prompt by the model's own rule, [3, B, T], and its `rope_deltas`, [B, 1].

    None for a model that counts tokens one by one, or that is not told what it would need for more.
    """
    rule = getattr(base, "get_rope_index", None)
    if rule is None:
        return None
    parameters = inspect.signature(rule).parameters
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    given = {name: inputs[name] for name in parameters if inputs.get(name) is not None}
    if needed - set(given):
        return None
    places, later = rule(**given)
    return places, later
