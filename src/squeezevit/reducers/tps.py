"""TPS, joint Token Pruning and Squeezing (Wei et al., CVPR 2023), in both variants."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezevit import ops
from squeezevit.errors import ConfigError
from squeezevit.reducer import Reduction, Score, Stage, Staged, check_flag, check_score, floor_of_first, nothing_pruned


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
    leave, as many as in evaluation, chosen by the same noisy scores, once the attention behind the stage has told the heads, by a
    straight-through gradient, what each token was worth.
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
        scores = ops.log_odds(logits)
        kept, pruned = ops.split(scores, s.k)
        if not self.squeezes:
            return Reduction(s.keep(kept), kept, pruned, scores=scores)
        tokens, hosts, _ = s.squeeze(kept, pruned)
        return Reduction(tokens, kept, pruned, hosts, scores)

    def reduce_masked(self, s: Stage, logits: Tensor) -> Reduction:
        """All tokens go on; what this stage prunes is squeezed where `squeezes`, and hidden by the policy."""
        before = s.kept_so_far()
        decision = ops.decide(logits, before)
        tokens, _ = self.squeeze_in_place(s, decision, (1 - decision) * (1 if before is None else before))
        policy = F.pad(decision, (s.prefix, 0), value=1.0)
        scores = ops.log_odds(logits)
        return nothing_pruned(tokens, s.n)._replace(scores=scores, logits=logits, decision=decision, policy=policy)

    def reduce_relaxed(self, s: Stage, logits: Tensor) -> Reduction:
        """The K tokens with the highest sampled log-odds stay; their indicator has the gradient of a sigmoid around the cut.

        The others are squeezed, hidden from this block's attention by the policy, and leave behind it: so far they are there for
        the gradient to say what keeping them would have done. (Without that the heads learn to drop what matters: whenever it is
        gone, the tokens that are there get the large gradients.)
        """
        sample = ops.log_odds(F.gumbel_softmax(logits).clamp(min=1e-9).log())
        kept, pruned = ops.split(sample.detach(), s.k)
        cut = (sample.gather(1, kept).amin(dim=1) + sample.gather(1, pruned).amax(dim=1)).detach() / 2
        soft = (sample - cut[:, None]).sigmoid()
        decision = torch.zeros_like(soft).scatter(1, kept, 1.0) - soft.detach() + soft
        tokens, hosts = self.squeeze_in_place(s, decision, 1 - decision)
        if hosts is not None:  # as positions among the kept
            places = torch.zeros_like(hosts).scatter(1, kept, torch.arange(s.k, device=kept.device).expand_as(kept))
            hosts = places.gather(1, hosts.gather(1, pruned))
        policy = F.pad(decision, (s.prefix, 0), value=1.0)
        return Reduction(
            tokens, kept, pruned, hosts, ops.log_odds(logits), logits=logits, decision=decision, policy=policy, leaving=s.rows(kept)
        )

    def squeeze_in_place(self, s: Stage, kept: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor | None]:
        """All tokens, with the pruned ones squeezed into the kept, and each one's host [B, N]; indicators [B, N] of both."""
        if not self.squeezes:
            return s.tokens, None
        patches, hosts = ops.squeeze_masked(s.tokens[:, s.prefix :], kept, pruned)
        return torch.cat([s.tokens[:, : s.prefix], patches], dim=1), hosts
