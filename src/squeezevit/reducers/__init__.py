"""The methods, each a frozen dataclass over the protocol of `squeezevit.reducer`."""

from squeezevit.reducers.baselines import Identity, Random, TopK
from squeezevit.reducers.dynamicvit import DynamicViT
from squeezevit.reducers.evit import EViT
from squeezevit.reducers.tome import ToMe
from squeezevit.reducers.tps import DTPS, ETPS

__all__ = ["DTPS", "ETPS", "DynamicViT", "EViT", "Identity", "Random", "ToMe", "TopK"]
