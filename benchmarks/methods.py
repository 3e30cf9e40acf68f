"""All methods at equal multiply-adds: images a second, latency percentiles at batch 1, peak memory.

    python benchmarks/methods.py                      # benchmarks/results/methods_cpu.json
    python benchmarks/methods.py --device cuda --precision bf16
    python benchmarks/methods.py --batch-sizes 1 16 --times-only --methods training-free tome pitome ... \
        --json benchmarks/results/rivals_cpu.json                # overhead of the rivals, docs/speed.md

DeiT-S at 224 pixels, half of the multiply-adds. Alternating rounds in one run; memory of a forward in a process of its own.
"""

import argparse
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import squeezevit as sv
from squeezevit.bench.run import measure
from squeezevit.bench.timing import alternate
from squeezevit.budget.plan import plan_macs
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import forward, images, share_weights
from squeezevit.reducers.catalog import method, methods
from workshop import Sheet, file_of, overhead, peak_memory, timing_arguments

METHODS = tuple(name for name in methods() if name not in ("identity", "evit+norm"))  # as fast as evit


def cuda_peak(model: nn.Module, x: torch.Tensor, precision: str) -> float:
    """MiB that a forward adds to what is allocated on the GPU."""
    run = forward(model, x, precision)
    run()
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    run()
    return (torch.cuda.max_memory_allocated(x.device) - before) / 2**20


def singles(model: nn.Module, reducers: dict[str, Reducer], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of single images, and MiB of a batch."""
    variants = {name: sv.reduce_(share_weights(model), r) for name, r in reducers.items()}
    one = images(model, 1, args.image_size)
    cases = {name: forward(v, one, args.precision) for name, v in variants.items()}
    times = alternate(cases, args.singles, warmup=5, device=args.device)
    out = {}
    for name, reducer in reducers.items():
        median, high = 1e3 * np.percentile(times.seconds[name], (50, 95))
        if torch.device(args.device).type == "cuda":
            memory = cuda_peak(variants[name], images(model, args.batch_size, args.image_size), args.precision)
        else:
            memory = peak_memory(reducer, args.model, args.image_size, args.batch_size)
        out[name] = {"latency_best_ms": 1e3 * times.best(name), "latency_median_ms": median, "latency_p95_ms": high}
        out[name] |= {"peak_mib": memory}
    return out


def main() -> None:
    parser = timing_arguments(__doc__, batch_size=16)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.5,))
    parser.add_argument("--batch-sizes", nargs="*", type=int, help="several, one run each; instead of --batch-size")
    parser.add_argument("--singles", type=int, default=60, help="forwards at batch 1")
    parser.add_argument("--times-only", action="store_true", help="no single images, no memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = timm.create_model(args.model, img_size=args.image_size).to(args.device).eval()
    setting = {name: getattr(args, name) for name in ("model", "image_size", "batch_size", "rounds", "precision")}
    sheet = Sheet(args.json or file_of("methods", args.device), args.device, **setting)
    for share, batch in product(args.shares, args.batch_sizes or [args.batch_size]):
        reducers = {"identity": sv.Identity(), **{m: plan_macs(model, m, share) for m in args.methods}}
        speeds = measure(model, list(reducers.values()), batch, args.image_size, args.rounds, args.precision)
        more = {} if args.times_only else singles(model, reducers, args)
        for name, speed in zip(reducers, speeds, strict=True):
            label, rest = method(name).label, more.get(name, {})
            row = {"share": share, "batch_size": batch, "method": name, "label": label, **asdict(speed), **rest}
            fast = f"speed-up {speed.speedup:.2f} ({speed.speedup_best:.2f}){overhead(speed)}"
            sheet.add(row, f"{label} at batch {batch}: {speed.macs_share:.1%} of MACs, {fast} {rest or ''}")
    sheet.save()


if __name__ == "__main__":
    main()
