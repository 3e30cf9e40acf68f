"""MCTF, multi-criteria token fusion (Lee et al., CVPR 2024): similarity, informativeness and size decide who is fused."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import Place, Reduction, Stage
from squeezevit.errors import ConfigError
from squeezevit.reducers.per_block import PerBlock, by_turns


@dataclass(frozen=True)
class MCTF(PerBlock):
    """Before the attention of every block but the first, r tokens are fused, by the attention they are about to get.

    r: tokens removed per block, at most half of the patch tokens there; one number, or one per block.
    temperatures: of similarity (c + 1) / 2, of informativeness 1 / (a_i a_j), a the attention a token receives, and of size
    1 / (n_i n_j); W is the product of each to the power 1 / temperature. Tokens alternate between two sets; half of r goes from the
    first into the second, the other half from the second into what is left of the first; means are weighted by a n (eq. 3 to 8
    of Lee et al. 2024). Later attention gets log(size).
    One step ahead is exact here: the block attends to the fused tokens, where the paper aggregates the attention it has. Its
    consistency loss is not part of it; fine-tuning is plain.
    """

    first: ClassVar[int] = 1
    place: ClassVar[Place] = "before"

    r: int | tuple[int, ...] = 16
    temperatures: tuple[float, float, float] = (1.0, 20.0, 40.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.temperatures
        numbers = isinstance(values, tuple | list) and len(values) == 3
        if not numbers or not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in values):
            raise ConfigError(
                f"MCTF: temperatures={values!r} are not three numbers above 0; give those of similarity, informativeness and size, "
                "as (1.0, 20.0, 40.0)"
            )
        object.__setattr__(self, "temperatures", tuple(map(float, values)))

    @property
    def weighs(self) -> bool:
        return True

    def reduce(self, s: Stage) -> Reduction:
        size, (first, second) = s.masses()[:, s.prefix :], by_turns(s)
        received = _received(s).clamp(min=1e-12)
        x, worth = self._parts(s, received, size)
        kept, pruned, hosts = _both_ways(x, worth, 1 / self.temperatures[0], first, second, s.n - s.k)
        tokens = s.merge(kept, pruned, hosts, received * size)
        own, more = s.masses().gather(1, s.rows(kept)), size.gather(1, pruned)
        return Reduction(tokens, kept, pruned, hosts, received, own.scatter_add(1, hosts + s.prefix, more))

    def _parts(self, s: Stage, received: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of length 1, and what W has of each of the two alone: [B, N, C], [B, N]."""
        _, inform, sizes = self.temperatures
        x = ops.wide(s.tokens[:, s.prefix :])
        return F.normalize(x, dim=-1).float(), received ** (-1 / inform) * size ** (-1 / sizes)


def _received(s: Stage) -> Tensor:
    """Attention that patch tokens receive, mean over heads and queries: [B, N] float32, without gradient."""
    with torch.no_grad():
        a = s.attend()
        row = ops.received_attention(a.query(None), a.key(), ops.summed(a.pairs, s.carry.bias))
    return row[:, s.prefix :]


def _both_ways(x: Tensor, worth: Tensor, power: float, first: Tensor, second: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """r // 2 tokens of the first set go into the second, then the others of r from the second into the rest of the first.

    What went into a token that goes on goes on with it. Kept are the rest of the first set, then that of the second.
    """
    with torch.no_grad(), ops.no_autocast(x):
        a, b = x.index_select(1, first), x.index_select(1, second)
        similar = ((a @ b.transpose(1, 2) + 1) / 2).clamp(min=0) ** power
        weight = similar * worth.index_select(1, first)[:, :, None] * worth.index_select(1, second)[:, None]  # (B, A, D)
        forth, to = weight.max(dim=-1)
        gone, rest = ops.split(forth, r // 2)  # numbers within the first set
        back, home = weight.gather(1, rest[:, :, None].expand(-1, -1, weight.shape[2])).max(dim=1)  # home: which of the rest
        gone_b, rest_b = ops.split(back, r - r // 2)
    behind = torch.arange(rest_b.shape[1], device=x.device) + rest.shape[1]
    place = home.scatter(1, rest_b, behind.expand_as(rest_b))  # of each of the second set, or where it went: (B, D)
    first, second = first.expand(x.shape[0], -1), second.expand(x.shape[0], -1)
    kept = torch.cat([first.gather(1, rest), second.gather(1, rest_b)], dim=1)
    pruned = torch.cat([first.gather(1, gone), second.gather(1, gone_b)], dim=1)
    return kept, pruned, torch.cat([place.gather(1, to.gather(1, gone)), home.gather(1, gone_b)], dim=1)
