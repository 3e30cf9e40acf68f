"""Where to reduce and how much, found on images: the schedule whose features stay closest to the unreduced model's at equal MACs.

A search over stages and the share each takes of the reduction, every candidate brought to the same multiply-adds. No labels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.attach import reduce_, restore_, retune_
from squeezevit.errors import ConfigError
from squeezevit.families import host_of
from squeezevit.macs import macs
from squeezevit.modes import evaluation_mode
from squeezevit.plan import solve
from squeezevit.reducer import Staged

Schedule = tuple[tuple[int, ...], tuple[float, ...]]  # stages, and the exponent of each: keep_j = keep ** weight_j
_STEP = 1.6  # by which an exponent is tried larger and smaller


@dataclass(frozen=True)
class Calibration:
    """What a search found. Fidelity is the mean cosine of features with the unreduced model's."""

    reducer: Staged
    default: Staged  # the template's own stages, its ratios in proportion, at the same MACs
    macs_share: float
    searched: tuple[float, float]  # fidelity of reducer and default on the images searched on
    held_out: tuple[float, float] | None  # the same on images not searched on
    held_out_error: float | None  # standard error of the difference
    tried: int


def calibrate(
    model: nn.Module,
    template: Staged,
    share: float,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor] = (),
    image_size: int | tuple[int, int] | None = None,
    most: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Search stages and ratios of a kind of reducer for a share of the unreduced model's MACs. The model is left unreduced.

    images: batches [B, channels, height, width] on the model's device; some tens of images are enough. most: candidates tried.
    From the template's schedule, one change at a time is kept where it helps: a stage a block earlier or later, more or less of
    the reduction at a stage, a stage more or fewer. Raises ConfigError where not even the template reaches the share.
    """
    search = _Search(restore_(model), template, share, images, image_size)
    best = search.start
    default = search.reducer(best)
    if default is None:
        raise ConfigError(
            f"{template} cannot reach {share:.1%} of the multiply-adds; choose earlier stages (at), or a larger share"
        )
    top, tried = search.fidelity(default).mean().item(), {best}
    first = top
    waiting = search.changes(best)
    while len(tried) < most:
        candidate = next((c for c in waiting if c not in tried), None)
        if candidate is None:
            break
        tried.add(candidate)
        reducer = search.reducer(candidate)
        found = -1.0 if reducer is None else search.fidelity(reducer).mean().item()
        if found > top:
            best, top, waiting = candidate, found, search.changes(candidate)
        if progress is not None:
            progress(len(tried), most)
    reducer = search.reducer(best)
    assert reducer is not None
    own = macs(reduce_(model, reducer), image_size) / search.dense
    difference = None
    if held_out:
        search.use(held_out)
        difference = search.fidelity(reducer), search.fidelity(default)
    restore_(model)
    return Calibration(
        reducer,
        default,
        own,
        (top, first),
        None if difference is None else (difference[0].mean().item(), difference[1].mean().item()),
        None if difference is None else ((difference[0] - difference[1]).std() / len(difference[0]) ** 0.5).item(),
        len(tried),
    )


class _Search:
    """Candidates at one share of the MACs, and how near their features are to the unreduced model's."""

    def __init__(
        self, model: nn.Module, template: Staged, share: float, images: Sequence[Tensor], image_size: int | tuple[int, int] | None
    ) -> None:
        self.model, self.template, self.share, self.image_size = model, template, share, image_size
        self.depth = len(host_of(model).blocks)
        at = template.stages(self.depth)
        self.start: Schedule = (at, _exponents(template, len(at)))
        self.dense = macs(model, image_size)
        self.use(images)

    def use(self, images: Sequence[Tensor]) -> None:
        restore_(self.model)
        self.images = images
        self.expected = self.features()

    @torch.inference_mode()
    def features(self) -> Tensor:
        host = host_of(self.model)
        runs = host.tower or self.model
        with evaluation_mode(self.model):
            return torch.cat([_features(runs(*host.given(x))) for x in self.images])

    def fidelity(self, reducer: Staged) -> Tensor:
        """Cosine of features of each image: [n]."""
        reduce_(self.model, reducer)
        return F.cosine_similarity(self.features().float(), self.expected.float())

    def reducer(self, schedule: Schedule) -> Staged | None:
        """The schedule at the share of MACs; None where it cannot reach it."""
        at, weights = schedule

        def make(strength: float) -> Staged:
            keep = max(round(1 - strength, 4), 1e-4)
            return replace(self.template, at=at, keep=tuple(max(keep**w, 1e-4) for w in weights))

        def cost(reducer: Any) -> float:
            retune_(self.model, reducer)
            return macs(self.model, self.image_size) / self.dense

        reduce_(self.model, make(0.5))
        try:
            return solve(make, cost, self.share, type(self.template).__name__)  # type: ignore[return-value]
        except ConfigError:
            return None

    def changes(self, schedule: Schedule) -> Iterator[Schedule]:
        """One change at a time."""
        at, weights = schedule
        for j, block in enumerate(at):
            for moved in (block + 1, block - 1):
                if 0 < moved < self.depth and moved not in at:
                    yield (*at[:j], moved, *at[j + 1 :]), weights
            for factor in (_STEP, 1 / _STEP):
                yield at, (*weights[:j], round(weights[j] * factor, 3), *weights[j + 1 :])
        for block in range(1, self.depth):
            if block not in at:
                j = sum(b < block for b in at)
                yield (*at[:j], block, *at[j:]), (*weights[:j], 1.0, *weights[j:])
        if len(at) > 1:
            for j in range(len(at)):
                yield (*at[:j], *at[j + 1 :]), (*weights[:j], *weights[j + 1 :])


def _exponents(template: Staged, stages: int) -> tuple[float, ...]:
    """In which proportion a template's own ratios share the reduction: 1 each where it has one ratio for all."""
    if not isinstance(template.keep, tuple) or min(template.keep) == 1:
        return (1.0,) * stages
    logs = [math.log(ratio) for ratio in template.keep]
    return tuple(round(log * stages / sum(logs), 3) for log in logs)


def _features(out: Any) -> Tensor:
    """One vector an image: a tensor as it is, of a Hugging Face output what it pools."""
    if isinstance(out, Tensor):
        return out.flatten(1)
    for name in ("image_embeds", "logits", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out[0][:, 0]
