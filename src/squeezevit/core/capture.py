"""Whether this thread's code is compiled or exported. torch's own flags are one for all threads, and up while any compiles."""

import torch

_exports = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 does not tell the two apart


def compiling() -> bool:
    """Whether torch.compile or torch.export captures what runs here."""
    return torch.compiler.is_dynamo_compiling() or exporting()


def exporting() -> bool:
    """Whether torch.export captures what runs here (before torch 2.11: or torch.compile does)."""
    return bool(_exports()) and (torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0)
