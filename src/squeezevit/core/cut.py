"""The cut: how a library's transformer block is taken in two, and what a family tells about a model.

A family is a module that registers handlers, found by the type of the block or model, for the functions below; `squeezevit.extend`
shows how. It is imported by name, once its library is there.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from squeezevit.core.evidence import Attention
from squeezevit.core.supported import refusal, untested
from squeezevit.errors import UnsupportedError

_FAMILIES = {  # a library's module: the family that is imported once that is
    "timm": "timm",
    "transformers.modeling_utils": "transformers",
    "torchvision.models.vision_transformer": "torchvision",
    "open_clip.transformer": "open_clip",
}
ANY_PAIRS = object()  # among `arguments`: a trial puts numbers for pairs of tokens there, [1, 1, P + N, P + N]
RECIPE = "register attn_half, mlp_half and attention for its class as described in squeezevit.extend"


@dataclass(frozen=True)
class Description:
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
    inputs: Callable[[Tensor], tuple[Tensor | None, ...]] | None = None  # from images, where it takes something else
    options: Callable[[Tensor], dict[str, Any]] | None = None  # what images of another size must be called with
    grids: bool = False  # whether the mixins can put the full grid out again
    needs_grid: str = ""  # why the model is wrong, or fails, where they do not
    refuse_mass: str = ""  # why masses cannot be respected, if they cannot

    def given(self, images: Tensor) -> tuple[Tensor | None, ...]:
        """What the part that takes images is called with for these, [B, channels, H, W]."""
        return (images,) if self.inputs is None else self.inputs(images)

    def named(self, images: Tensor) -> dict[str, Any]:
        """What it is called with by name beside that."""
        return {} if self.options is None else self.options(images)


class TakesNoMask(UnsupportedError):
    """What a family's `attn_half` raises when it is given a bias, for blocks whose attention takes none.

    They are reduced all the same by reducers that need none: without masses, and without masked training.
    """

    def __init__(self) -> None:
        super().__init__(
            "its attention takes no mask, by which a token would count for several, or a dropped one for none; choose a reducer "
            "without masses, as sv.ETPS(), and train learned heads by train='topk'"
        )


def _unsupported(block: nn.Module, what: str) -> NoReturn:
    name = f"{type(block).__module__}.{type(block).__qualname__}"
    raise UnsupportedError(f"{name} is not a block that SqueezeViT knows how to cut ({what}); {RECIPE}")


@singledispatch
def attn_half(block: nn.Module, x: Tensor, bias: Tensor | None = None, **per_token: Any) -> Tensor:
    """Attention with its residual: [B, T, C] -> [B, T, C]; `bias` is added to the attention logits, or raises TakesNoMask.

    Where the block has `pairs`, these are in the bias, [B, H, T, T], and the block adds none of its own.
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
    leave are taken out wherever the block is called. ANY_PAIRS stands for a bias for each pair of tokens (see `pairs`).
    """
    return {}


@singledispatch
def pairs(block: nn.Module, **given: Any) -> Tensor | None:
    """What a block adds to its attention logits for each pair of tokens of the full grid, [1, H, P + N0, P + N0], or None.

    Relative-position biases are such. given: what the block is called with under the names of the handler's own parameters.
    """
    return None


@singledispatch
def trial_patches(block: nn.Module) -> int:
    """How many patch tokens a trial of the block has; those of its grid where `pairs` are laid out for one."""
    return 6


@singledispatch
def fingerprint(block: nn.Module) -> Hashable:
    """What a block's proof rests on and a user may change afterwards; where it has changed, the block is proved again."""
    return tuple(type(child) for child in block._modules.values())


@singledispatch
def describe(model: nn.Module) -> Description:
    """Blocks and token layout of a model. Raises UnsupportedError where it cannot be reduced correctly."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    reason = refusal(model)
    if reason:
        raise UnsupportedError(f"{name} cannot be reduced ({reason})")
    known = describe.dispatch(object)
    inside = next((path for path, m in model.named_modules() if path and describe.dispatch(type(m)) is not known), None)
    if inside is not None:
        raise UnsupportedError(
            f"{name} is not a model that SqueezeViT knows, but holds one: give {as_python(inside)} to sv.reduce_"
        )
    raise UnsupportedError(
        f"{name} is not a model that SqueezeViT knows; `squeezevit families` lists those it does, and for a model of your own "
        "register squeezevit.extend.describe for its class (examples/new_family.py)"
    )


def as_python(path: str) -> str:
    """The path of a module as an expression, "model[1].visual" for "1.visual"."""
    return "model" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in path.split("."))


def description_of(model: nn.Module) -> Description:
    """`describe` of a model whose family may not have been imported yet."""
    require_model(model)
    load_families()
    return describe(model)


def require_model(model: object) -> None:
    """Raises UnsupportedError on what is no model."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}, {str(model)[:80]!r},"
        raise UnsupportedError(f"{what} is not a model; build one first, as timm.create_model('vit_base_patch16_224')")


@singledispatch
def convert(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's entries under the model's own names and grid; families know their libraries' converters."""
    return state_dict


@dataclass(frozen=True)
class Cut:
    """The handlers of one block class, looked up once so that no dispatch happens in `forward`."""

    attn_half: Callable[..., Tensor]
    mlp_half: Callable[..., Tensor]
    attention: Callable[..., Attention]
    projections: Callable[..., tuple[nn.Module, ...]]
    arguments: Callable[..., dict[str, Any]]
    pairs: Callable[..., Tensor | None]
    paired: tuple[str, ...]  # arguments of the block that its pairs come from
    trial_patches: Callable[..., int]
    fingerprint: Callable[..., Hashable]
    parameters: tuple[str, ...]  # of the block's forward, after its tokens


def cut(block_class: type) -> Cut:
    parameters = tuple(inspect.signature(cast(Any, block_class).forward).parameters)[2:]
    halves = attn_half.dispatch(block_class), mlp_half.dispatch(block_class)
    evidence = attention.dispatch(block_class), projections.dispatch(block_class)
    own = pairs.dispatch(block_class)
    paired = tuple(inspect.signature(own).parameters)[1:] if own is not pairs.dispatch(object) else ()
    given, patches = arguments.dispatch(block_class), trial_patches.dispatch(block_class)
    return Cut(*halves, *evidence, given, own, paired, patches, fingerprint.dispatch(block_class), parameters)


def base_class(module: nn.Module) -> type:
    """The library's own class of a module, whether it is reduced or not."""
    return vars(type(module)).get("squeezevit_base", type(module))


def knows(block_class: type) -> bool:
    """Whether both halves of a block class are registered."""
    return all(half.dispatch(block_class) is not half.dispatch(object) for half in (attn_half, mlp_half))


def load_families() -> None:
    """Import the family of every library that is already imported, and none other."""
    for library, family in _FAMILIES.items():
        if sys.modules.get(library) is None:
            continue
        name = f"squeezevit.families.{family}"
        if name not in sys.modules and (warning := untested(family)):
            warnings.warn(warning, stacklevel=3)
        module = importlib.import_module(name)
        getattr(module, "load", lambda: None)()
