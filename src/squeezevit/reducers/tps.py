"""TPS, joint Token Pruning and Squeezing (Wei et al., CVPR 2023), in both variants."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezevit import ops
from squeezevit.errors import ConfigError
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

    train: what `model.train()` does. "masked", the paper's: all tokens stay, Gumbel-softmax samples which are kept, the others
    are squeezed and hidden from later attention; counts follow a loss (`losses.keep_ratio_loss`). "topk", faster: tokens really
    leave, as many as in evaluation, chosen by the same noisy scores; the heads learn by a straight-through gradient, of the kept
    tokens' attention and of the pruned tokens' fuse weights.
    """

    train: Literal["masked", "topk"] = "masked"

    place: ClassVar[Literal["before", "between"]] = "before"
    learned: ClassVar[bool] = True
    scored: ClassVar[bool] = False
    squeezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in ("masked", "topk"):
            raise ConfigError(f"{type(self).__name__}: train={self.train!r} is not known; choose 'masked' or 'topk'")

    @property
    def carries(self) -> bool:
        return True

    @property
    def masks(self) -> bool:
        return self.train == "masked"

    def count(self, stage: int, n: int, n0: int) -> int:
        return floor_of_first(self, stage, n, n0)

    def reduce(self, s: Stage) -> Reduction:
        logits = s.head_logits()
        if s.training:
            return self.reduce_masked(s, logits) if self.masks else self.reduce_relaxed(s, logits)
        scores = log_odds(logits)
        kept, pruned = ops.split(scores, s.k)
        tokens, hosts = self.remove(s, kept, pruned)
        return Reduction(tokens, kept, pruned, hosts, scores)

    def reduce_masked(self, s: Stage, logits: Tensor) -> Reduction:
        """All tokens go on; what this stage prunes is squeezed where `squeezes`, and hidden by the policy."""
        before = s.kept_so_far()
        decision = ops.decide(logits, before)
        tokens = s.tokens
        if self.squeezes:
            pruned = (1 - decision) * (1 if before is None else before)
            patches = ops.squeeze_masked(tokens[:, s.prefix :], decision, pruned)
            tokens = torch.cat([tokens[:, : s.prefix], patches], dim=1)
        policy = F.pad(decision, (s.prefix, 0), value=1.0)
        everything = torch.arange(s.n, device=tokens.device).expand(tokens.shape[0], -1)
        nobody = everything[:, :0]
        return Reduction(tokens, everything, nobody, nobody, log_odds(logits), logits=logits, decision=decision, policy=policy)

    def reduce_relaxed(self, s: Stage, logits: Tensor) -> Reduction:
        """The K tokens with the highest sampled log-odds stay; their indicator has the gradient of a sigmoid around the cut."""
        sample = log_odds(F.gumbel_softmax(logits).clamp(min=1e-9).log())
        kept, pruned = ops.split(sample.detach(), s.k)
        cut = (sample.gather(1, kept).amin(dim=1) + sample.gather(1, pruned).amax(dim=1)).detach() / 2
        soft = (sample - cut[:, None]).sigmoid()
        hard = torch.zeros_like(soft).scatter(1, kept, 1.0)
        decision = hard - soft.detach() + soft
        tokens, hosts = self.remove(s, kept, pruned, share=1 - decision.gather(1, pruned))
        before = s.kept_so_far()
        decision = decision if before is None else decision * before
        policy = F.pad(decision.gather(1, kept), (s.prefix, 0), value=1.0)
        return Reduction(tokens, kept, pruned, hosts, log_odds(logits), logits=logits, decision=decision, policy=policy)

    def remove(self, s: Stage, kept: Tensor, pruned: Tensor, share: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, P + K, C] without the pruned ones, and the hosts [B, R] of these, None where they are discarded."""
        if not self.squeezes:
            return s.keep(kept), None
        tokens, hosts, _ = s.squeeze(kept, pruned, share=share)
        return tokens, hosts


def log_odds(logits: Tensor) -> Tensor:
    """Of keeping: [B, N, 2] -> [B, N]. Ordered as the probability, which would round to 1 where heads are sure."""
    return logits[..., 0] - logits[..., 1]
