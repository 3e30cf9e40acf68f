"""The cut: how a host library's transformer block is taken in two, and what a family tells about a model.

A family is a module that registers handlers, found by the type of the block or model, for the functions below. It is imported only
when its host library already is. To support a block of your own, register the three for its class:

    @attn_half.register
    def _(block: MyBlock, x, bias=None):
        return x + block.attn(block.norm1(x), mask=bias)      # bias [B, 1, 1, T] or [B, 1, T, T], added to attention logits

    @mlp_half.register
    def _(block: MyBlock, x):
        return x + block.mlp(block.norm2(x))

    @attention.register                                        # only for reducers that score by attention
    def _(block: MyBlock, x) -> Attention: ...

Call the host's own children, never copy what they do: `reduce_` compares the halves with the whole on random tokens and refuses a
block where they differ. `host` tells the same about a whole model.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import NoReturn

from torch import Tensor, nn

from squeezevit.errors import UnsupportedError
from squeezevit.reducer import Attention

_FAMILIES = ("timm",)  # a module of this package for each host library of the same name


@dataclass(frozen=True)
class Host:
    """What a family tells about a model."""

    blocks: Sequence[nn.Module]
    prefix: int  # P: class, distillation and register tokens in front
    class_token: bool  # whether token 0 is a class token
    dim: int  # C
    channels: int  # of the input image
    image_size: tuple[int, int]  # height and width the model is set up for
    mixin: type | None = None  # put in front of a reduced model's class, for what it does with patch tokens after the blocks
    refuse_mass: str = ""  # why masses cannot be respected, if they cannot


def _unsupported(block: nn.Module, what: str) -> NoReturn:
    raise UnsupportedError(
        f"{type(block).__module__}.{type(block).__qualname__} is not a block that SqueezeViT knows how to cut ({what}); register "
        "attn_half, mlp_half and attention for it as described in squeezevit.families"
    )


@singledispatch
def attn_half(block: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with its residual: [B, T, C] -> [B, T, C]; `bias` is added to the attention logits."""
    _unsupported(block, "no attn_half")


@singledispatch
def mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    """MLP with its residual: [B, T, C] -> [B, T, C]."""
    _unsupported(block, "no mlp_half")


@singledispatch
def attention(block: nn.Module, x: Tensor) -> Attention:
    """What scoring needs to know of the block's attention when x [B, T, C] comes into the block."""
    _unsupported(block, "no attention, which this reducer scores by")


@singledispatch
def host(model: nn.Module) -> Host:
    """Blocks and token layout of a model. Raises UnsupportedError where it cannot be reduced correctly."""
    raise UnsupportedError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a model that SqueezeViT knows; supported today: timm's "
        "VisionTransformer and its subclasses with plain blocks. For a model of your own register squeezevit.families.host for "
        "its class"
    )


@singledispatch
def convert(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's entries under the model's own names and grid; families know their hosts' converters."""
    return state_dict


@dataclass(frozen=True)
class Cut:
    """The handlers of one block class, looked up once so that no dispatch happens in `forward`."""

    attn_half: Callable[..., Tensor]
    mlp_half: Callable[..., Tensor]
    attention: Callable[..., Attention]


def cut(block_class: type) -> Cut:
    return Cut(attn_half.dispatch(block_class), mlp_half.dispatch(block_class), attention.dispatch(block_class))


def knows(block_class: type) -> bool:
    """Whether both halves of a block class are registered."""
    return all(half.dispatch(block_class) is not half.dispatch(object) for half in (attn_half, mlp_half))


def load_families() -> None:
    """Import the family of every host library that is already imported, and none other."""
    for name in _FAMILIES:
        if name in sys.modules:
            importlib.import_module(f"{__name__}.{name}")
