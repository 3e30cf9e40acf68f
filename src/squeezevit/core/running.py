"""Running somebody else's model: its mode, its precision, its hooks, and images to run it on."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from squeezevit.core.cut import description_of
from squeezevit.core.evidence import Recorder
from squeezevit.errors import ConfigError

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps there are
OUTPUTS = ("logits", "image_embeds", "pooler_output")  # of a model of transformers, the best first
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NEEDED = ("torch.nn.utils", "torch.distributed", "accelerate")  # whose hooks make weights, or bring them
_COLLECTING = ("transformers.utils.output_capturing",)
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel, whose names a checkpoint has."""
    while (name := _WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def wait_for(device: torch.device | str) -> None:
    """Return once an accelerator has done all that it was given; a CPU has."""
    device = torch.device(device)
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and give every submodule its own mode back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


@contextmanager
def without_hooks(module: nn.Module, whole: bool = False) -> Iterator[None]:
    """No hook of the user's sees what runs here; those that make weights or bring them do, and recorders.

    whole: a whole model runs, whose library may collect its outputs by hooks of its own.
    """
    needed = (*_NEEDED, *_COLLECTING) if whole else _NEEDED
    own = [(m, name) for m in module.modules() for name in ("_forward_hooks", "_forward_pre_hooks") if getattr(m, name)]
    everywhere = [(torch_module, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")]
    places: list[tuple[Any, str]] = [*own, *everywhere]
    before = [getattr(place, name) for place, name in places]
    for (place, name), hooks in zip(places, before, strict=True):
        setattr(place, name, OrderedDict((key, hook) for key, hook in hooks.items() if _is_needed(hook, needed)))
    try:
        yield
    finally:
        for (place, name), hooks in zip(places, before, strict=True):
            hooks.update((key, hook) for key, hook in getattr(place, name).items() if key not in hooks)  # set meanwhile, for good
            setattr(place, name, hooks)


def _is_needed(hook: Any, needed: tuple[str, ...]) -> bool:
    hook = hook.func if isinstance(hook, partial) else hook
    source = getattr(hook, "__module__", None) or type(hook).__module__
    return isinstance(hook, Recorder) or source.startswith(needed) or type(hook).__module__.startswith(needed)


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Autocast to "bf16" or "fp16" over weights as they are, or nothing for "fp32"; ConfigError on any other name."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers, so that many variants fit in memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def images(model: nn.Module, batch_size: int, image_size: int | tuple[int, int] | None = None) -> Tensor:
    """Noise of the size and kind a model takes: [B, channels, height, width]."""
    about, like = description_of(model), next(model.parameters())
    size = about.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch_size, about.channels, height, width, generator=generator)
    return noise.to(like.device, like.dtype)


def quantised(model: nn.Module) -> bool:
    """Whether it holds layers of torch's own quantisation, which round by the range of all tokens that are there."""
    return any("quantized" in type(module).__module__ for module in model.modules())


def answer(out: Any) -> Any:
    """What stands for the images among a model's output: of a Hugging Face output the best it has, any other as it is."""
    named = (value for name in OUTPUTS if isinstance(value := getattr(out, name, None), Tensor))
    return next(named, out)


def embedded(model: nn.Module, out: Any) -> Any:
    """`answer` of what a model, or its tower, put out; a tower's goes on into the space that the whole model shares with texts.

    That is transformers' CLIPModel, whose forward takes texts, too: [B, width] -> [B, projection].
    """
    found, project = answer(out), getattr(model, "visual_projection", None)
    alone = description_of(model).tower is not None and getattr(out, "image_embeds", None) is None
    return project(found) if alone and isinstance(project, nn.Module) and isinstance(found, Tensor) else found


def pooled(out: Any) -> Tensor:
    """Of a model's output, one vector an image: what stands for it, or its first token."""
    found = answer(out)
    return found.flatten(1) if isinstance(found, Tensor) else found[0][:, 0]


def forward(model: nn.Module, x: Tensor, precision: str, compiled: str | None = None) -> Callable[[], Any]:
    """A forward of the part that takes images, in inference mode; compiled in a mode of torch.compile where one is given."""
    about = description_of(model)
    inputs, named = about.given(x), about.named(x)
    runs: Any = about.tower or model
    if compiled is not None:
        runs = torch.compile(runs, fullgraph=True, mode=compiled)

    def run() -> Any:
        with torch.inference_mode(), autocast(x.device, precision):
            return runs(*inputs, **named)

    return run
