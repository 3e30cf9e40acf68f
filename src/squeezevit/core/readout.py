"""Where a model is read: at its class token alone, or at patch tokens, too. It is tried on the model, not told by its name."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeezevit.core.cut import Description
from squeezevit.core.running import answer, evaluation_mode, images, without_hooks

_CALLERS = ("get_image_features", "encode_image")  # how a model that takes text, too, is asked for what it makes of images


def reads_elsewhere(model: nn.Module, about: Description) -> str:
    """Why a model is not one that reads its class token alone behind its last block; "" where it is.

    What the last block puts out is replaced by NaN, once for all patch tokens, which must not reach the output, and once for the
    class token and what else stands in front, which must. Images are noise; the model, reduced or not, stays as it is.
    """
    if not about.class_token:
        return "has no class token"
    if next(model.parameters()).is_meta:
        return "is on the meta device, where nothing can be tried"
    run = _reader(model, about)
    if run is None:
        return f"reads its {type(about.tower).__name__} in a way that cannot be tried"
    x, prefix = images(model, 1), about.prefix
    as_written = torch.compiler.set_stance("force_eager")  # a compiled model would run past the hook
    with torch.no_grad(), evaluation_mode(model), without_hooks(model, whole=True), as_written:
        try:
            found = _numbers(run, x)
        except Exception as error:  # whatever a library says of images that it would have given otherwise
            return f"cannot be tried on noise ({(str(error).splitlines() or [type(error).__name__])[0]})"
        if not _finite(found):
            return "puts out numbers that are not finite, so that nothing can be tried"
        if _spoiled(run, x, about.blocks[-1], slice(prefix, None)):
            return "puts out what is made of patch tokens, too"
        if not _spoiled(run, x, about.blocks[-1], slice(0, prefix)):
            return "does not put out its class token behind the last block"
    return ""


def _reader(model: nn.Module, about: Description) -> Callable[[Tensor], Any] | None:
    """From images to what is made of them; None where a model around a tower does not say how."""
    call: Any = model
    if about.tower is not None:
        call = next((getattr(model, name) for name in _CALLERS if hasattr(model, name)), None)
    return None if call is None else lambda x: call(*about.given(x), **about.named(x))


def _spoiled(run: Callable[[Tensor], Any], x: Tensor, block: nn.Module, tokens: slice) -> bool:
    """Whether NaN in these tokens of what the block puts out reaches the model's output; True where it does not run with them."""

    def spoil(module: nn.Module, args: Any, out: Any) -> Any:
        first = (out if isinstance(out, Tensor) else out[0]).clone()
        first[:, tokens] = float("nan")
        return first if isinstance(out, Tensor) else (first, *out[1:])

    handle = block.register_forward_hook(spoil)
    try:
        found = _numbers(run, x)
    except Exception:  # a library that looks for NaN
        return True
    finally:
        handle.remove()
    return not found or not _finite(found)


def _numbers(run: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """What is read of a model's output."""
    return list(_tensors(answer(run(x))))


def _finite(found: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in found)


def _tensors(out: Any) -> Iterator[Tensor]:
    """All tensors of numbers that a model puts out, however they are wrapped."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        yield from (tensor for value in out.values() for tensor in _tensors(value))
    elif isinstance(out, list | tuple):
        yield from (tensor for value in out for tensor in _tensors(value))
