"""Whose forward is this? What a forward leaves for its later blocks, its pooling and its traces belongs to that forward.

In eager code each thread has a forward of its own, so that several threads may run one model. A block that is recomputed in
backward, in whatever thread, finds its forward by the tensor that comes in. Compiled code cannot ask for its thread: it has one
place for all, and where threads are seen to share that, they are refused.
"""

import threading
import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from squeezevit.core.capture import compiling
from squeezevit.core.reducer import Carry, Reducer, Reduction
from squeezevit.errors import ConfigError, UnsupportedError


class Trace(Protocol):
    """Who is told of every stage; see squeezevit.core.trace."""

    tokens: Tensor | None

    def begin(self) -> None: ...

    def record(self, stage: int, block: int, n: int, reduction: Reduction) -> None: ...


_APART = (
    "several threads run pieces of this model that were compiled apart, which cannot tell their forwards from each other; compile "
    "the whole model in one piece (torch.compile(model, fullgraph=True)), or run one forward at a time"
)


class Forward:
    """What one run of a model has left so far."""

    def __init__(self, stages: int) -> None:
        self.slots: list[tuple[Any, ...] | None] = [None] * stages  # what each stage left, plain: torch < 2.10 compiles no others
        self.passed = -1  # the last of the reduced blocks that ran
        self.inputs: dict[int, int] = {}  # by block, the address of what came in
        self.recomputed = 0  # the address of what the last recomputed block put out
        self.averaging = False  # whether the caller of the tower that runs takes the plain mean of its patch tokens
        self.unmasked = False  # whether the tower got no mask: any that its blocks get then hides nothing
        self.compiled = False  # whether compiled code wrote the slots
        self.whole = False  # whether compiled code has the whole model

    def clear(self) -> None:
        self.slots = [None] * len(self.slots)
        self.passed, self.compiled = -1, False


class _Own(threading.local):
    """Of one thread: its forward of a model, and the traces that it has open there, innermost last."""

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self.traces: tuple[Trace, ...] = ()


