"""TPS, joint Token Pruning and Squeezing (Wei et al., CVPR 2023), in both variants."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from squeezevit import ops
from squeezevit.reducer import Reduction, Score, Stage, Staged, check_flag, check_score, floor_of_first


@dataclass(frozen=True)
class ETPS(Staged):
    """eTPS: between attention and MLP of a block, tokens with little class attention are squeezed into the others.

    score: "cls" (attention of the class token), "received" (mean attention a token receives), "auto" (the first where the
    model has a class token, else the second; the paper knows class tokens only).
    mass: beyond the paper, tokens remember how many patches they stand for: fused by mass, with log(mass) as a bias of later
    attention and mass-weighted average pooling.
    K_j = ceil(keep * K_{j-1}); section 3.3 of Wei et al. 2023. Raises ConfigError on values that cannot be meant.

    >>> ETPS(keep=0.5, at=(3, 6, 9)).count(0, 196, 196)
    98
    """

    score: Score = "auto"
    mass: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self)
        check_flag(self, "mass")

    @property
    def carries(self) -> bool:
        return self.mass

    @property
    def weighs(self) -> bool:
        return self.mass

    def reduce(self, s: Stage) -> Reduction:
        scores = s.scores(self.score)
        kept, pruned = ops.split(scores, s.k)
        tokens, hosts, mass = s.squeeze(kept, pruned, by_mass=self.mass)
        return Reduction(tokens, kept, pruned, hosts, scores, mass)


@dataclass(frozen=True)
class DTPS(Staged):
    """dTPS: before a block, tokens that a small learned head wants dropped are squeezed into the others.

    K_j = floor(N * keep^j), at least 1; section 3.3 of Wei et al. 2023. The heads live at `model.token_reducer`; untrained heads
    rank tokens at random, so train them or load them with `load_checkpoint_`.
    """

    place: ClassVar[Literal["before", "between"]] = "before"
    learned: ClassVar[bool] = True
    scored: ClassVar[bool] = False

    @property
    def carries(self) -> bool:
        return True

    def count(self, stage: int, n: int, n0: int) -> int:
        return floor_of_first(self, stage, n, n0)

    def head_scores(self, s: Stage) -> torch.Tensor:
        """Log-odds of keeping each patch token, [B, N]: ordered as the probability, which would round to 1 where heads are sure."""
        assert s.head is not None
        keep, drop = s.head(s.tokens[:, s.prefix :]).float().unbind(dim=-1)
        return keep - drop

    def reduce(self, s: Stage) -> Reduction:
        scores = self.head_scores(s)
        kept, pruned = ops.split(scores, s.k)
        tokens, hosts, _ = s.squeeze(kept, pruned)
        return Reduction(tokens, kept, pruned, hosts, scores)
