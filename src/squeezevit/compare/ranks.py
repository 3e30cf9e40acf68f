"""Which of several methods can be told from which, on the same images."""

import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np

ALPHA = 0.05


def p_value(difference: np.ndarray) -> float:
    """Two-sided, that the mean of paired differences [n] is 0, by the normal approximation; 1 where all of them are 0."""
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    mean = float(difference.mean())
    if spread == 0:
        return float(mean == 0)
    return math.erfc(abs(mean) / (spread / math.sqrt(len(difference))) / math.sqrt(2))


def ranks(values: Mapping[str, np.ndarray]) -> dict[str, int]:
    """For each method 1 and the number of those that are told to be better: paired tests of all pairs, corrected as Holm (1979).

    values: for each method a number an image, [n], higher is better; the same images for all.

    >>> ranks({"a": np.full(9, 0.9), "b": np.full(9, 0.9), "c": np.linspace(0.1, 0.3, 9)})
    {'a': 1, 'b': 1, 'c': 3}
    """
    pairs = {(a, b): p_value(values[a] - values[b]) for a, b in combinations(values, 2)}
    better: dict[str, int] = dict.fromkeys(values, 0)
    for i, ((a, b), p) in enumerate(sorted(pairs.items(), key=lambda item: item[1])):
        if p > ALPHA / (len(pairs) - i):
            break
        better[b if values[a].mean() > values[b].mean() else a] += 1
    return {name: 1 + count for name, count in better.items()}
