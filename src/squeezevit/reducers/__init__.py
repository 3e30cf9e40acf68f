"""The methods, each a frozen dataclass over the protocol of `squeezevit.core.reducer`."""

from dataclasses import asdict
from typing import Any

from squeezevit.core.reducer import Reducer
from squeezevit.reducers.baselines import Identity, Random, TopK
from squeezevit.reducers.evit import EViT
from squeezevit.reducers.learned import DTPS, DynamicViT
from squeezevit.reducers.tome import ToMe
from squeezevit.reducers.tps import ETPS, Squeeze

__all__ = ["DTPS", "ETPS", "DynamicViT", "EViT", "Identity", "Random", "Squeeze", "ToMe", "TopK"]


def to_dict(reducer: Reducer) -> dict[str, Any]:
    """A reducer as plain values, for a configuration file.

    >>> to_dict(ToMe(r=4))
    {'name': 'ToMe', 'r': 4}
    """
    return {"name": type(reducer).__name__, **asdict(reducer)}
