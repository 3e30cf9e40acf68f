"""From a budget to a reducer: a share of the multiply-adds, a share of the time on this device, or images a second."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

from torch import nn

from squeezevit.attach import reduce_, restore_, retune_
from squeezevit.errors import ConfigError
from squeezevit.families import host_of
from squeezevit.macs import fake_trace, macs, token_counts
from squeezevit.reducer import Reducer, Staged
from squeezevit.reducers import Identity, Random, ToMe
from squeezevit.reducers.names import CURVE, check_method, staged

TOLERANCE = 0.004  # of the unreduced model's MACs
WITHIN = 0.03  # of the time asked for, of a plan that needs no second look
CURVES: dict[str, Callable[[float], float]] = {  # the share of tokens left, where the way down is 0 at the first block
    "geometric": lambda way: math.exp(-way),
    "linear": lambda way: 1 - way,
    "cosine": lambda way: (1 + math.cos(math.pi * min(way, 1.0))) / 2,
    "lorentzian": lambda way: 1 / (1 + way**2),  # level at first where little is to go, soon down where much is
}
logger = logging.getLogger(__name__)
Make = Callable[[float], Reducer]  # from a strength of 0 (all tokens stay) to 1 (as few as the method can)


@dataclass(frozen=True)
class Plan:
    """A reducer, and what is known of it. Times are seconds a batch; shares are of the unreduced model."""

    reducer: Reducer
    macs_share: float
    predicted: float | None = None  # share of the time
    measured: float | None = None  # share of the time, in the run that made the plan
    seconds: float | None = None  # measured

    def __str__(self) -> str:
        text = f"{self.reducer}: {self.macs_share:.1%} of the multiply-adds"
        if self.measured is None or self.seconds is None:
            return text
        times = f"{self.predicted:.1%} of the time predicted, {self.measured:.1%} measured"
        return f"{text}, {times} ({1e3 * self.seconds:.1f} ms a batch)"


def plan(model: nn.Module, reducer: type[Reducer] | Reducer, **budget: Any) -> Reducer:
    """The reducer of this kind that meets a budget with the most tokens kept; see `make_plan`, whose `reducer` it returns.

    >>> plan(timm.create_model("deit_small_patch16_224"), ETPS, macs=0.5).keep  # doctest: +SKIP
    0.5384
    """
    return make_plan(model, reducer, **budget).reducer


def make_plan(
    model: nn.Module,
    reducer: type[Reducer] | Reducer,
    *,
    macs: float | None = None,
    latency: float | None = None,
    images_per_second: float | None = None,
    batch_size: int = 1,
    image_size: int | tuple[int, int] | None = None,
    precision: str = "fp32",
    at: Sequence[int] | str | None = None,
    curve: str | None = None,
    fresh: bool = False,
) -> Plan:
    """Choose the keep ratio (for ToMe r) of a kind of reducer for a budget on this model. The model is left unreduced.

    reducer: a class, or a reducer whose other options stay. One budget: macs, the share of the unreduced model's multiply-adds;
    latency, the share of its time a batch of `batch_size` on the model's own device; images_per_second, there. at: stages, "auto"
    for the latest evenly spaced ones that reach the budget, or None for the reducer's own. curve: a ratio for each stage instead of
    one for all, so that the tokens left fall along a "geometric", "linear", "cosine" or "lorentzian" curve, whose steepness is
    planned; where neither names stages there is one in every block.
    For times the model's blocks are timed at a few token counts (kept in a cache file by model, device, versions and setting;
    `fresh` measures again), the plan is verified by a measurement, and made anew from it where it misses by over 3 %.
    Raises ConfigError where the budget cannot be reached, saying what can.
    """
    budgets = {"macs": macs, "latency": latency, "images_per_second": images_per_second}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give one budget, macs, latency or images_per_second, not {', '.join(given) or 'none'}")
    (name, value), = given.items()  # fmt: skip
    most = float("inf") if name == "images_per_second" else 1.0
    if isinstance(value, bool) or not 0 < value <= most:
        kind = "a number above 0" if most > 1 else "a share above 0 and at most 1"
        raise ConfigError(f"{name}={value!r} is no budget; give {kind}")
    restore_(model)
    template = reducer() if isinstance(reducer, type) else reducer
    depth = len(host_of(model).blocks)
    tries = [_curved(template, at, curve)] if curve is not None else _placements(template, at, depth)
    for i, candidate in enumerate(tries):
        try:
            if macs is not None:
                return _for_macs(model, candidate, macs, image_size, curve)
            setting = (batch_size, image_size, precision, curve, fresh)
            return _for_time(model, candidate, latency, images_per_second, *setting)
        except ConfigError:
            if i + 1 == len(tries):
                raise
        finally:
            restore_(model)
    raise AssertionError("a placement is always tried")


def _placements(template: Reducer, at: Sequence[int] | str | None, depth: int) -> list[Reducer]:
    """The reducer with the stages to try, in order."""
    if at is None:
        return [template]
    if not isinstance(template, Staged):
        raise ConfigError(f"{type(template).__name__} has no stages to choose (at={at!r}); leave at out")
    if not isinstance(at, str):
        return [replace(template, keep=0.5, at=tuple(at))]
    if at != "auto":
        raise ConfigError(f"at={at!r}: give block indices, as (3, 6, 9), or 'auto'")
    step = max(depth // 4, 1)
    spaced = [tuple(b for b in (first, first + step, first + 2 * step) if b < depth) for first in range(step, -1, -1)]
    return [replace(template, keep=0.5, at=blocks) for blocks in spaced]


def _curved(template: Reducer, at: Sequence[int] | str | None, curve: str) -> Reducer:
    if curve not in CURVES:
        raise ConfigError(f"curve={curve!r} is not known; choose from {', '.join(CURVES)}")
    if not isinstance(template, Staged):
        raise ConfigError(f"{type(template).__name__} has no keep ratios to spread (curve={curve!r}); leave the curve out")
    if at == "auto":
        raise ConfigError(
            f"curve={curve!r} gives each stage a ratio of its own, but at='auto' looks for stages of one; leave one out"
        )
    return replace(template, keep=1.0, at=cast(Any, template.at or "every" if at is None else at))


def on_curve(template: Staged, curve: str, strength: float, patches: int, stages: int) -> Staged:
    """The keep ratios of `stages` stages that follow a curve down, from level at strength 0 to falling at once at 1."""
    steepness = strength / max(1 - strength, 1e-4)
    left = [max(round(patches * CURVES[curve](steepness * i / stages)), 1) for i in range(stages + 1)]
    # never a little too high, as counts are rounded up
    return replace(template, keep=tuple(max(math.floor(1e6 * b / a) / 1e6, 1e-6) for a, b in pairwise(left)))


def _maker(model: nn.Module, template: Reducer, image_size: int | tuple[int, int] | None, curve: str | None = None) -> Make:
    if isinstance(template, ToMe) or curve is not None:
        patches = token_counts(reduce_(model, Random(keep=1.0)), image_size)[0]
        depth = len(host_of(restore_(model)).blocks)
    if isinstance(template, ToMe):
        return lambda strength: tome(strength * patches / 2, depth)
    if not isinstance(template, Staged):
        raise ConfigError(f"{template} has no keep ratio to plan; give a reducer with one, as sv.ETPS")
    if curve is not None:
        stages = len(template.stages(depth))
        return lambda strength: on_curve(template, curve, strength, patches, stages)
    return lambda strength: replace(template, keep=max(round(1 - strength, 4), 1e-4))


def _tuned(model: nn.Module, reducer: Reducer) -> nn.Module:
    """The model with the reducer in it; where only ratios differ from the one that is there, blocks are not proved again."""
    try:
        retune_(model, reducer)
    except ConfigError:
        reduce_(model, reducer)
    return model


def _for_macs(
    model: nn.Module, template: Reducer, share: float, image_size: int | tuple[int, int] | None, curve: str | None
) -> Plan:
    found = _meet_macs(model, _maker(model, template, image_size, curve), share, type(template).__name__, image_size)
    own = macs(reduce_(model, found), image_size)
    return Plan(found, own / macs(restore_(model), image_size))


def _for_time(
    model: nn.Module,
    template: Reducer,
    latency: float | None,
    images_per_second: float | None,
    batch_size: int,
    image_size: int | tuple[int, int] | None,
    precision: str,
    curve: str | None,
    fresh: bool,
) -> Plan:
    from squeezevit.latency import cached_profile, ratio

    make = _maker(model, template, image_size, curve)
    profile = cached_profile(model, make(0.5), batch_size, image_size, precision, fresh)
    dense = profile.seconds(Identity(), (), (profile.tokens[-1] - profile.prefix,))
    wanted = latency * dense if latency is not None else batch_size / float(images_per_second or 1)

    def predicted(reducer: Reducer, correction: float = 1.0) -> float:
        stages = fake_trace(_tuned(model, reducer), image_size).stages
        counts = (stages[0].n, *(s.n_out for s in stages)) if stages else (profile.tokens[-1] - profile.prefix,)
        return correction * profile.seconds(reducer, tuple(s.block for s in stages), counts)

    found: list[tuple[float, Plan]] = []
    correction = 1.0  # of the prediction, by what was measured
    while len(found) < 3 and not (found and (found[-1][0] <= WITHIN or found[-1][1].reducer == make(0.0))):
        cost = partial(predicted, correction=correction)
        reducer = _most_tokens(make, cost, wanted, dense, type(template).__name__)
        seconds, measured = ratio(model, reducer, batch_size, image_size, precision)
        share = cost(reducer) / dense
        off = measured / latency if latency is not None else seconds / wanted
        own = macs(reduce_(model, reducer), image_size) / macs(restore_(model), image_size)
        found.append((abs(off - 1), Plan(reducer, own, share, measured, seconds)))
        logger.info("%s", found[-1][1])
        correction *= measured / share if latency is not None else seconds / (share * dense)
    return min(found, key=lambda f: f[0])[1]


def _most_tokens(make: Make, cost: Callable[[Reducer], float], wanted: float, dense: float, method: str) -> Reducer:
    """The weakest reducer that costs no more than wanted, by bisection."""
    if cost(make(0.0)) <= wanted:
        return make(0.0)
    least = cost(make(1.0))
    if least > wanted:
        raise ConfigError(
            f"{method} cannot reach {wanted / dense:.1%} of the unreduced model's time with these stages; the least predicted is "
            f"{least / dense:.1%} ({1e3 * least:.3g} ms a batch). Choose earlier or more stages (at), or a larger budget"
        )
    low, high = 0.0, 1.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(make(middle)) <= wanted else (middle, high)
    return make(high)


def tome(removed: float, depth: int) -> ToMe:
    """ToMe with a number of tokens per block that need not be whole: as even a mixture of two neighbours as there is.

    >>> tome(2.5, 4).r
    (2, 3, 2, 3)
    """
    steps = [int(removed * i + 1e-9) for i in range(depth + 1)]
    return ToMe(r=tuple(b - a for a, b in pairwise(steps)))


def plan_macs(
    model: nn.Module,
    method: str,
    share: float,
    at: Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Reducer:
    """`plan` for a share of the multiply-adds, by a method's name; "identity" is itself.

    One keep ratio for all stages (one r for ToMe, spread evenly; of the preset ratios along its curve) is found on the MACs
    counted; they move in steps of one token, so the share is met to 0.4 points or half a step, whichever is more.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share {share!r} of the multiply-adds is not above 0 and at most 1; give 0.5 for half")
    if check_method(method) == "identity":
        return Identity()
    template = ToMe() if method.lower() == "tome" else staged(method, 0.5, at)
    try:
        make = _maker(restore_(model), template, image_size, CURVE.get(method.lower()))
        return _meet_macs(model, make, share, method, image_size)
    finally:
        restore_(model)