class Forwards:
    """The forwards of one reduced model. A copy begins with none."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.shared = Forward(stages)  # of compiled code; eager code writes there, too, for pieces that were compiled
        self.pieces = False  # whether parts of the model were compiled apart
        self.crowded = False  # whether several threads are in the model at once, which such pieces cannot bear
        self.trace: Trace | None = None  # that compiled code records into
        self.tracing = 0  # traces that are open, in whatever thread
        self._own = _Own()
        self._alive: weakref.WeakSet[Forward] = weakref.WeakSet()
        self._inside: dict[int, int] = {}  # by thread, how often it is in the model
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Forwards, (self.stages,)

    def current(self) -> Forward:
        """This thread's forward; in compiled code the shared one."""
        if compiling():
            return self.shared
        own = self._own.forward
        if own is None:
            own = self._own.forward = Forward(self.stages)
            with self._lock:
                self._alive.add(own)
        return own

    def of(self, block: int, x: Tensor) -> Forward:
        """The forward in which x comes into a block: this thread's, or the one that is recomputed in backward, in any thread."""
        here = self.current()
        if compiling():
            return here
        address = _address(x)
        if not in_backward():
            here.inputs[block] = address
            return here
        with self._lock:
            others = [forward for forward in self._alive if forward is not here]
        return next((f for f in (here, *others) if address in (f.inputs.get(block), f.recomputed)), here)

    def slot(self, forward: Forward, stage: int) -> Carry | None:
        """What a stage left, also where the stage was compiled and who asks is not, or the other way."""
        captured = compiling()
        found = forward.slots[stage]
        if found is None and not captured and self.shared.compiled:
            self._require_alone()
            found = self.shared.slots[stage]
        elif captured and not self.shared.whole:
            self._require_alone()
        return None if found is None else Carry(*found)

    def leave(self, forward: Forward, stage: int, carry: Carry) -> None:
        """Keep what a stage leaves."""
        forward.slots[stage] = left = tuple(carry)
        if compiling():
            self.shared.compiled = True
            if not self.shared.whole:
                self.pieces = True
        elif not in_backward():
            self.shared.slots[stage], self.shared.compiled = left, False

    def carry_in(self, forward: Forward, x: Tensor, block: int, previous: int, stage: int, reducer: Reducer) -> Carry:
        """What `stage` left for a block into which x comes. Raises UnsupportedError where it is not of this very forward."""
        carry = self.slot(forward, stage)
        recomputes = not compiling() and in_backward()
        if carry is None or not (recomputes or self._ran_last(forward, previous)):
            raise UnsupportedError(
                f"block {block} ran without the blocks before it, but {reducer} needs what they left; call the whole model, or "
                "sv.restore_ it first; after replacing or removing blocks call sv.reduce_ again"
            )
        lost = recomputes and _address(x) not in (forward.inputs.get(block), forward.recomputed)
        if lost and not (carry.bias is None and carry.positions is None and carry.mass is None):
            raise UnsupportedError(
                f"block {block} is recomputed in backward after another forward of the same model replaced what its stages left; "
                f"with {reducer} and activation checkpointing call backward after each forward, or switch it off"
            )
        return carry

    def _ran_last(self, forward: Forward, block: int) -> bool:
        return forward.passed == block or (self.shared.compiled and self.shared.passed == block)

    def passed(self, forward: Forward, block: int, y: Tensor) -> None:
        """Note that a block has run, and what it put out."""
        if compiling():
            forward.passed = block
        elif in_backward():
            forward.recomputed = _address(y)
        else:
            forward.passed = self.shared.passed = block

    def clear(self) -> None:
        """Drop what was left, after the last one who asks for it."""
        self.current().clear()
        self.shared.clear()

    def enter(self) -> None:
        """The model begins. Raises UnsupportedError where pieces compiled apart run in another thread."""
        if compiling():
            self.shared.whole = True
            return
        thread = threading.get_ident()
        with self._lock:
            others = any(other != thread for other in self._inside)
            self.crowded = self.crowded or (others and not self.pieces)
            first = thread not in self._inside
            if not (others and self.pieces):
                self._inside[thread] = self._inside.get(thread, 0) + 1
        if others and self.pieces:
            raise UnsupportedError(_APART)
        if first:
            self.current().clear()  # of what a forward that failed has left
            if self._own.traces:
                self._own.traces[-1].begin()

    def exit(self, done: bool) -> None:
        """The model ends. Raises UnsupportedError where it is done, but another thread was in pieces compiled apart meanwhile."""
        if compiling():
            self.shared.whole = False
            return
        thread = threading.get_ident()
        with self._lock:
            met = self.pieces and self.crowded
            left = self._inside.pop(thread, 1) - 1
            if left:
                self._inside[thread] = left
            self.crowded = self.crowded and bool(self._inside)
        if done and met:
            raise UnsupportedError(_APART)

    def _require_alone(self) -> None:
        if self.crowded:
            raise UnsupportedError(_APART)

    def open_trace(self) -> Trace | None:
        """The innermost trace that is open in this thread; in compiled code, which cannot tell threads, the only one."""
        if not compiling():
            traces = self._own.traces
            return traces[-1] if traces else None
        if self.tracing > 1 and self.trace is None:
            raise UnsupportedError(
                "several threads trace this compiled model, which cannot tell them apart; trace in one at a time"
            )
        return self.trace

    def open(self, trace: Trace) -> None:
        with self._lock:
            alone = self.tracing == len(self._own.traces)
            self._own.traces = (*self._own.traces, trace)
            self.tracing += 1
            self.trace = trace if alone else None

    def close(self, trace: Trace) -> None:
        """Close a trace, in whatever order. Raises ConfigError where another thread opened it."""
        left = list(self._own.traces)
        if trace not in left:
            raise ConfigError("this trace was opened in another thread, where it stays open; enter and leave it in one")
        left.reverse()
        left.remove(trace)
        with self._lock:
            self._own.traces = tuple(reversed(left))
            self.tracing -= 1
            self.trace = left[0] if left and self.tracing == len(left) else None


def _address(x: Tensor) -> int:
    """Where the tensor's data are; 0 for tensors that have none (fake ones, and those inside torch.func transforms)."""
    try:
        return x.data_ptr() if type(x) is Tensor else 0
    except RuntimeError:
        return 0


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def done_with(training: bool) -> bool:
    """Whether no backward can ask for what was left (reentrant checkpointing runs its forward without grad, but in training)."""
    return compiling() or not (training or torch.is_grad_enabled())


def require_gradient(x: Tensor, carry: Carry, heads: nn.Module | None, block: int, reducer: Reducer) -> None:
    """Refuse where decisions have lost their gradient on the way to a block: UnsupportedError."""
    if carry.policy is None or carry.policy.requires_grad or compiling() or heads is None:
        return
    if torch.is_grad_enabled() and x.requires_grad and any(p.requires_grad for p in heads.parameters()):
        raise UnsupportedError(
            f"block {block}: reentrant activation checkpointing loses the gradient of the decisions that {reducer} learns by; use "
            "the other kind (use_reentrant=False; in timm timm.layers.set_reentrant_ckpt(False))"
        )


def warn_if_frozen(x: Tensor, heads: nn.Module) -> None:
    """Say once that a model in training learns while its score heads do not, as adapter libraries leave them."""
    if compiling() or not (torch.is_grad_enabled() and x.requires_grad) or "squeezevit_warned" in vars(heads):
        return
    if not any(p.requires_grad for p in heads.parameters()):
        vars(heads)["squeezevit_warned"] = True
        warnings.warn(
            "the score heads at model.token_reducer are frozen while the model trains, so that which tokens stay is never learned; "
            "with PEFT give modules_to_save=['token_reducer'], or heads.requires_grad_() if they are to learn",
            stacklevel=2,
        )
