"""Which of several methods can be told from which, on the same images."""

import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np

from squeezevit.errors import MissingExtraError

try:
    from scipy.special import stdtr
except ModuleNotFoundError as error:
    raise MissingExtraError(f'methods are told apart by SciPy: run `pip install "squeezevit[cli]"` ({error})') from error

ALPHA = 0.05


def p_value(difference: np.ndarray) -> float:
    """Two-sided, that the mean of paired differences [n] is 0, by Student's t; 1 where all of them are 0.

    Never below 2 ** (1 - n), the least that a test by their signs could say: few images tell little, however alike they are.
    """
    n = len(difference)
    if n < 2 or not difference.any():
        return 1.0
    error = float(difference.std(ddof=1)) / math.sqrt(n)
    t = abs(float(difference.mean())) / error if error else math.inf
    return max(2 * float(stdtr(n - 1, -t)), 2.0 ** (1 - n))


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
