"""Keep ratios that fall from 1 to a reducer's own while training begins."""

import math
from dataclasses import replace

from squeezevit.errors import ConfigError
from squeezevit.reducer import Reducer, Staged
from squeezevit.reducers import ToMe


def annealed(reducer: Reducer, progress: float) -> Reducer:
    """The reducer at a share of the way, by a cosine: at 0 nothing is removed, at 1 it is the reducer itself.

    As EViT trains (Liang et al. 2022, section 4): keep(t) = keep + (1 - keep) (1 + cos(pi t)) / 2. ToMe begins at one token a
    block, so that its stages stay. What samples its own counts (masked training of dTPS and DynamicViT) is returned as it is.

    >>> annealed(ToMe(r=8), 0.5)
    ToMe(r=4)
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress={progress!r} is no share of the way; give a number from 0 to 1")
    if progress == 1 or reducer.masks:
        return reducer
    left = (1 + math.cos(math.pi * progress)) / 2
    if isinstance(reducer, ToMe):
        steps = [max(round(r * (1 - left)), 1) if r else 0 for r in ([reducer.r] if isinstance(reducer.r, int) else reducer.r)]
        return replace(reducer, r=steps[0] if isinstance(reducer.r, int) else tuple(steps))
    if isinstance(reducer, Staged):
        keep = reducer.keep
        ratios = [k + (1 - k) * left for k in (keep if isinstance(keep, tuple) else (keep,))]
        return replace(reducer, keep=tuple(ratios) if isinstance(keep, tuple) else ratios[0])
    return reducer
