"""Where to reduce and how much, found on images: the schedule whose features stay closest to the unreduced model's at equal MACs.

A search over stages and the share each takes of the reduction, every candidate brought to the same multiply-adds. No labels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.budget.meter import Meter, Setting, Size
from squeezevit.budget.plan import is_share
from squeezevit.budget.solve import OutOfReach, solve
from squeezevit.core.macs import macs
from squeezevit.core.reducer import Staged
from squeezevit.core.running import evaluation_mode, forward, pooled
from squeezevit.errors import ConfigError

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
    held_out_error: float | None  # standard error of the difference; None of a single image
    tried: int


def calibrate(
    model: nn.Module,
    template: Staged,
    share: float,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor] = (),
    image_size: Size = None,
    most: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Search stages and ratios of a kind of reducer for a share of the unreduced model's MACs. The model is left as it was.

    images: batches [B, channels, height, width] on the model's device; some tens of images are enough. most: candidates tried.
    From the template's schedule, one change at a time is kept where it helps: a stage a block earlier or later, more or less of
    the reduction at a stage, a stage more or fewer. Raises ConfigError where not even the template reaches the share, and for
    images of a size that the model does not take.
    """
    if not is_share(share):
        raise ConfigError(f"share={share!r}: give a share of the multiply-adds above 0 and at most 1, as 0.5")
    if not isinstance(template, Staged):
        raise ConfigError(f"{template!r} has no stages to search; give a reducer with stages and ratios, as sv.ETPS()")
    if template.learned:
        raise ConfigError(
            f"{template} ranks by heads that are learned for their places, and every candidate would have fresh ones; calibrate a "
            "reducer that learns nothing, as sv.ETPS(), and give its stages and ratios to this one"
        )
    if template.class_token_only:
        raise ConfigError(
            f"{template} has a stage in the last block for a model that is read at its class token, which a search would move and "
            "weigh as any other; calibrate at='quarters', as the method 'training-free' has it"
        )
    with Meter(model, Setting(image_size=image_size)) as meter:
        search = _Search(meter, template, share, images)
        default = search.reducer(search.start)
        if default is None:
            raise ConfigError(
                f"{template} cannot reach {share:.1%} of the multiply-adds; choose earlier stages (at), or a larger share"
            )
        reducer, searched, tried = search.climb(default, most, progress)
        own = meter.share(reducer)
        if not held_out:
            return Calibration(reducer, default, own, searched, None, None, tried)
        search.use(held_out)
        better, first = search.fidelity(reducer), search.fidelity(default)
        error = ((better - first).std() / len(better) ** 0.5).item() if len(better) > 1 else None
        return Calibration(reducer, default, own, searched, (better.mean().item(), first.mean().item()), error, tried)


class _Search:
    """Candidates at one share of the MACs, and how near their features are to the unreduced model's."""

    def __init__(self, meter: Meter, template: Staged, share: float, images: Sequence[Tensor]) -> None:
        self.meter, self.template, self.share = meter, template, share
        at = template.stages(meter.depth)
        self.start: Schedule = (at, _exponents(template, len(at)))
        self.use(images)

    def use(self, images: Sequence[Tensor]) -> None:
        if not images:
            raise ConfigError("there are no images to search on; give at least one batch")
        model = self.meter.release()
        for size in {(x.shape[-2], x.shape[-1]) for x in images}:
            macs(model, size)  # raises for one that the model does not take
        self.images = images
        self.expected = self.features()

    def features(self) -> Tensor:
        model = self.meter.model
        with evaluation_mode(model):
            return torch.cat([pooled(forward(model, x, "fp32")()) for x in self.images])

    def fidelity(self, reducer: Staged) -> Tensor:
        """Cosine of features of each image: [n]."""
        self.meter.hold(reducer)
        return F.cosine_similarity(self.features().float(), self.expected.float())

    def climb(
        self, default: Staged, most: int, progress: Callable[[int, int], None] | None
    ) -> tuple[Staged, tuple[float, float], int]:
        """The best reducer that changes one at a time lead to, its fidelity and the default's, and how many were tried."""
        tried, waiting = {self.start}, self.changes(self.start)
        best, top = default, self.fidelity(default).mean().item()
        first = top
        while len(tried) < most:
            candidate = next((c for c in waiting if c not in tried), None)
            if candidate is None:
                break
            tried.add(candidate)
            reducer = self.reducer(candidate)
            found = -1.0 if reducer is None else self.fidelity(reducer).mean().item()
            if reducer is not None and found > top:
                best, top, waiting = reducer, found, self.changes(candidate)
            if progress is not None:
                progress(len(tried), most)
        return best, (top, first), len(tried)

    def reducer(self, schedule: Schedule) -> Staged | None:
        """The schedule at the share of MACs; None where it cannot reach it."""
        at, weights = schedule

        def make(strength: float) -> Staged:
            keep = max(round(1 - strength, 4), 1e-4)
            return replace(self.template, at=at, keep=tuple(max(keep**w, 1e-4) for w in weights))

        try:
            return solve(make, self.meter.share, self.share, type(self.template).__name__)  # type: ignore[return-value]
        except OutOfReach:
            return None

    def changes(self, schedule: Schedule) -> Iterator[Schedule]:
        """One change at a time."""
        at, weights = schedule
        for j, block in enumerate(at):
            for moved in (block + 1, block - 1):
                if 0 < moved < self.meter.depth and moved not in at:
                    yield (*at[:j], moved, *at[j + 1 :]), weights
            for factor in (_STEP, 1 / _STEP):
                yield at, (*weights[:j], round(weights[j] * factor, 3), *weights[j + 1 :])
        for block in range(1, self.meter.depth):
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
