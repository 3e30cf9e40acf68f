"""ToFu, token fusion (Kim et al., WACV 2024): the pairs of ToMe, pruned in early blocks and merged at their norm in late ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Stage
from squeezevit.reducers.per_block import PerBlock, by_turns, keys, pair_off


@dataclass(frozen=True)
class ToFu(PerBlock):
    """Between attention and MLP of every block, r tokens go: dropped up to the middle block, merged by MLERP after it.

    r: tokens removed per block, at most half of the patch tokens there; one number, or one per block.
    Pairs are ToMe's. MLERP: the plain mean of a token and those it hosts, at the largest norm among them (section 3.3 of Kim et al.
    2024). Tokens have no sizes. The authors' code is not public; public copies prune up to block depth / 2, as here, and divide
    by the destination's norm where the paper divides by the mean's, as here.
    """

    def reduce(self, s: Stage) -> Reduction:
        k, (sources, targets) = keys(s), by_turns(s)
        with ops.no_autocast(k):
            likeness, best = ops.best_match(k.index_select(1, sources), k.index_select(1, targets))
        kept, pruned, hosts = pair_off(sources[None], targets[None], likeness, best, s.n - s.k)
        if s.block <= s.depth // 2:
            return Reduction(s.keep(kept), kept, pruned)
        return Reduction(_at_largest_norm(s, kept, pruned, hosts), kept, pruned, hosts)


def _at_largest_norm(s: Stage, kept: Tensor, pruned: Tensor, hosts: Tensor) -> Tensor:
    """[B, P + K, C]; a token that hosts nobody is returned unchanged."""
    mean = s.merge(kept, pruned, hosts)
    norms = ops.length(s.tokens)  # (B, P + N)
    rows = torch.arange(mean.shape[1], device=hosts.device)
    hot = rows[:, None] == hosts[:, None] + s.prefix  # (B, P + K, R)
    guests = torch.where(hot, norms.gather(1, pruned + s.prefix)[:, None], torch.zeros_like(norms[:, :1, None])).amax(dim=-1)
    largest = torch.maximum(norms.gather(1, s.rows(kept)), guests)
    factor = torch.where(hot.any(dim=-1), largest / ops.length(mean), torch.ones_like(largest))
    return (ops.wide(mean) * factor[..., None]).to(mean.dtype)
