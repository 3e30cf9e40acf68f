"""What an exception means to the person who typed the command: a message that says what to do, and an exit code."""

from typing import Any

import torch
import typer

from squeezevit.errors import SqueezeViTError

BAD_INPUT, OUR_FAULT = 2, 70
TYPER: Any = typer.BadParameter.__mro__[2]  # ClickException, whichever click typer brings
_MEMORY = "out of memory; choose a smaller --batch-size or --image-size, or another --device"
_NUMBER = "a number is too large; choose a smaller one"
_DEVICE = "the device failed; see to it, or choose --device cpu"
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "unable to allocate", "invalid buffer size")
_OF_DEVICES = ("cuda error", "cudnn", "cublas", "hip error", "mps backend", "mps device", "xpu", "nccl", "' backend.")
_REMEDIES: tuple[tuple[Any, tuple[str, ...], str], ...] = (  # kind; what its text holds, in lower case; what to do
    ((MemoryError, torch.OutOfMemoryError), (), _MEMORY),
    (RuntimeError, _NO_MEMORY, _MEMORY),
    (RecursionError, (), "something is nested too deep to be read; make it flatter"),
    (RuntimeError, ("dataloader worker",), "a process that reads images died; choose --workers 0"),
    (RuntimeError, ("inductor", "dynamo", "c++ compiler"), "torch.compile cannot compile this here; leave --compile out"),
    (RuntimeError, _OF_DEVICES, _DEVICE),
    (RuntimeError, ("overflow",), _NUMBER),
    (OverflowError, (), _NUMBER),
    (UnicodeError, (), "a name or a file is not UTF-8; rename it, or save it as UTF-8"),
    (EOFError, (), "a file ends too early; get it again, or write it again"),
    (ImportError, (), 'a package is missing or broken: run `pip install "squeezevit[demo,train]"`'),
    (OSError, ("no space left", "quota"), "the disk is full; make room, then run the command again"),
    (OSError, (), "a file or the network cannot be used; check what is named here"),
)


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code: 2 where something was given that cannot be used, 70 where the fault is ours."""
    if isinstance(error, SqueezeViTError):
        return str(error), BAD_INPUT
    if isinstance(error, TYPER):
        return _usage(error), BAD_INPUT
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    for kind, parts, remedy in _REMEDIES:
        if isinstance(error, kind) and (not parts or any(part in text.lower() for part in parts)):
            return f"{remedy} ({text})", BAD_INPUT
    return f"{text}; this is a fault of squeezevit; run with SQUEEZEVIT_DEBUG=1 for the traceback", OUR_FAULT


def _usage(error: Any) -> str:
    """What typer has to say of a command line, and where help is."""
    context = getattr(error, "ctx", None)
    told = str(error.format_message())
    return told if context is None else f"{told}\n{context.get_usage()}\nTry '{context.command_path} -h' for help."
