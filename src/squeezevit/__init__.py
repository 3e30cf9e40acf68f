"""SqueezeViT: token reduction for vision transformers that somebody else wrote. See `reduce_` and `restore_`."""

from squeezevit import errors
from squeezevit import families as _package  # noqa: F401  # loaded first, so that the name is the listing's hereafter
from squeezevit.budget.plan import plan, preset
from squeezevit.checkpoint import from_pretrained, load_checkpoint_
from squeezevit.core import ops
from squeezevit.core.attach import reduce_, restore_
from squeezevit.core.macs import macs
from squeezevit.core.supported import listing as families
from squeezevit.core.trace import pool, trace
from squeezevit.reducers import DTPS, ETPS, DynamicViT, EViT, Identity, Random, Squeeze, ToMe, TopK
from squeezevit.train import losses

__version__ = "0.1.0"
__all__ = [
    "DTPS",
    "ETPS",
    "DynamicViT",
    "EViT",
    "Identity",
    "Random",
    "Squeeze",
    "ToMe",
    "TopK",
    "errors",
    "families",
    "from_pretrained",
    "load_checkpoint_",
    "losses",
    "macs",
    "ops",
    "plan",
    "pool",
    "preset",
    "reduce_",
    "restore_",
    "trace",
]
