"""Fully sharded training by torch's `fully_shard`, which accelerate calls FSDP version 2.

Files know nothing of it: what is saved is gathered first, and what is loaded is cut afterwards, so that a run may go on with
another number of processes, or without shards. accelerate's own wrapping is not used: it leaves a CPU's processes unsharded,
takes one model only, and finds blocks by a name of which a reduced model has two classes.
"""

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from squeezevit.core.cut import description_of
from squeezevit.errors import ConfigError


def wanted() -> bool:
    """Whether the launcher asks for shards. Raises ConfigError where it asks for what is not supported."""
    asked = [
        name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
    ]
    version = os.environ.get("FSDP_VERSION", "1")
    if asked == ["FSDP"] and version != "2":
        raise ConfigError(f"launched with FSDP version {version}, which is not supported; give accelerate launch --fsdp_version 2")
    if asked not in ([], ["FSDP"]):
        raise ConfigError(
            f"launched with {' and '.join(asked)}, which is not supported; launch plain processes, or accelerate launch --use_fsdp "
            "--fsdp_version 2 where memory is short"
        )
    return bool(asked)


def shard_(models: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Share each model's parameters out over the processes, in place; a block has its own only while it runs.

    What is outside of blocks is gathered for the whole forward: the score heads are called from inside of blocks, where no hook of
    their own would gather them. Parameters keep their precision on the way, so that autocast means what it means elsewhere; what
    leaves the model is float32, as from any model that accelerate prepares.
    """
    plugin = FullyShardedDataParallelPlugin()  # as launched
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    shard = partial(fully_shard, mesh=mesh, offload_policy=plugin.cpu_offload)
    for model in models:
        for block in description_of(model).blocks:
            shard(block, reshard_after_forward=plugin.reshard_after_forward)
        shard(model, reshard_after_forward=False, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))


def whole(state: Any, here: bool) -> Any:
    """A state dict without shards: they are gathered one by one, by all processes together, on the CPU of those with `here`."""

    def gather(shard: DTensor) -> Tensor | None:
        tensor = shard.full_tensor()
        return tensor.cpu() if here else None

    return recursively_apply(gather, state, test_type=lambda value: isinstance(value, DTensor))


def cut(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's whole state dict, with what is shaped as a parameter cut as that parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Any, parameter: Tensor) -> Any:
        if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    parts = {i: {name: part(v, parameters[i]) for name, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": parts}
