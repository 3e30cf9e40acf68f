"""DynamicViT (Rao et al., NeurIPS 2021): dTPS without the squeeze."""

from dataclasses import dataclass
from typing import ClassVar

from squeezevit.reducers.tps import DTPS


@dataclass(frozen=True)
class DynamicViT(DTPS):
    """Before a block, tokens that a small learned head wants dropped are discarded; K_j = floor(N * keep^j), at least 1.

    Trained as `DTPS`, by the same two ways.
    """

    squeezes: ClassVar[bool] = False
