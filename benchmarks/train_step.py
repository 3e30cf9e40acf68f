"""Time and memory of one training step, reduced against dense with the same teacher; writes benchmarks/results/train_step.json.

Run: python benchmarks/train_step.py [--device cuda --precision bf16]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

import squeezevit as sv
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.modes import autocast
from squeezevit.train.objective import Objective

REDUCERS = {
    "dense": sv.Identity(),
    "DTPS, masked": sv.DTPS(keep=0.5),
    "DTPS, topk": sv.DTPS(keep=0.5, train="topk"),
    "DynamicViT, masked": sv.DynamicViT(keep=0.5),
    "ETPS": sv.ETPS(keep=0.5),
    "ETPS, mass": sv.ETPS(keep=0.5, mass=True),
    "EViT": sv.EViT(keep=0.5),
    "TopK": sv.TopK(keep=0.5),
}


def kept_for_backward(forward: Callable[[], object], model: nn.Module) -> float:
    """MiB of the tensors that one forward keeps for its backward, parameters left out: the same on every device."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(size for at, size in storages.items() if at not in own) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    teacher = timm.create_model(args.model).eval().requires_grad_(False).to(args.device)
    objective = Objective(nn.CrossEntropyLoss(), teacher=teacher)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device)
    models = {n: sv.reduce_(timm.create_model(args.model), r).train().to(args.device) for n, r in REDUCERS.items()}
    seconds: dict[str, list[float]] = {n: [] for n in REDUCERS}
    saved = {n: kept_for_backward(lambda m=m: objective(m, images, labels), m) for n, m in models.items()}
    memory: dict[str, float] = {}

    def step(model: nn.Module) -> None:
        with autocast(args.device, args.precision):
            losses = objective(model, images, labels)
        losses.total.backward()
        model.zero_grad(set_to_none=True)

    for turn in range(args.rounds + 1):  # the first warms up
        for name, model in models.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            step(model)
            if cuda:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 2**20
            if turn:
                seconds[name].append(time.perf_counter() - began)
        sys.stdout.write(f"round {turn} of {args.rounds}\n")
    rows = []
    for name, reducer in REDUCERS.items():
        ratios = [own / dense for own, dense in zip(seconds[name], seconds["dense"], strict=True)]
        rows.append({"name": name, "reducer": repr(reducer), "seconds_best": min(seconds[name])})
        rows[-1] |= {"of_dense": statistics.median(ratios), "of_dense_best": min(seconds[name]) / min(seconds["dense"])}
        rows[-1] |= {"kept_for_backward_mib": saved[name], "peak_mib": memory.get(name)}
        sys.stdout.write(
            f"{name}: {rows[-1]['of_dense']:.3f} of dense (best {rows[-1]['of_dense_best']:.3f}), {saved[name]:.0f} MiB\n"
        )
    result = {
        "created": now(),
        "command": command(),
        "machine": machine(args.device),
        "versions": versions(),
        **vars(args),
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"train_step_{args.device.split(':')[0]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
