"""Evaluation mode for a while, and the precisions a model can be run in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from squeezevit.errors import ConfigError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Autocast to "bf16" or "fp16" over weights as they are, or nothing for "fp32"; ConfigError on any other name."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
