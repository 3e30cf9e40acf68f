"""Multiply-adds and token counts of a model as it is now, the reducer's own cost included."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.func import functional_call

from squeezevit.core.cut import description_of
from squeezevit.core.reducer import is_index
from squeezevit.core.running import evaluation_mode, without_hooks
from squeezevit.core.trace import Trace
from squeezevit.errors import ConfigError


def macs(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
    """Multiply-adds for one image (what papers on ViTs print as "FLOPs"), in evaluation mode.

    image_size: height and width in pixels, or one number for both; None = what the model is set up for. Counted by running the
    model on tensors that have a shape and no values: every matrix product and convolution of the model and of the reducer,
    attention's own two included; additions, norms and activations are not counted, as everywhere in this field. Raises
    ConfigError on a size the model does not take.

    >>> macs(timm.create_model("deit_small_patch16_224"))  # doctest: +SKIP
    4598882304
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings Triton with it

    aside = Trace(model) if "squeezevit_state" in vars(model) else nullcontext()  # an open trace of the user's stays as it is
    with FlopCounterMode(display=False) as counter, aside:
        _fake_forward(model, image_size)
    return counter.get_total_flops() // 2


def token_counts(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> tuple[int, ...]:
    """Patch tokens of a reduced model before its first stage and after each, found without computing, as in `macs`.

    >>> token_counts(reduce_(timm.create_model("deit_small_patch16_224"), ETPS(keep=0.5)))  # doctest: +SKIP
    (196, 98, 49, 25)
    """
    stages = fake_trace(model, image_size).stages
    return (stages[0].n, *(s.n_out for s in stages)) if stages else ()


def fake_trace(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Trace:
    """The trace of one image without values: shapes and counts. The model must be reduced."""
    with Trace(model) as t:
        _fake_forward(model, image_size)
    return t


class _ImagesAlone(nn.Module):
    """A model of which only the part that takes images runs; score heads may be the whole model's."""

    def __init__(self, model: nn.Module, runs: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.runs = [runs]  # not a second child

    def forward(self, *inputs: torch.Tensor | None, **named: object) -> object:
        return self.runs[0](*inputs, **named)


def _fake_forward(model: nn.Module, image_size: int | tuple[int, int] | None) -> None:
    about = description_of(model)
    size = about.image_size if image_size is None else image_size
    height, width = _height_width(size)
    name = type(model).__name__
    model = _ImagesAlone(model, model if about.tower is None else about.tower)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image = torch.empty(1, about.channels, height, width, device="meta", dtype=next(model.parameters()).dtype)
    with torch.no_grad(), evaluation_mode(model), without_hooks(model):
        try:
            functional_call(model, shapes, about.given(image), about.named(image))
        except (AssertionError, RuntimeError, ValueError) as error:
            if any("quantized" in type(module).__module__ for module in model.modules()):
                raise ConfigError(
                    f"the multiply-adds of this {name} cannot be counted, as some of its layers are quantised; "
                    "count before quantising: the number is the same"
                ) from error
            raise ConfigError(
                f"{name} does not run on images of {height} x {width} pixels ({error}); give the size "
                f"that it was built for, {about.image_size}, or build it for another that its patches tile"
            ) from error


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(pair) != 2 or not all(is_index(side) and side for side in pair):
        raise ConfigError(f"image_size={size!r} is no size; give pixels a side, as 224, or height and width, as (224, 336)")
    return int(pair[0]), int(pair[1])
