"""What methods share that take a few tokens in every block, and pair them two by two as ToMe does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import Reducer, Stage, is_index, still_left
from squeezevit.errors import ConfigError


@dataclass(frozen=True)
class PerBlock(Reducer):
    """A reducer that takes r tokens in every block, at most half of the patch tokens there; one number, or one per block."""

    first: ClassVar[int] = 0  # block, where one number is given

    r: int | tuple[int, ...] = 8

    def __post_init__(self) -> None:
        values = tuple(self.r) if isinstance(self.r, Sequence) and not isinstance(self.r, str) else (self.r,)
        if not values or not all(is_index(v) for v in values):
            name = type(self).__name__
            raise ConfigError(f"{name}: r={self.r!r} is not a number of tokens; give an integer of 0 or more, or one per block")
        whole = tuple(map(int, values))
        object.__setattr__(self, "r", whole if isinstance(self.r, Sequence) else whole[0])

    def stages(self, depth: int) -> tuple[int, ...]:
        if isinstance(self.r, tuple) and len(self.r) != depth:
            raise ConfigError(
                f"{type(self).__name__}: r={self.r} has {len(self.r)} entries, but the model has {depth} blocks; give one per "
                "block, or one number"
            )
        per_block = self.r if isinstance(self.r, tuple) else (0,) * self.first + (self.r,) * (depth - self.first)
        return tuple(i for i, r in enumerate(per_block) if r)

    def count(self, stage: int, n: int, n0: int) -> int:
        r = [r for r in self.r if r][stage] if isinstance(self.r, tuple) else self.r
        return n - min(r, n // 2)

    def at_strength(self, strength: float, patches: int, depth: int) -> Reducer:
        """Up to half of the patches a block; a number that is not whole becomes an even mixture of its neighbours."""
        removed = strength * patches / 2
        steps = [int(removed * i + 1e-9) for i in range(depth - self.first + 1)]
        return replace(self, r=(0,) * self.first + tuple(b - a for a, b in pairwise(steps)))

    def annealed(self, progress: float) -> Reducer:
        """By the cosine of `Staged`, from one token a block on, so that its stages stay."""
        left = still_left(progress)
        steps = [max(round(r * (1 - left)), 1) if r else 0 for r in ([self.r] if isinstance(self.r, int) else self.r)]
        return replace(self, r=steps[0] if isinstance(self.r, int) else tuple(steps))

    def constant(self) -> object:
        return replace(self, r=0)

    def setting(self) -> str:
        per_block = self.r if isinstance(self.r, tuple) else (self.r,)
        return f"r={sum(per_block) / len(per_block):.1f} a block"


def by_turns(s: Stage) -> tuple[Tensor, Tensor]:
    """Sources and destinations among the patch tokens: [A] and [D].

    A token's index counts the prefix, and even indices are sources, as in ToMe's released code. Rows by number: of a strided view
    of unknown length the compiler asks whether that is even.
    """
    places = torch.arange(s.n, device=s.tokens.device)
    first, second = (places[start::2] for start in (s.prefix % 2, 1 - s.prefix % 2))
    return first, second


def keys(s: Stage) -> Tensor:
    """The block's keys, mean over heads, of length 1: [B, N, d] float32."""
    found = s.keys()
    with ops.no_autocast(found):
        return F.normalize(found.float(), dim=-1)


def pair_off(sources: Tensor, targets: Tensor, likeness: Tensor, best: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r sources most like their target go into it: kept [B, N - r] (the other sources, then the targets), pruned [B, r], hosts.

    Shapes: patch tokens by number [1 or B, A] and [1 or B, D]; of each source how like its target is, and which that is, [B, A].
    """
    B = likeness.shape[0]
    merged, rest = ops.split(likeness, r)
    sources = sources.expand(B, -1)
    kept = torch.cat([sources.gather(1, rest), targets.expand(B, -1)], dim=1)
    return kept, sources.gather(1, merged), best.gather(1, merged) + rest.shape[1]
