"""What a stage may ask of its block's attention, and how it is had without computing it, or calling anything, twice."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from squeezevit.core.capture import compiling


class Attention(NamedTuple):
    """What a family tells about one block's attention, for scoring."""

    x: Tensor  # [B, T, C], what the projections are applied to
    heads: int  # H
    query: Callable[[int | None], Tensor]  # of the first n tokens, None = of all: [B, H, n, d], scaled, after any norm and rotation
    key: Callable[[], Tensor]  # [B, H, T, d], after any norm and rotation
    key_weight: Tensor | None = None  # [H*d, C] where keys are this plain linear map of x, else None
    key_bias: Tensor | None = None  # [H*d], of that map
    pairs: Tensor | None = None  # [1 or B, H, T, T], what the block adds to the logits of each pair; no family has to give it


class Recorder:
    """A forward hook that records what a module puts out while its block's attention runs, apart for each thread.

    It runs after every other hook, whenever those were set, so that it sees what attention gets. Compiled code that is cut in two
    inside attention shares one place: run it in one thread.
    """

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor | None] = {}  # has a thread's entry while a block runs there
        self.compiled: Tensor | None = None  # not a dictionary, which some compiled code may not change

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if compiling():
            self.compiled = output
        elif (thread := threading.get_ident()) in self.outputs:
            self.outputs[thread] = output

    def begin(self, module: nn.Module) -> None:
        if compiling():
            return
        self.outputs[threading.get_ident()] = None
        hooks = module._forward_hooks
        if next(reversed(hooks.values()), None) is not self:
            own = next((key for key, hook in hooks.items() if hook is self), None)
            if own is not None:
                hooks[own] = hooks.pop(own)

    def last(self) -> Tensor | None:
        return self.compiled if compiling() else self.outputs.get(threading.get_ident())

    def drop(self) -> None:
        self.compiled = None
        if not compiling():
            self.outputs.pop(threading.get_ident(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"outputs": {}, "compiled": None}


class Recording:
    """The recorders of one block's modules, on while its attention and its stage run."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        self.recorders = tuple(Recorder() for _ in modules)
        for module, recorder in zip(modules, self.recorders, strict=True):
            module.register_forward_hook(recorder)

    def begin(self) -> None:
        for module, recorder in zip(self.modules, self.recorders, strict=True):
            recorder.begin(module)

    def drop(self) -> None:
        for recorder in self.recorders:
            recorder.drop()


def forget_(module: nn.Module) -> None:
    """Take all recorders off a module."""
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Recorder)]:
        del module._forward_hooks[key]


def recorded(module: nn.Module) -> Tensor | None:
    """What a module put out in the block's attention just now, where the block's stage asked for that."""
    hooks = list(module._forward_hooks.values())  # what an earlier one saw, the last one may have changed
    return hooks[-1].last() if hooks and isinstance(hooks[-1], Recorder) else None


def output(module: nn.Module, x: Tensor) -> Tensor:
    """Of a module on the first tokens that came into a block, [B, n, C]: what was recorded, or else computed."""
    known = recorded(module)
    return compute(module, x) if known is None else known[:, : x.shape[1]]


def compute(module: nn.Module, x: Tensor) -> Tensor:
    """A module's forward around users' hooks, which see what the model's own forward calls and nothing else.

    Only what is compiled, where no recorder can be moved after a later hook, asks the whole module.
    """
    return module(x) if compiling() else module.forward(x)


def is_plain(linear: nn.Module) -> bool:
    """Whether the module is exactly x W^T + b with an ordinary weight that may be sliced."""
    hooked = linear._forward_pre_hooks or not all(isinstance(h, Recorder) for h in linear._forward_hooks.values())
    hooked = hooked or "forward" in vars(linear)  # as accelerate's hooks set one
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor) and not hooked
