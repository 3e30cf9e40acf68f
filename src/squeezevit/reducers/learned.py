"""dTPS (Wei et al., CVPR 2023) and DynamicViT (Rao et al., NeurIPS 2021): score heads with the authors' parameter names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.core import ops
from squeezevit.core.evidence import is_plain
from squeezevit.core.reducer import Heads, Place, Reduction, Stage, Staged, check_choice, check_flag, floor_of_first, nothing_pruned


class ScoreHead(nn.Module):
    """Keep / drop log-probabilities from a token and the mean of the others: [B, N, C] -> [B, N, 2], class 0 = keep.

    keep: the probability a fresh head begins with, so that masked training begins at the ratio it aims at (the authors' begin
    at one half whatever the ratio); ranks do not depend on it.
    """

    def __init__(self, dim: int, keep: float = 0.5) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        last = nn.Linear(dim // 4, 2)
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            last,
            nn.LogSoftmax(dim=-1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        odds = math.log(keep / (1 - keep)) if keep < 0.99 else 5.0
        nn.init.constant_(last.bias[:1], odds / 2)
        nn.init.constant_(last.bias[1:], -odds / 2)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """kept [B, N]: 1 for tokens that count in the mean, 0 for those dropped at an earlier stage; None = all count.

        The mean's part of the next projection is the same for all tokens of an image and computed once, which leaves out a sixth of
        the head's multiply-adds. `sv.macs`, which runs it without values, counts the head as the papers write it.
        """
        local, shared = self.in_conv(x).split(x.shape[-1] // 2, dim=-1)
        if kept is not None:
            shared = shared * (kept * (x.shape[1] / kept.sum(dim=1, keepdim=True)))[..., None].to(shared.dtype)
        shared = shared.mean(dim=1, keepdim=True)  # (B, 1, C/2)
        first, *rest = cast(Any, self.out_conv)
        if x.is_meta or not is_plain(first) or self.out_conv._forward_hooks or self.out_conv._forward_pre_hooks:
            return self.out_conv(torch.cat([local, shared.expand_as(local)], dim=-1))
        weight = first.weight.split(local.shape[-1], dim=1)
        y = F.linear(local, weight[0]) + F.linear(shared, weight[1], first.bias)  # (B, N, C/2)
        for module in rest:
            y = module(y)
        return y


class ScoreHeads(Heads):
    """A `ScoreHead` for each stage, which begins with the probability `keep[stage]` (Rao et al. 2021, eq. 1 to 4)."""

    def __init__(self, keep: Sequence[float], dim: int) -> None:
        super().__init__(ScoreHead(dim, ratio) for ratio in keep)


@dataclass(frozen=True)
class DTPS(Staged):
    """dTPS: before a block, tokens that a small learned head wants dropped are squeezed into the others.

    K_j = floor(N * keep^j), at least 1; section 3.3 of Wei et al. 2023. The heads live at `model.token_reducer`; untrained heads
    rank tokens at random, so train them or load them with `load_checkpoint_`.

    train: what `model.train()` does. "masked", the paper's: all tokens stay, Gumbel-softmax samples which are kept, the others
    are squeezed and hidden from later attention; counts follow a loss (`losses.keep_ratio_loss`). "topk", faster: tokens really
    leave, as many as in evaluation, chosen by the same noisy scores. They leave after the stage's attention, whose straight-through
    gradient tells the heads what each token was worth.
    detach: in training, no gradient goes through the heads into the backbone, which then learns from what is done with its tokens
    alone. The authors let it through; where heads are sure already, as warmed ones are, it can be most of the backbone's gradient.
    """

    train: Literal["masked", "topk"] = "masked"
    detach: bool = False

    place: ClassVar[Place] = "before"
    learned: ClassVar[bool] = True
    scored: ClassVar[bool] = False
    squeezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "train", ("masked", "topk"))
        check_flag(self, "detach")

    @property
    def carries(self) -> bool:
        return True

    @property
    def masks(self) -> bool:
        return self.train == "masked"

    def count(self, stage: int, n: int, n0: int) -> int:
        return floor_of_first(self, stage, n, n0)

    def heads(self, stages: int, dim: int) -> Heads:
        return ScoreHeads([self.ratio(j) for j in range(stages)], dim)

    def reduce(self, s: Stage) -> Reduction:
        logits = s.head_logits(detach=self.detach and s.training)
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

        The others are squeezed, hidden from this block's attention by the policy, and leave after it: so far they are there for
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


@dataclass(frozen=True)
class DynamicViT(DTPS):
    """Before a block, tokens that a small learned head wants dropped are discarded; K_j = floor(N * keep^j), at least 1.

    Trained as `DTPS`, by the same two ways.
    """

    squeezes: ClassVar[bool] = False
