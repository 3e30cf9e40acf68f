"""DynamicViT (Rao et al., NeurIPS 2021): dTPS without the squeeze."""

from dataclasses import dataclass

from squeezevit import ops
from squeezevit.reducer import Reduction, Stage
from squeezevit.reducers.tps import DTPS


@dataclass(frozen=True)
class DynamicViT(DTPS):
    """Before a block, tokens that a small learned head wants dropped are discarded; K_j = floor(N * keep^j), at least 1."""

    def reduce(self, s: Stage) -> Reduction:
        scores = self.head_scores(s)
        kept, pruned = ops.split(scores, s.k)
        return Reduction(s.keep(kept), kept, pruned, scores=scores)
