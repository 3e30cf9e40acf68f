"""PiToMe (Tran et al., NeurIPS 2024): an energy tells crowded tokens, which merge, from isolated ones, which are protected."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Spread, Stage, Staged, check_choice
from squeezevit.errors import ConfigError
from squeezevit.reducers.per_block import keys, pair_off


@dataclass(frozen=True)
class PiToMe(Staged):
    """Between attention and MLP of every block, crowded tokens are merged into the one most like them, weighted by size.

    A token's energy is the mean of ELU(c - m) over its cosines c with all patch tokens, by keys averaged over heads, where the
    margin is m = margin (1 - block / depth). Tokens in order of energy, the highest first, are sources and destinations by turns.
    protect: "always", only the first 2 r take part, and all r sources among them merge (algorithm 1 of Tran et al. 2024); "late",
    as the authors' code: in the first half of the blocks all tokens take part, and the r sources most like their destination merge.
    keep: at most half of a stage's tokens go, whatever the ratio. Later attention gets log(size), as in the paper (the code for
    ImageNet leaves it out). margin: the paper's; the code has 0.75 for ImageNet. ELU is the code's; eq. 4 has c itself above m.
    """

    keep: float | tuple[float, ...] = 0.925
    at: tuple[int, ...] | Spread | None = "every"
    margin: float = 0.9
    protect: Literal["late", "always"] = "late"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "protect", ("late", "always"))
        if isinstance(self.margin, bool) or not isinstance(self.margin, int | float) or not -1 <= self.margin <= 1:
            raise ConfigError(f"PiToMe: margin={self.margin!r} is no cosine; give a number from -1 to 1, as 0.9")

    @property
    def weighs(self) -> bool:
        return True

    def count(self, stage: int, n: int, n0: int) -> int:
        return max(super().count(stage, n, n0), n - n // 2)

    def reduce(self, s: Stage) -> Reduction:
        k, r = keys(s), s.n - s.k
        with ops.no_autocast(k):
            energy = self._energy(k, self.margin * (1 - s.block / s.depth))
            order = energy.topk(s.n, dim=1).indices
            bipartite = self.protect == "late" and 2 * s.block < s.depth
            taking_part = s.n if bipartite else 2 * r
            turns = torch.arange(taking_part, device=k.device)
            sources, targets = order.index_select(1, turns[::2]), order.index_select(1, turns[1::2])
            likeness, best = ops.best_match(ops.take(k, sources), ops.take(k, targets))
        kept, pruned, hosts = pair_off(sources, targets, likeness, best, r)
        if not bipartite:
            kept, hosts = _with_protected(order[:, taking_part:], kept, hosts)
        tokens, mass = s.merge_by_mass(s.keep(kept), s.take(pruned), kept, pruned, hosts)
        return Reduction(tokens, kept, pruned, hosts, energy, mass)

    @staticmethod
    def _energy(k: Tensor, margin: float) -> Tensor:
        return F.elu(k @ k.transpose(1, 2) - margin).mean(dim=-1)


def _with_protected(protected: Tensor, kept: Tensor, hosts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that took no part go out first."""
    return torch.cat([protected, kept], dim=1), hosts + protected.shape[1]
