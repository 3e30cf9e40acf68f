"""The methods, each a frozen dataclass over the protocol of `squeezevit.core.reducer`."""

from dataclasses import asdict
from typing import Any

from squeezevit.core.reducer import Reducer
from squeezevit.reducers.atc import ATC
from squeezevit.reducers.baselines import Identity, Random, TopK
from squeezevit.reducers.diffrate import DiffRate
from squeezevit.reducers.evit import EViT
from squeezevit.reducers.learned import DTPS, DynamicViT
from squeezevit.reducers.mctf import MCTF
from squeezevit.reducers.pitome import PiToMe
from squeezevit.reducers.saint import SAINT
from squeezevit.reducers.tofu import ToFu
from squeezevit.reducers.tome import MergeError, ToMe
from squeezevit.reducers.towers import PruMerge, VisionZip
from squeezevit.reducers.tps import ETPS, Squeeze
from squeezevit.reducers.zero_tprune import ZeroTPrune

__all__ = [
    "ATC",
    "DTPS",
    "ETPS",
    "MCTF",
    "SAINT",
    "DiffRate",
    "DynamicViT",
    "EViT",
    "Identity",
    "MergeError",
    "PiToMe",
    "PruMerge",
    "Random",
    "Squeeze",
    "ToFu",
    "ToMe",
    "TopK",
    "VisionZip",
    "ZeroTPrune",
]


def to_dict(reducer: Reducer) -> dict[str, Any]:
    """A reducer as plain values, for a configuration file.

    >>> to_dict(ToMe(r=4))
    {'name': 'ToMe', 'r': 4}
    """
    return {"name": type(reducer).__name__, **asdict(reducer)}
