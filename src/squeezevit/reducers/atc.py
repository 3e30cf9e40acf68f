"""ATC, agglomerative token clustering (Haurum et al., ECCV 2024): the two nearest clusters are joined until so many are left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.reducer import Reduction, Stage, Staged, check_choice
from squeezevit.reducers.per_block import keys

_LINKAGES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {  # distances to two clusters, and their sizes
    "average": lambda a, b, m, n: (m * a + n * b) / (m + n),
    "complete": lambda a, b, m, n: torch.maximum(a, b),
    "single": lambda a, b, m, n: torch.minimum(a, b),
}


@dataclass(frozen=True)
class ATC(Staged):
    """Between attention and MLP, tokens are clustered bottom up, and each cluster becomes its mean, weighted by size.

    linkage: how far two clusters are, by 1 - cosine of keys averaged over heads: the mean, the largest or the smallest distance of
    their tokens ("average", "complete", "single"; section 3 of Haurum et al. 2024). A cluster stands at the place of its first
    token. Later attention gets log(size).
    Every removed token is a step of its own: N - K steps of O(N) on an N x N matrix, the images of a batch side by side, where the
    authors' code leaves the GPU and clusters one image after the other.
    """

    linkage: Literal["average", "complete", "single"] = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "linkage", tuple(_LINKAGES))

    @property
    def weighs(self) -> bool:
        return True

    def reduce(self, s: Stage) -> Reduction:
        with torch.no_grad():
            k = keys(s)
            with ops.no_autocast(k):
                cluster = _cluster(1 - k @ k.transpose(1, 2), s.n - s.k, _LINKAGES[self.linkage])
            leads = cluster == torch.arange(s.n, device=k.device)
            kept, pruned = ops.split(leads.float(), s.k)
            place = leads.cumsum(dim=1) - 1  # of each lead among the kept
            hosts = place.gather(1, cluster.gather(1, pruned))
        tokens, mass = s.merge_by_mass(s.keep(kept), s.take(pruned), kept, pruned, hosts)
        return Reduction(tokens, kept, pruned, hosts, mass=mass)


def _cluster(distance: Tensor, steps: int, join: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Of each point the first one of its cluster, after so many steps: [B, N, N] -> [B, N].

    A step joins the two nearest clusters, and measures the others anew (Lance and Williams 1967).
    """
    B, N, _ = distance.shape
    far = torch.full_like(distance[:, 0], torch.inf)
    d = distance + torch.diag(far[0])
    cluster = torch.arange(N, device=d.device).repeat(B, 1)
    size = torch.ones_like(far)
    for _ in range(steps):
        nearest = d.flatten(1).argmin(dim=1, keepdim=True)  # (B, 1)
        i, j = nearest // N, nearest % N
        lead, other = torch.minimum(i, j), torch.maximum(i, j)
        m, n = size.gather(1, lead), size.gather(1, other)
        row = lead[:, :, None].expand(-1, 1, N)
        gone = other[:, :, None].expand(-1, 1, N)
        joined = join(d.gather(1, row)[:, 0], d.gather(1, gone)[:, 0], m, n).scatter(1, lead, torch.inf)  # (B, N)
        d.scatter_(1, row, joined[:, None]).scatter_(2, row.transpose(1, 2), joined[:, :, None])
        d.scatter_(1, gone, far[:, None]).scatter_(2, gone.transpose(1, 2), far[:, :, None])
        size = size.scatter(1, lead, m + n)
        cluster = torch.where(cluster == other, lead, cluster)
    return cluster
