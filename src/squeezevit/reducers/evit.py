"""EViT (Liang et al., ICLR 2022): inattentive tokens fused into one extra token."""

from dataclasses import dataclass
from typing import get_args

import torch

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Score, Scored, Stage, check_choice, check_flag


@dataclass(frozen=True)
class EViT(Scored):
    """Between attention and MLP, tokens with little class attention become one token, their sum weighted by that attention.

    The extra token goes out last and is an ordinary one at the next stage: it counts in K = ceil(keep * tokens) and may itself be
    pruned. Only patch columns are scored (the released code also prunes distillation tokens). In models with rotary embeddings it
    stands at the place of the pruned token with the most attention.
    normalize: divide the sum by the sum of its weights, so that the extra token has a token's scale. The paper (eq. 5) and its
    code do not, and fine-tuning absorbs it; without training it costs accuracy.
    score: as for ETPS; the paper knows class tokens only.
    """

    score: Score = "auto"
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "score", get_args(Score))
        check_flag(self, "normalize")

    def reduce(self, s: Stage) -> Reduction:
        scores = s.scores(self.score)
        kept, pruned = ops.split(scores, s.k)
        weights = scores.gather(1, pruned)
        if self.normalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        gone = s.take(pruned)
        with ops.no_autocast(gone):
            extra = (weights[:, None] @ gone.float()).to(gone.dtype)  # (B, 1, C)
        hosts = torch.full_like(pruned, s.k)
        heaviest = pruned.gather(1, weights.argmax(dim=1, keepdim=True))
        return Reduction(torch.cat([s.keep(kept), extra], dim=1), kept, pruned, hosts, scores, extra=heaviest)
