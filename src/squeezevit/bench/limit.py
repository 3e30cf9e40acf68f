"""The limit: the same model with its tokens merely sliced to the same counts. No scores, no gather, no fuse."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from squeezevit.core.reducer import Reducer, Reduction, Stage


@dataclass(frozen=True)
class Slice(Reducer):
    """Keep the first patch tokens, counts[j] of them, between the halves of block at[j]."""

    scored: ClassVar[bool] = False

    at: tuple[int, ...]
    counts: tuple[int, ...]

    def stages(self, depth: int) -> tuple[int, ...]:
        return self.at

    def count(self, stage: int, n: int, n0: int) -> int:
        return self.counts[stage]

    def reduce(self, s: Stage) -> Reduction:
        index = torch.arange(s.n, device=s.tokens.device).expand(s.tokens.shape[0], -1)
        return Reduction(s.tokens[:, : s.prefix + s.k], index[:, : s.k], index[:, s.k :])


@dataclass(frozen=True)
class SliceBefore(Slice):
    """The same, before the block."""

    place = "before"


@dataclass(frozen=True)
class SliceAfter(Slice):
    """The same, behind the block."""

    place = "after"


_SLICES = {"before": SliceBefore, "between": Slice, "after": SliceAfter}


def limit_of(reducer: Reducer, at: tuple[int, ...], counts: tuple[int, ...]) -> Slice:
    """The limit of a reducer whose stages `at` let `counts` patch tokens out."""
    return _SLICES[reducer.place](at, counts)
