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
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from types import ModuleType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from squeezevit.errors import UnsupportedError
from squeezevit.families.table import Family, families, refusal, untested
from squeezevit.reducer import Attention

__all__ = [
    "Cut",
    "Family",
    "Host",
    "arguments",
    "attention",
    "attn_half",
    "convert",
    "cut",
    "families",
    "host",
    "host_of",
    "kept",
    "mlp_half",
    "output",
    "projections",
]
_FAMILIES = {  # host module: the module of this package that is imported once the host's is
    "timm": "timm",
    "transformers.modeling_utils": "transformers",
    "torchvision.models.vision_transformer": "torchvision",
    "open_clip.transformer": "open_clip",
}


@dataclass(frozen=True)
class Host:
    """What a family tells about a model."""

    blocks: Sequence[nn.Module]
    prefix: int  # P: class, distillation and register tokens in front
    class_token: bool  # whether token 0 is a class token
    dim: int  # C
    channels: int  # of the input image
    image_size: tuple[int, int]  # height and width the model is set up for
    mixins: tuple[tuple[nn.Module, type], ...] = ()  # put in front of modules' classes, for what they do with tokens afterwards
    pooled: bool = False  # whether a mixin asks for the tokens' weights, which the last block then leaves for it
    tower: nn.Module | None = None  # the part that takes images alone, where the model itself takes more
    inputs: Callable[[Tensor], tuple[Tensor | None, ...]] | None = (
        None  # from images [B, channels, H, W], where it takes something else
    )
    grids: bool = False  # whether the mixins can put the full grid out again
    refuse_mass: str = ""  # why masses cannot be respected, if they cannot

    def given(self, images: Tensor) -> tuple[Tensor | None, ...]:
        """What the part that takes images is called with for these, [B, channels, H, W]."""
        return (images,) if self.inputs is None else self.inputs(images)


def _unsupported(block: nn.Module, what: str) -> NoReturn:
    raise UnsupportedError(
        f"{type(block).__module__}.{type(block).__qualname__} is not a block that SqueezeViT knows how to cut ({what}); register "
        "attn_half, mlp_half and attention for it as described in squeezevit.families"
    )


@singledispatch
def attn_half(block: nn.Module, x: Tensor, bias: Tensor | None = None, **per_token: Any) -> Tensor:
    """Attention with its residual: [B, T, C] -> [B, T, C]; `bias` is added to the attention logits.

    per_token: those of `arguments` that have a row per patch token, for the tokens that are there: [B, 1, N, D].
    """
    _unsupported(block, "no attn_half")


@singledispatch
def mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    """MLP with its residual: [B, T, C] -> [B, T, C]."""
    _unsupported(block, "no mlp_half")


@singledispatch
def attention(block: nn.Module, x: Tensor, **per_token: Any) -> Attention:
    """What scoring needs to know of the block's attention when x [B, T, C] comes into the block."""
    _unsupported(block, "no attention, which this reducer scores by")


@singledispatch
def projections(block: nn.Module) -> tuple[nn.Module, ...]:
    """The block's modules that make queries and keys, a norm before them included.

    `attention` may take their results from `output`, which does not compute again what the block's own attention has computed.
    """
    return ()


@singledispatch
def arguments(block: nn.Module, patches: Tensor) -> dict[str, Any]:
    """What a block must be called with beside its tokens, for a trial with N patch tokens [N, C] of the wanted device and dtype.

    Tensors among them (or tuples of tensors) have a row per patch token, [N, D], as rotary embeddings; the rows of tokens that
    leave are taken out wherever the block is called.
    """
    return {}


