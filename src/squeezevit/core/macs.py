"""Multiply-adds and token counts of a model as it is now, the reducer's own cost included."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import nn
from torch.func import functional_call

from squeezevit.core.cut import description_of
from squeezevit.core.reducer import is_index
from squeezevit.core.running import evaluation_mode, quantised, without_hooks
from squeezevit.core.trace import Trace
from squeezevit.errors import ConfigError

Found = TypeVar("Found")


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

    reduced = "squeezevit_state" in vars(model)

    def count(values: bool) -> int:
        aside = Trace(model) if reduced else nullcontext()  # an open trace of the user's stays as it is
        with FlopCounterMode(display=False) as counter, aside:
            _forward(model, image_size, values)
        return counter.get_total_flops() // 2

    return _without_values(count)


def token_counts(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> tuple[int, ...]:
    """Patch tokens of a reduced model before its first stage and after each, found without computing, as in `macs`.

    >>> token_counts(reduce_(timm.create_model("deit_small_patch16_224"), ETPS(keep=0.5)))  # doctest: +SKIP
    (196, 98, 49, 25)
    """
    stages = fake_trace(model, image_size).stages
    return (stages[0].n, *(s.n_out for s in stages)) if stages else ()


def fake_trace(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Trace:
    """The trace of one image without values: shapes and counts. The model must be reduced."""

    def run(values: bool) -> Trace:
        with Trace(model) as t:
            _forward(model, image_size, values)
        return t

    return _without_values(run)


class _ReadsValues(Exception):
    """A library asks for the values of a tensor, as of its own mask."""


def _without_values(run: Callable[[bool], Found]) -> Found:
    """What `run` finds by tensors without values; with values, of zeros, where the library reads some."""
    try:
        return run(False)
    except _ReadsValues:
        return run(True)


class _ImagesAlone(nn.Module):
    """A model of which only the part that takes images runs; score heads may be the whole model's."""

    def __init__(self, model: nn.Module, runs: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.runs = [runs]  # not a second child

    def forward(self, *inputs: torch.Tensor | None, **named: object) -> object:
        return self.runs[0](*inputs, **named)


def _forward(model: nn.Module, image_size: int | tuple[int, int] | None, values: bool) -> None:
    about = description_of(model)
    size = about.image_size if image_size is None else image_size
    height, width = _height_width(size)
    name = type(model).__name__
    model = _ImagesAlone(model, model if about.tower is None else about.tower)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    like = next(model.parameters())
    image = torch.zeros(1, about.channels, height, width, device=like.device if values else "meta", dtype=like.dtype)
    with torch.no_grad(), evaluation_mode(model), without_hooks(model, whole=True):
        try:
            if values:
                model(*about.given(image), **about.named(image))
            else:
                functional_call(model, shapes, about.given(image), about.named(image))
        except (AssertionError, RuntimeError, ValueError) as error:
            if "on meta tensors" in str(error) and not like.is_meta:
                raise _ReadsValues from error
            if quantised(model):
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
