"""ToMe, token merging (Bolya et al., ICLR 2023): bipartite soft matching in every block, proportional attention."""

from dataclasses import dataclass

import torch

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Stage
from squeezevit.reducers.per_block import PerBlock, by_turns, keys, pair_off


@dataclass(frozen=True)
class ToMe(PerBlock):
    """Between attention and MLP of every block, r tokens are merged into the token most like them, weighted by size.

    r: tokens removed per block, at most half of the patch tokens there; one number, or one per block.
    Tokens alternate between sources and destinations by their index, prefix included; likeness is the cosine of keys averaged over
    heads; later attention gets log(size) (section 3 of Bolya et al. 2023). Prefix tokens, registers too, are neither sources nor
    destinations (the released code merges registers with patches), and average pooling is weighted by size.
    """

    @property
    def weighs(self) -> bool:
        return True

    def reduce(self, s: Stage) -> Reduction:
        sources, targets = by_turns(s)
        likeness, best = self.matched(s, sources, targets)
        kept, pruned, hosts = pair_off(sources[None], targets[None], likeness, best, s.n - s.k)
        tokens, mass = s.merge_by_mass(s.keep(kept), s.take(pruned), kept, pruned, hosts)
        return Reduction(tokens, kept, pruned, hosts, mass=mass)

    def matched(self, s: Stage, sources: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each source how like its target is, and which that is: [B, A]."""
        k = keys(s)
        with ops.no_autocast(k):
            return ops.best_match(k.index_select(1, sources), k.index_select(1, targets))


@dataclass(frozen=True)
class MergeError(ToMe):
    """ToMe whose pairs are chosen by the error of merging them, n_i n_j / (n_i + n_j) (1 - c_ij), the least first.

    n: patches that a token stands for; c: cosine of the keys. That is how much the squared distances within a group grow
    by (Ward 1963), and theorem 1 of Lee and Choi 2025 (ATM, arXiv 2505.15160). ATM's thresholds by layer, and how it partitions
    tokens by size, are not part of it: a budget gives the counts, and the partition is ToMe's.
    """

    def matched(self, s: Stage, sources: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, size = keys(s), s.masses()[:, s.prefix :]
        with ops.no_autocast(k):
            cosine = k.index_select(1, sources) @ k.index_select(1, targets).transpose(1, 2)  # (B, A, D)
            a, b = size.index_select(1, sources)[:, :, None], size.index_select(1, targets)[:, None]
            likeness, best = ((cosine - 1) * (a * b / (a + b))).max(dim=-1)
        return likeness, best
