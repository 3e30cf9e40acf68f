"""VisionZip (Yang et al., CVPR 2025) and PruMerge (Shang et al., ICCV 2025), which choose a tower's tokens for a language model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Stage, Staged, is_index
from squeezevit.errors import ConfigError
from squeezevit.reducers.per_block import keys


@dataclass(frozen=True)
class VisionZip(Staged):
    """Between attention and MLP, tokens with much class attention stay, and the others are merged into a few evenly spaced ones.

    contextual: the share of the kept tokens that are such targets; each of the rest goes into the target whose key, averaged over
    heads, is most like its own, by plain means (section 3 of Yang et al. 2025). Without a class token: attention received.
    The paper has one stage, at the last block but one: at=(depth - 2,). The authors' code adds the mean of what a target hosts to
    the target itself, at twice a token's scale; here, as in the paper's words, they are averaged.
    """

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.contextual, bool) or not isinstance(self.contextual, int | float) or not 0 <= self.contextual <= 1:
            raise ConfigError(f"VisionZip: contextual={self.contextual!r} is not a share of the kept tokens; give 0 to 1, as 0.15")

    def spaced(self, k: int) -> int:
        """Contextual tokens among the k kept."""
        return round(self.contextual * k)

    def reduce(self, s: Stage) -> Reduction:
        scores, count = s.scores(), self.spaced(s.k)
        dominant, others = ops.split(scores, s.k - count)
        if not count:
            return Reduction(s.keep(dominant), dominant, others, scores=scores)
        number = torch.arange(others.shape[1], device=others.device)
        step = others.shape[1] // count
        chosen, rest = ops.split(((number % step == 0) & (number < step * count)).float()[None], count)
        targets, pruned = others.index_select(1, chosen[0]), others.index_select(1, rest[0])
        kept = ops.ascending(torch.cat([dominant, targets], dim=1))
        k = keys(s)
        with ops.no_autocast(k):
            _, best = ops.best_match(ops.take(k, pruned), ops.take(k, targets))
        place = torch.zeros_like(scores, dtype=torch.int64).scatter(1, kept, torch.arange(s.k, device=k.device).expand_as(kept))
        hosts = place.gather(1, targets.gather(1, best))
        return Reduction(s.merge(kept, pruned, hosts), kept, pruned, hosts, scores)


@dataclass(frozen=True)
class PruMerge(Staged):
    """Between attention and MLP, tokens with much class attention stay, and each takes in those most like it.

    neighbours: to each kept token the sum of so many other tokens is added, kept or not, those whose keys, averaged over heads, are
    most like its own, weighted by their class attention; one more token is the weighted sum of all that leave, and counts in K
    (section 3 of Shang et al. 2025, and the authors' code). Without a class token: attention received.
    The authors keep as many tokens as are outliers of each image's attention; a budget says how many here. Their attention is that
    of all heads as one; here it is the mean over heads.
    """

    neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_index(self.neighbours) or not self.neighbours:
            raise ConfigError(f"PruMerge: neighbours={self.neighbours!r} is no number of tokens; give 1 or more, as 32")

    def reduce(self, s: Stage) -> Reduction:
        scores = s.scores()
        if s.k == 1:
            kept, pruned = ops.split(scores, 1)
            return Reduction(s.keep(kept), kept, pruned, scores=scores)
        kept, pruned = ops.split(scores, s.k - 1)
        k = keys(s)
        with ops.no_autocast(k):
            own = ops.take(k, kept)
            likeness = own @ k.transpose(1, 2)  # (B, K - 1, N)
            _, hosts = ops.best_match(ops.take(k, pruned), own)
        near = _nearest(likeness, kept, min(self.neighbours, s.n - 1)) * scores[:, None]
        outside = torch.zeros_like(scores).scatter(1, pruned, scores.gather(1, pruned))[:, None]
        added = _weighted(torch.cat([near, outside], dim=1), s.tokens[:, s.prefix :])  # (B, K, C)
        tokens = s.keep(kept)
        tokens = torch.cat([tokens[:, : s.prefix], tokens[:, s.prefix :] + added[:, :-1], added[:, -1:]], dim=1)
        heaviest = pruned.gather(1, scores.gather(1, pruned).argmax(dim=1, keepdim=True))
        return Reduction(tokens, kept, pruned, hosts, scores, extra=heaviest)


def _nearest(likeness: Tensor, own: Tensor, count: int) -> Tensor:
    """1 where a token is one of the `count` most like the row's own, and not itself: [B, K, N], [B, K] -> [B, K, N]."""
    itself = torch.zeros_like(likeness).scatter(2, own[:, :, None], torch.inf)
    near = (likeness - itself).topk(count, dim=2).indices
    return torch.zeros_like(likeness).scatter(2, near, 1.0)


def _weighted(weights: Tensor, x: Tensor) -> Tensor:
    with ops.no_autocast(x):
        return (weights.to(ops.wide(x).dtype) @ ops.wide(x)).to(x.dtype)
