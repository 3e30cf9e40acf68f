"""SqueezeViT: token reduction for vision transformers that somebody else wrote. See `reduce_` and `restore_`."""

from squeezevit import errors, families, losses, ops
from squeezevit.attach import reduce_, restore_
from squeezevit.checkpoint import load_checkpoint_
from squeezevit.macs import macs
from squeezevit.plan import plan
from squeezevit.presets import preset
from squeezevit.pretrained import from_pretrained
from squeezevit.reducers import DTPS, ETPS, DynamicViT, EViT, Identity, Random, Squeeze, ToMe, TopK
from squeezevit.trace import trace

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
    "preset",
    "reduce_",
    "restore_",
    "trace",
]