def tome_like_etps(
    model: nn.Module,
    keep: float | Sequence[float],
    at: Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Reducer:
    """The ToMe that costs what eTPS costs at these keep ratios. The model is left unreduced."""
    share = macs(reduce_(model, staged("etps", keep, at)), image_size) / macs(restore_(model), image_size)
    return plan_macs(model, "tome", share, image_size=image_size)


def _meet_macs(model: nn.Module, make: Make, share: float, method: str, image_size: int | tuple[int, int] | None) -> Reducer:
    dense = macs(restore_(model), image_size)
    return solve(make, lambda reducer: macs(_tuned(model, reducer), image_size) / dense, share, method)


def solve(make: Callable[[float], Reducer], cost: Callable[[Reducer], float], share: float, method: str) -> Reducer:
    """Regula falsi (the Illinois variant) on a falling step function."""
    best = make(1.0)
    low, high, above, below = 0.0, 1.0, 1.0 - share, cost(best) - share
    if below > TOLERANCE:
        raise ConfigError(
            f"{method} cannot reach {share:.1%} of the multiply-adds with these stages; the least is {below + share:.1%}. Choose "
            "earlier or more stages (at), or a larger share"
        )
    error = abs(below)
    side = 0
    for _ in range(16):
        if error < TOLERANCE:
            break
        middle = round(low + (high - low) * above / (above - below), 4)
        reducer = make(middle)
        off = cost(reducer) - share
        if abs(off) < error:
            best, error = reducer, abs(off)
        if off > 0:
            low, above, below, side = middle, off, below / 2 if side > 0 else below, 1
        else:
            high, below, above, side = middle, off, above / 2 if side < 0 else above, -1
    return best
