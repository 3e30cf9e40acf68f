"""SAINT (Jeddi et al. 2025): tokens with many neighbours are dropped, early."""

from dataclasses import dataclass

import torch

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Spread, Stage, Staged
from squeezevit.errors import ConfigError
from squeezevit.reducers.per_block import keys


@dataclass(frozen=True)
class SAINT(Staged):
    """Between attention and MLP, tokens most like many others are dropped; at most half of a stage's tokens go, whatever the ratio.

    Every second patch token, from the first on, may go. Its neighbours are those of the others whose keys, averaged over heads,
    have a cosine of `threshold` or more with its own; n of them, of mean cosine c, score n exp(sharpness (c - threshold)), and a
    token without neighbours scores its mean cosine; the highest go.
    The authors drop as many as have 5 neighbours, on average over the batch; a budget says how many here.
    """

    keep: float | tuple[float, ...] = 0.9
    at: tuple[int, ...] | Spread | None = "every"
    threshold: float = 0.75
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("threshold", -1, 1), ("sharpness", 0, 1e3)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"SAINT: {name}={value!r} is out of range; give a number from {low:g} to {high:g}")

    def count(self, stage: int, n: int, n0: int) -> int:
        return max(super().count(stage, n, n0), n - n // 2)

    def reduce(self, s: Stage) -> Reduction:
        k = keys(s)
        places = torch.arange(s.n, device=k.device)
        sources, others = places[0::2], places[1::2]
        with ops.no_autocast(k):
            cosine = k.index_select(1, sources) @ k.index_select(1, others).transpose(1, 2)  # (B, A, D)
            near = (cosine >= self.threshold).float()
            count = near.sum(dim=-1)
            mean = (cosine * near).sum(dim=-1) / count.clamp(min=1)
            crowded = count * (self.sharpness * (mean - self.threshold)).exp()
            score = torch.where(count > 0, crowded, cosine.mean(dim=-1))
        gone, rest = ops.split(score, s.n - s.k)
        B = score.shape[0]
        kept = torch.cat([sources.expand(B, -1).gather(1, rest), others.expand(B, -1)], dim=1)
        return Reduction(s.keep(kept), kept, sources.expand(B, -1).gather(1, gone))
