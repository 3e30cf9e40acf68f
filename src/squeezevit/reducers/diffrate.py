"""DiffRate (Chen et al., ICCV 2023): in every block some tokens are pruned and some merged, at rates that were searched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from squeezevit.core import ops
from squeezevit.core.reducer import EPS, Reducer, Reduction, Spread, Stage, Staged
from squeezevit.errors import ConfigError

Counts = tuple[int, ...]
_PATCHES = 196  # of the models below
SEARCHED: dict[str, dict[float, tuple[Counts, Counts]]] = {  # by GMACs: tokens and class token after pruning, and after merging
    "deit_tiny": {
        0.6: ((197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3), (197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3)),
        0.7: ((197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3), (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3)),
        0.8: ((197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3), (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3)),
        0.9: ((197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3), (197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3)),
        1.0: (
            (197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21),
            (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21),
        ),
    },
    "deit_small": {
        2.3: ((197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3), (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3)),
        2.5: ((197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3), (197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3)),
        2.7: ((197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3), (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3)),
        2.9: ((197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3), (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)),
        3.1: ((197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3), (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3)),
    },
    "deit_base": {
        8.7: ((197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3), (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3)),
        10.0: ((197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3), (197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3)),
        10.4: ((197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3), (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3)),
        11.5: ((197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3), (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3)),
        12.5: ((197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3), (197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3)),
    },
}  # fmt: skip


@dataclass(frozen=True)
class DiffRate(Staged):
    """Between attention and MLP of every block, tokens with little class attention are pruned, and those with a little more merged.

    merge: of the tokens that a stage removes, the share, those with more attention, that goes into the kept token most like it, by
    plain means; the others are dropped. One share for all stages, or one per stage. A kept token's size grows by the size of what
    it takes in, times the cosine of the two; later attention gets log(size) (section 3 of Chen et al. 2023 and the authors' code,
    which lets a negative cosine shrink a size; here it adds none). Without a class token: attention received.
    `DiffRate.searched("deit_small", 2.9)` has the authors' rates. A budget between theirs gets rates between theirs for DeiT-S, at
    the same share of the depth; learning rates by gradient is not part of it, `sv`'s calibration finds some for a model.
    """

    keep: float | tuple[float, ...] = 0.925
    at: tuple[int, ...] | Spread | None = "every"
    merge: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        values = tuple(self.merge) if isinstance(self.merge, Sequence) and not isinstance(self.merge, str) else (self.merge,)
        if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1 for v in values):
            raise ConfigError(f"DiffRate: merge={self.merge!r} is not a share of the removed tokens; give 0 to 1, or one per stage")
        whole = tuple(map(float, values))
        object.__setattr__(self, "merge", whole if isinstance(self.merge, Sequence) else whole[0])

    def _check_lengths(self, at: tuple[int, ...]) -> None:
        super()._check_lengths(at)
        merge = getattr(self, "merge", 0.0)
        if isinstance(merge, Sequence) and len(merge) != len(at):
            raise ConfigError(
                f"DiffRate: merge={merge} has {len(merge)} shares but at={at} has {len(at)} stages; give one share per stage, or a "
                "single one for all"
            )

    @classmethod
    def searched(cls, model: str, gmacs: float) -> "DiffRate":
        """The rates that the authors searched for a DeiT of 12 blocks. Raises ConfigError where there are none.

        >>> DiffRate.searched("deit_small", 2.9).count(1, 196, 196)
        193
        """
        if model not in SEARCHED or gmacs not in SEARCHED[model]:
            known = "; ".join(f"{name!r} at {', '.join(map(str, rates))}" for name, rates in SEARCHED.items())
            raise ConfigError(f"no rates were searched for {model!r} at {gmacs!r} GMACs; there are {known}")
        return cls._of(_PATCHES, *_shares(*SEARCHED[model][gmacs]))

    @classmethod
    def _of(cls, patches: int, pruned: Sequence[float], merged: Sequence[float]) -> "DiffRate":
        """From the shares of the patches that are left after pruning and after merging, block by block."""
        keep, merge, n = [], [], patches
        for after_pruning, after_merging in zip(pruned, merged, strict=True):
            p = min(max(round(patches * after_pruning), 1), n)
            k = min(max(round(patches * after_merging), 1), p)
            keep.append(k / n)
            merge.append((p - k) / (n - k) if n > k else 0.0)
            n = k
        return cls(keep=tuple(keep), merge=tuple(merge))

    @property
    def weighs(self) -> bool:
        return True

    def constant(self) -> object:
        return replace(self, keep=1.0, at=None, merge=0.0)

    def at_strength(self, strength: float, patches: int, depth: int) -> Reducer:
        """Between the rates searched for DeiT-S; ahead of the first all tokens stay, behind the last one stays."""
        if self.at != "every":
            return super().at_strength(strength, patches, depth)
        between = [_shares(*counts) for _, counts in sorted(SEARCHED["deit_small"].items(), reverse=True)]
        knots = [([1.0] * 12, [1.0] * 12), *between, ([0.0] * 12, [0.0] * 12)]
        pruned, merged = ([_along(knots, strength, side, (i + 0.5) / depth) for i in range(depth)] for side in range(2))
        made = self._of(patches, pruned, merged)
        # shares by stage belong to the counts that they were found for; one share for all is the user's wish
        own = isinstance(self.merge, float) and self.merge != type(self)().merge
        return replace(made, merge=self.merge) if own else made

    def merged(self, stage: int, n: int, k: int) -> int:
        """How many of the n - k removed go into others."""
        share = self.merge[stage] if isinstance(self.merge, tuple) else self.merge
        return math.floor(share * (n - k) + 0.5 + EPS)

    def reduce(self, s: Stage) -> Reduction:
        scores, count = s.scores(), self.merged(s.index, s.n, s.k)
        order = scores.topk(s.n, dim=1).indices
        kept, middle, gone = (ops.ascending(part) for part in order.split([s.k, count, s.n - s.k - count], dim=1))
        if not count:
            return Reduction(s.keep(kept), kept, gone, scores=scores, mass=s.masses().gather(1, s.rows(kept)))
        patches = s.tokens[:, s.prefix :]
        hosts, cosine = ops.match(ops.take(patches, kept), ops.take(patches, middle))
        tokens, size = s.merge(kept, middle, hosts), s.masses()
        more = size.gather(1, middle + s.prefix) * cosine.clamp(min=0).detach()
        mass = size.gather(1, s.rows(kept)).scatter_add(1, hosts + s.prefix, more.to(size.dtype))
        return Reduction(tokens, kept, torch.cat([middle, gone], dim=1), hosts, scores, mass)


def _shares(pruned: Counts, merged: Counts) -> tuple[list[float], list[float]]:
    """Of the patches, without the class token."""
    return [(n - 1) / _PATCHES for n in pruned], [(n - 1) / _PATCHES for n in merged]


def _along(knots: Sequence[tuple[list[float], list[float]]], strength: float, side: int, way: float) -> float:
    """What is left at a share of the depth, between the knots before and behind a strength, straight in both directions."""
    place = min(max(strength, 0.0), 1.0) * (len(knots) - 1)
    low = min(int(place), len(knots) - 2)
    a, b = (_at(knots[i][side], way) for i in (low, low + 1))
    return a + (b - a) * (place - low)


def _at(values: Sequence[float], way: float) -> float:
    x = min(max(way * len(values) - 0.5, 0.0), len(values) - 1.0)
    return next(
        (a + (b - a) * (x - i) for i, (a, b) in enumerate(pairwise(values)) if x <= i + 1),
        values[-1],
    )