@singledispatch
def host(model: nn.Module) -> Host:
    """Blocks and token layout of a model. Raises UnsupportedError where it cannot be reduced correctly."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    reason = refusal(model)
    if reason:
        raise UnsupportedError(f"{name} cannot be reduced ({reason})")
    inside = next((path for path, m in model.named_modules() if path and host.dispatch(type(m)) is not host.dispatch(object)), None)
    if inside is not None:
        raise UnsupportedError(f"{name} is not a model that SqueezeViT knows, but holds one: give model.{inside} to sv.reduce_")
    raise UnsupportedError(
        f"{name} is not a model that SqueezeViT knows; `squeezevit families` lists those it does, and for a model of your own "
        "register squeezevit.families.host for its class (examples/new_family.py)"
    )


def host_of(model: nn.Module) -> Host:
    """`host` of a model whose family may not have been imported yet."""
    load_families()
    return host(model)


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
    projections: Callable[..., tuple[nn.Module, ...]]
    arguments: Callable[..., dict[str, Any]]
    parameters: tuple[str, ...]  # of the block's forward, behind its tokens


def cut(block_class: type) -> Cut:
    parameters = tuple(inspect.signature(cast(Any, block_class).forward).parameters)[2:]
    halves = attn_half.dispatch(block_class), mlp_half.dispatch(block_class)
    evidence = attention.dispatch(block_class), projections.dispatch(block_class)
    return Cut(*halves, *evidence, arguments.dispatch(block_class), parameters)


def per_token(block: nn.Module, dim: int) -> tuple[str, ...]:
    """Names of the arguments of a block that have a row per patch token."""
    trial = arguments(block, torch.empty(2, dim))
    return tuple(name for name, value in trial.items() if isinstance(value, Tensor | tuple))


def host_class(module: nn.Module) -> type:
    """The host's own class of a module, whether it is reduced or not."""
    return vars(type(module)).get("squeezevit_base", type(module))


def knows(block_class: type) -> bool:
    """Whether both halves of a block class are registered."""
    return all(half.dispatch(block_class) is not half.dispatch(object) for half in (attn_half, mlp_half))


class Keep:
    """A forward hook that keeps what a module put out between the beginning of its block and the stage, apart for each thread.

    Compiled code that is cut in two inside attention shares one place: run it in one thread.
    """

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor | None] = {}  # has a thread's entry while a block runs there
        self.compiled: Tensor | None = None  # no dictionary: some hosts' compiled code bears no change of one

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():
            self.compiled = output
        elif (thread := threading.get_ident()) in self.outputs:
            self.outputs[thread] = output

    def begin(self) -> None:
        if not torch.compiler.is_compiling():
            self.outputs[threading.get_ident()] = None

    def last(self) -> Tensor | None:
        return self.compiled if torch.compiler.is_compiling() else self.outputs.get(threading.get_ident())

    def drop(self) -> None:
        self.compiled = None
        if not torch.compiler.is_compiling():
            self.outputs.pop(threading.get_ident(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"outputs": {}, "compiled": None}


def kept(projection: nn.Module) -> Tensor | None:
    """What a projection put out in the block's attention just now, where the block's stage asked for that to be kept."""
    hook = next(reversed(projection._forward_hooks.values()), None)  # of an earlier one a later hook may have changed what it saw
    return hook.last() if isinstance(hook, Keep) else None


def output(projection: nn.Module, x: Tensor) -> Tensor:
    """Of a projection on the first tokens that came into a block, [B, n, C]: what it kept, or else computed."""
    known = kept(projection)
    return projection(x) if known is None else known[:, : x.shape[1]]


def is_plain(linear: nn.Module) -> bool:
    """Whether the module is exactly x W^T + b with an ordinary weight that may be sliced."""
    hooked = linear._forward_pre_hooks or not all(isinstance(h, Keep) for h in linear._forward_hooks.values())
    hooked = hooked or "forward" in vars(linear)  # as accelerate's hooks set one
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor) and not hooked


def load_families() -> None:
    """Import the family of every host library that is already imported, and none other."""
    for host_module, family in _FAMILIES.items():
        if sys.modules.get(host_module) is None:
            continue
        name = f"{__name__}.{family}"
        if name not in sys.modules and (warning := untested(family)):
            warnings.warn(warning, stacklevel=3)
        module = importlib.import_module(name)
        getattr(module, "load", lambda: None)()


class _Listing(ModuleType):
    """This module is also what it lists: `squeezevit.families()`."""

    def __call__(self) -> tuple[Family, ...]:
        return families()


sys.modules[__name__].__class__ = _Listing
