"""ToMe, token merging (Bolya et al., ICLR 2023): bipartite soft matching in every block, proportional attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from squeezevit.core import ops
from squeezevit.core.reducer import Reducer, Reduction, Stage, is_index, still_left
from squeezevit.errors import ConfigError


@dataclass(frozen=True)
class ToMe(Reducer):
    """Between attention and MLP of every block, r tokens are merged into the token most like them, weighted by size.

    r: tokens removed per block, at most half of the patch tokens there; one number, or one per block.
    Tokens alternate between sources and destinations by their index, prefix included; likeness is the cosine of keys averaged over
    heads; later attention gets log(size) (section 3 of Bolya et al. 2023). Prefix tokens, registers too, are neither sources nor
    destinations (the released code merges registers with patches), and average pooling is weighted by size.
    """

    r: int | tuple[int, ...] = 8

    def __post_init__(self) -> None:
        values = tuple(self.r) if isinstance(self.r, Sequence) and not isinstance(self.r, str) else (self.r,)
        if not values or not all(is_index(v) for v in values):
            raise ConfigError(f"ToMe: r={self.r!r} is not a number of tokens; give an integer of 0 or more, or one per block")
        whole = tuple(map(int, values))
        object.__setattr__(self, "r", whole if isinstance(self.r, Sequence) else whole[0])

    @property
    def carries(self) -> bool:
        return True

    @property
    def weighs(self) -> bool:
        return True

    def stages(self, depth: int) -> tuple[int, ...]:
        if isinstance(self.r, tuple) and len(self.r) != depth:
            raise ConfigError(
                f"ToMe: r={self.r} has {len(self.r)} entries, but the model has {depth} blocks; give one per block, or one number"
            )
        per_block = self.r if isinstance(self.r, tuple) else (self.r,) * depth
        return tuple(i for i, r in enumerate(per_block) if r)

    def count(self, stage: int, n: int, n0: int) -> int:
        r = [r for r in self.r if r][stage] if isinstance(self.r, tuple) else self.r
        return n - min(r, n // 2)

    def at_strength(self, strength: float, patches: int, depth: int) -> Reducer:
        """Up to half of the patches a block; a number that is not whole becomes an even mixture of its neighbours."""
        removed = strength * patches / 2
        steps = [int(removed * i + 1e-9) for i in range(depth + 1)]
        return ToMe(r=tuple(b - a for a, b in pairwise(steps)))

    def annealed(self, progress: float) -> Reducer:
        """By the cosine of `Staged`, from one token a block on, so that its stages stay."""
        left = still_left(progress)
        steps = [max(round(r * (1 - left)), 1) if r else 0 for r in ([self.r] if isinstance(self.r, int) else self.r)]
        return ToMe(r=steps[0] if isinstance(self.r, int) else tuple(steps))

    def setting(self) -> str:
        per_block = self.r if isinstance(self.r, tuple) else (self.r,)
        return f"r={sum(per_block) / len(per_block):.1f} a block"

    def reduce(self, s: Stage) -> Reduction:
        keys = s.keys()
        with ops.no_autocast(keys):
            keys = F.normalize(keys.float(), dim=-1)
            # a token's index counts the prefix, and even indices are sources, as in the released code
            # rows by number: of a strided view of unknown length the compiler asks whether that is even
            places = torch.arange(s.n, device=keys.device)
            even, odd = (places[first::2] for first in (s.prefix % 2, 1 - s.prefix % 2))
            sources, targets = keys.index_select(1, even), keys.index_select(1, odd)
            likeness, best = ops.best_match(sources, targets)  # (B, sources)
        merged, rest = ops.split(likeness, s.n - s.k)
        target = torch.arange(targets.shape[1], device=keys.device).expand(keys.shape[0], -1)
        kept = torch.cat([rest * 2 + s.prefix % 2, target * 2 + 1 - s.prefix % 2], dim=1)
        pruned = merged * 2 + s.prefix % 2
        hosts = best.gather(1, merged) + rest.shape[1]
        tokens, mass = s.merge_by_mass(s.keep(kept), s.take(pruned), kept, pruned, hosts)
        return Reduction(tokens, kept, pruned, hosts, mass=mass)
