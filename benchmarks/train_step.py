"""Time and memory of one training step, reduced against dense with the same teacher; writes benchmarks/results/train_step.json.

Run: python benchmarks/train_step.py [--device cuda --precision bf16]
"""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

import squeezevit as sv
from squeezevit.bench.timing import alternate
from squeezevit.core.running import autocast
from squeezevit.train.objective import Objective
from workshop import Sheet, file_of, say, timing_arguments

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
    parser = timing_arguments(__doc__, batch_size=32, rounds=5)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    teacher = timm.create_model(args.model).eval().requires_grad_(False).to(args.device)
    objective = Objective(nn.CrossEntropyLoss(), teacher=teacher)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device)
    models = {n: sv.reduce_(timm.create_model(args.model), r).train().to(args.device) for n, r in REDUCERS.items()}
    saved = {n: kept_for_backward(lambda m=m: objective(m, images, labels), m) for n, m in models.items()}
    peaks: dict[str, float] = {}

    def step(name: str) -> None:
        cuda = torch.device(args.device).type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with autocast(args.device, args.precision):
            losses = objective(models[name], images, labels)
        losses.total.backward()
        models[name].zero_grad(set_to_none=True)
        if cuda:
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20

    cases = {name: lambda name=name: step(name) for name in models}
    times = alternate(cases, args.rounds, device=args.device, progress=lambda done, most: say(f"round {done} of {most}"))
    setting = {name: getattr(args, name) for name in ("model", "batch_size", "rounds", "device", "precision")}
    sheet = Sheet(args.json or file_of("train_step", args.device), args.device, **setting)
    for name, reducer in REDUCERS.items():
        share, best = times.ratio(name, "dense"), times.best_ratio(name, "dense")
        row = {"name": name, "reducer": repr(reducer), "seconds_best": times.best(name), "of_dense": share, "of_dense_best": best}
        row |= {"kept_for_backward_mib": saved[name], "peak_mib": peaks.get(name)}
        sheet.add(row, f"{name}: {share:.3f} of dense (best {best:.3f}), {saved[name]:.0f} MiB")
    sheet.save()


if __name__ == "__main__":
    main()
