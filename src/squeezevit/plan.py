"""From a share of multiply-adds to a reducer: which keep ratio, or which r, brings this model there."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from squeezevit import families
from squeezevit.attach import reduce_, restore_
from squeezevit.errors import ConfigError
from squeezevit.macs import macs, token_counts
from squeezevit.reducer import Reducer
from squeezevit.reducers import Identity, Random, ToMe
from squeezevit.reducers.names import check_method, staged

TOLERANCE = 0.004  # of the unreduced model's MACs


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
    """The reducer of this method that brings a model nearest to `share` of its unreduced multiply-adds.

    The model is left unreduced. One keep ratio for all stages (one r for ToMe, spread evenly) is found on the MACs
    counted; they move in steps of one token, so the share is met to 0.4 points or half a step, whichever is more.
    Raises ConfigError where the share cannot be reached, saying what can.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share {share!r} of the multiply-adds is not above 0 and at most 1; give 0.5 for half")
    if check_method(method) == "identity":
        return Identity()
    dense = macs(restore_(model), image_size)
    depth = len(families.host(model).blocks)
    patches = token_counts(reduce_(model, Random(keep=1.0)), image_size)[0]

    def make(strength: float) -> Reducer:
        """More strength, fewer tokens: 0 leaves all, 1 as few as the method can."""
        if method.lower() == "tome":
            return tome(strength * patches / 2, depth)
        return staged(method, max(round(1 - strength, 4), 1e-4), at)

    def cost(reducer: Reducer) -> float:
        return macs(reduce_(model, reducer), image_size) / dense

    try:
        return _solve(make, cost, share, method)
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


def _solve(make: Callable[[float], Reducer], cost: Callable[[Reducer], float], share: float, method: str) -> Reducer:
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
