"""Searches along a reducer's strength for what meets a cost. They know no model: costs come from a function."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

from squeezevit.core.reducer import Reducer, Staged
from squeezevit.errors import ConfigError

Make = Callable[[float], Reducer]  # from a strength of 0 (all tokens stay) to 1 (as few as the method can)
Cost = Callable[[Reducer], float]  # falls, in steps, as strength grows
TOLERANCE = 0.004  # of the unreduced model's multiply-adds
SOLVE_STEPS = 17  # costs that `solve` asks for, at most
BISECT_STEPS = 13  # and `most_tokens`: strength to one part in 2048
CURVES: dict[str, Callable[[float], float]] = {  # the share of tokens left, where the way down is 0 at the first block
    "geometric": lambda way: math.exp(-way),
    "linear": lambda way: 1 - way,
    "cosine": lambda way: (1 + math.cos(math.pi * min(way, 1.0))) / 2,
    "lorentzian": lambda way: 1 / (1 + way**2),  # level at first where little is to go, soon down where much is
}


MILD = 0.1  # strength at which the last block of such a model has come down to LAST
LAST = 0.1  # of its tokens, the last block of a model that is read at the class token leaves for its MLP, whose output nobody reads


class OutOfReach(ConfigError):
    """A budget that not even the strongest setting meets."""


def on_curve(template: Staged, curve: str, strength: float, patches: int, stages: int) -> Staged:
    """The keep ratios of `stages` stages that follow a curve down, from level at strength 0 to falling at once at 1.

    A stage that "quarters+last" puts into the last block is not on the curve: it leaves `LAST` of what comes, and more only
    for the mildest budgets, for which nothing else is to go.
    """
    apart = 1 if template.class_token_only else 0
    steepness, on = strength / max(1 - strength, 1e-4), max(stages - apart, 1)
    left = [max(round(patches * CURVES[curve](steepness * i / on)), 1) for i in range(on + 1)]
    left += [max(round(left[-1] * max(1 - (1 - LAST) * strength / MILD, LAST)), 1)] * (stages - on)
    # never a little too high, as counts are rounded up
    return replace(template, keep=tuple(max(math.floor(1e6 * b / a) / 1e6, 1e-6) for a, b in pairwise(left)))


def solve(make: Make, cost: Cost, share: float, method: str) -> Reducer:
    """The reducer whose cost is nearest to a share of the multiply-adds, by regula falsi (the Illinois variant).

    Ends where the share is met to TOLERANCE. Raises OutOfReach where even the strongest reducer costs more.
    """
    best = make(1.0)
    low, high, above, below = 0.0, 1.0, 1.0 - share, cost(best) - share
    if below > TOLERANCE:
        raise OutOfReach(
            f"{method} cannot reach {share:.1%} of the multiply-adds with these stages; the least is {below + share:.1%}. Choose "
            "earlier or more stages (at), or a larger share"
        )
    error = abs(below)
    side = 0
    for _ in range(SOLVE_STEPS - 1):
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


def most_tokens(make: Make, cost: Cost, wanted: float, refusal: Callable[[float], str]) -> Reducer:
    """The weakest reducer that costs no more than wanted, by bisection.

    Raises OutOfReach where even the strongest one costs more, with what `refusal` says about that least cost.
    """
    if cost(make(0.0)) <= wanted:
        return make(0.0)
    least = cost(make(1.0))
    if least > wanted:
        raise OutOfReach(refusal(least))
    low, high = 0.0, 1.0
    for _ in range(BISECT_STEPS - 2):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(make(middle)) <= wanted else (middle, high)
    return make(high)


def along(known: Mapping[float, float], x: float) -> float:
    """Between known points the straight line; outside in proportion to the nearest.

    >>> along({2.0: 4.0, 4.0: 6.0}, 3.0), along({2.0: 4.0, 4.0: 6.0}, 1.0)
    (5.0, 2.0)
    """
    points = sorted(known.items())
    for (a, low), (b, high) in pairwise(points):
        if a < x <= b:
            return low + (high - low) * (x - a) / (b - a)
    a, low = points[0] if x <= points[0][0] else points[-1]
    return low * x / a
