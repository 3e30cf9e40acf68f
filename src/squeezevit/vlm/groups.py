"""Which of an image's features stay, and what becomes of the others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import EPS, is_index
from squeezevit.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Groups:
    """What happens to N features: K stay, and each of the other R goes into one that stays, or nowhere."""

    kept: Tensor  # [K], ascending
    pruned: Tensor  # [R], ascending
    hosts: Tensor | None  # [R], positions among the kept; None where the pruned are dropped
    cosine: Tensor  # [R] float32, of a pruned feature with its host; empty where they are dropped

    @property
    def n(self) -> int:
        return len(self.kept) + len(self.pruned)

    @property
    def destinations(self) -> Tensor:
        """For each of the N the kept one it ended in, -1 where it was dropped: [N] int64."""
        out = self.kept.new_full((self.n,), -1)
        out[self.kept] = torch.arange(len(self.kept), device=out.device)
        if self.hosts is not None:
            out[self.pruned] = self.hosts
        return out

    def apply(self, x: Tensor) -> Tensor:
        """Do to any features of the same tokens what was decided: [N, D] -> [K, D] (eq. 4, Wei et al. 2023)."""
        if not len(self.pruned):
            return x
        reserved = ops.take(x[None], self.kept[None])
        if self.hosts is None:
            return reserved[0]
        own, weights = ops.squeeze_weights(reserved, self.cosine[None])
        return ops.fuse(reserved, ops.take(x[None], self.pruned[None]), self.hosts[None], own, weights)[0]


@dataclass(frozen=True)
class Budget:
    """How many of an image's features stay: a share of them, or a number. Separators stay besides."""

    keep: float | None
    tokens: int | None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.tokens is None):
            raise ConfigError(f"keep={self.keep!r} and tokens={self.tokens!r}: give one of them, as keep=0.5 or tokens=64")
        if self.tokens is not None and not (is_index(self.tokens) and self.tokens > 0):
            raise ConfigError(f"tokens={self.tokens!r} is not a number of tokens an image; give a whole number of 1 or more")
        if self.keep is not None and not _is_share(self.keep):
            raise ConfigError(
                f"keep={self.keep!r} is not a share of an image's tokens; give a number above 0 and at most 1, as 0.5"
            )

    def count(self, n: int) -> int:
        """How many of n stay: ceil(keep * n), or `tokens` where there are so many."""
        return min(n, self.tokens) if self.tokens is not None else min(n, math.ceil((self.keep or 0) * n - EPS))


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def even(x: Tensor, marks: Tensor, columns: int | None) -> Tensor:
    """Numbers of which the k highest lie evenly over an image, for every k, twins last: [N, C] -> [N] float32.

    marks: [N] bool, separators, which lie outside of the image's lines. columns: how many features a line has, None where nothing
    tells; they are then taken evenly along their order. In rows and columns it is Roberts' R2 dither mask (2018), the fractions of
    row / g + column / g^2 with g = 1.3247, the real root of g^3 = g + 1; along a line those of multiples of the golden ratio. A
    feature that is the same as one before it in this order is lowered by 1, so that nothing stays twice.
    """
    index = (~marks).cumsum(dim=0).double() - 1
    if columns is None:
        place = index * _GOLDEN
    else:
        place = torch.div(index, columns, rounding_mode="floor") / _PLASTIC + (index % columns) / _PLASTIC**2
    order = 1 - (place % 1).float()
    twins = ops.uniqueness(x[None], order[None])[0] < _SAME
    return order - twins.float()


_GOLDEN, _PLASTIC = 0.6180339887498949, 1.324717957244746
_SAME = 1e-5  # 1 - cosine


def redundancy(x: Tensor) -> Tensor:
    """How little of each feature others already say: [N, C] -> [N] float32, 2 for the one that says most.

    1 - the highest cosine with a feature that is more unlike the mean feature, so that what leaves has a twin that is told apart
    more easily. No attention is asked for.
    """
    with ops.no_autocast(x):
        x = ops.wide(x)[None]
        mean = x.mean(dim=1, keepdim=True)
        return ops.uniqueness(x, 1 - torch.cosine_similarity(x, mean, dim=-1))[0]


def group(x: Tensor, k: int, scores: Tensor, separators: Tensor, fuse: bool) -> Groups:
    """The k highest scores stay, and each other feature goes into the one of them most like it.

    Shapes: x [N, C], scores [N], separators [N] bool. Separators stay besides, and take nothing in.
    """
    free = (~separators).nonzero()[:, 0]
    chosen, others = (free[index[0]] for index in ops.split(scores[free][None].float(), k))
    kept = torch.cat([chosen, separators.nonzero()[:, 0]]).sort().values
    if not fuse:
        return Groups(kept, others, None, x.new_empty(0, dtype=torch.float32))
    if not len(others):
        return Groups(kept, others, others, x.new_empty(0, dtype=torch.float32))
    hosts, cosine = ops.match(ops.take(x[None], chosen[None]), ops.take(x[None], others[None]))
    return Groups(kept, others, torch.searchsorted(kept, chosen[hosts[0]]), cosine[0])


def join(parts: Sequence[Groups]) -> Groups:
    """Of features that lie one after another, each part with groups of its own."""
    if len(parts) == 1:
        return parts[0]
    first = [sum(part.n for part in parts[:i]) for i in range(len(parts))]
    before = [sum(len(part.kept) for part in parts[:i]) for i in range(len(parts))]
    hosts = [part.hosts + b for part, b in zip(parts, before, strict=True) if part.hosts is not None]
    return Groups(
        torch.cat([part.kept + f for part, f in zip(parts, first, strict=True)]),
        torch.cat([part.pruned + f for part, f in zip(parts, first, strict=True)]),
        torch.cat(hosts) if len(hosts) == len(parts) else None,
        torch.cat([part.cosine for part in parts]),
    )
