"""SqueezeViT: token reduction for vision transformers that somebody else wrote. See `reduce_` and `restore_`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from squeezevit import errors
from squeezevit import export as _room
from squeezevit import families as _package  # noqa: F401  # loaded first, so that the name is the listing's hereafter
from squeezevit.core import ops
from squeezevit.core.attach import reduce_, restore_
from squeezevit.core.macs import macs
from squeezevit.core.supported import listing as families
from squeezevit.core.trace import pool, trace
from squeezevit.reducers import (
    ATC,
    DTPS,
    ETPS,
    MCTF,
    SAINT,
    DiffRate,
    DynamicViT,
    EViT,
    Identity,
    MergeError,
    PiToMe,
    PruMerge,
    Random,
    Squeeze,
    ToFu,
    ToMe,
    TopK,
    VisionZip,
    ZeroTPrune,
)
from squeezevit.train import losses

if TYPE_CHECKING:
    from squeezevit.budget.plan import plan, preset
    from squeezevit.bundle import load, save
    from squeezevit.checkpoint import from_pretrained, load_checkpoint_
    from squeezevit.export.job import export
    from squeezevit.vlm import VLM, reduce_vlm_, squeeze_prompt

__version__ = "0.1.0"
__all__ = [
    "ATC",
    "DTPS",
    "ETPS",
    "MCTF",
    "SAINT",
    "VLM",
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
    "errors",
    "export",
    "families",
    "from_pretrained",
    "load",
    "load_checkpoint_",
    "losses",
    "macs",
    "ops",
    "plan",
    "pool",
    "preset",
    "reduce_",
    "reduce_vlm_",
    "restore_",
    "save",
    "squeeze_prompt",
    "trace",
]
_WHEN_ASKED = {  # what not every program that reduces a model needs is imported when it is first named
    "plan": "squeezevit.budget.plan",
    "preset": "squeezevit.budget.plan",
    "from_pretrained": "squeezevit.checkpoint",
    "load_checkpoint_": "squeezevit.checkpoint",
    "export": "squeezevit.export.job",
    "load": "squeezevit.bundle",
    "save": "squeezevit.bundle",
    "VLM": "squeezevit.vlm",
    "reduce_vlm_": "squeezevit.vlm",
    "squeeze_prompt": "squeezevit.vlm",
}


del export, _room  # the room has the name of the function, which is imported when it is first named


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED:
        raise AttributeError(f"module 'squeezevit' has no attribute {name!r}")
    return getattr(import_module(_WHEN_ASKED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
