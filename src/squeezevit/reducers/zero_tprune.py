"""Zero-TPrune (Wang et al., CVPR 2024): attention ranks tokens as PageRank ranks pages; twins go before the unimportant."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Stage, Staged
from squeezevit.errors import ConfigError
from squeezevit.reducers.per_block import keys


@dataclass(frozen=True)
class ZeroTPrune(Staged):
    """Between attention and MLP, tokens are dropped in two stages: the most similar ones, then the least important ones.

    Importance: s <- A^T s in each head, from a start where the class token has sqrt(T) times what others have; heads by the root of
    the mean of squares. First one vote ranks the tokens; of the lower half those go whose keys, averaged over heads, are most like
    one of the upper half; then 30 votes in the first quarter of the blocks, 5 in the middle and 1 in the last, in which the gone
    have no part, say who goes besides (section 3 of Wang et al. 2024).
    similar: the share of a stage's removed tokens that go for their likeness. The paper searches it, and the keep ratios, for each
    model; 0.25 is a choice of ours.
    The paper also leaves heads out whose scores vary too little or too much, by thresholds of a variance whose scale the public
    material does not settle; that filter is not part of this.
    """

    similar: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.similar, bool) or not isinstance(self.similar, int | float) or not 0 <= self.similar <= 1:
            raise ConfigError(f"ZeroTPrune: similar={self.similar!r} is not a share of the removed tokens; give 0 to 1, as 0.25")

    def twins(self, n: int, k: int) -> int:
        """How many of the n - k removed go for their likeness: at most the lower half, and one stays to be voted on."""
        return min(round(self.similar * (n - k)), n - n // 2, n - 1)

    def reduce(self, s: Stage) -> Reduction:
        with torch.no_grad():
            graph, k = _attention(s), keys(s)
            start = _start(s, graph)
            gone = _twins(s, _importance(graph, start, 1)[:, s.prefix :], k, self.twins(s.n, s.k))
            here = torch.ones_like(start).scatter(1, gone + s.prefix, 0.0)
            scores = _importance(graph, start, _votes(s), here)[:, s.prefix :].scatter(1, gone, -1.0)
        kept, pruned = ops.split(scores, s.k)
        return Reduction(s.keep(kept), kept, pruned, scores=scores)


def _attention(s: Stage) -> Tensor:
    """[B, H, T, T] float32."""
    a = s.attend()
    bias = ops.summed(a.pairs, s.carry.bias)
    query, key = a.query(None), a.key()
    with ops.no_autocast(query):
        logits = query.float() @ key.float().transpose(2, 3)
        return (logits if bias is None else logits + bias.float()).softmax(dim=-1)


def _start(s: Stage, graph: Tensor) -> Tensor:
    """[B, T]; the same for all heads."""
    B, _, T, _ = graph.shape
    start = torch.ones(B, T, dtype=graph.dtype, device=graph.device)
    if s.class_token:
        start[:, 0] = math.sqrt(T)
    return start / start.sum(dim=1, keepdim=True)


def _importance(graph: Tensor, start: Tensor, votes: int, here: Tensor | None = None) -> Tensor:
    """What tokens have after so many votes, in which those with here = 0 have no part: [B, T]."""
    score = (start if here is None else start * here)[:, None, None]  # (B, 1, 1, T)
    with ops.no_autocast(graph):
        for _ in range(votes):
            score = score @ graph  # (B, H, 1, T)
            score = score if here is None else score * here[:, None, None]
    return score.square().mean(dim=1)[:, 0].sqrt()


def _twins(s: Stage, importance: Tensor, k: Tensor, count: int) -> Tensor:
    """The `count` tokens of the lower half that are most like one of the upper half: [B, count]."""
    upper, lower = ops.split(importance, s.n // 2)
    if not count or not s.n // 2:
        return lower[:, :0]
    with ops.no_autocast(k):
        likeness, _ = ops.best_match(ops.take(k, lower), ops.take(k, upper))
    return lower.gather(1, ops.split(likeness, count)[0])


def _votes(s: Stage) -> int:
    """30 to 50, 5 to 10 and 1 in the first three, the middle and the last three of 12 blocks converge, says the paper."""
    way = s.block / s.depth
    return 30 if way < 0.25 else 5 if way < 0.75 else 1
