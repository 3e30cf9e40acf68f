"""All methods at equal multiply-adds: images a second, latency percentiles at batch 1, peak memory.

    python benchmarks/methods.py                      # benchmarks/results/methods_cpu.json
    python benchmarks/methods.py --device cuda --precision bf16
    python benchmarks/methods.py --model vit_small_patch14_dinov2 --image-size 112 --shares 0.65 0.5 0.44 0.35 --times-only \
        --json benchmarks/results/methods_dinov2_112.json        # the model of docs/training-free.md

DeiT-S at 224 pixels, half of the multiply-adds. Alternating rounds in one run; memory of a forward in a process of its own.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import squeezevit as sv
from memory import peak
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.bench.run import forward, images, measure, share_weights
from squeezevit.bench.timing import alternate
from squeezevit.plan import plan_macs
from squeezevit.reducer import Reducer
from squeezevit.reducers.names import LABELS

RESULTS = Path(__file__).parent / "results"
METHODS = ("training-free", "etps", "etps+mass", "dtps", "evit", "dynamicvit", "topk", "tome", "random")


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
            memory = peak(f"sv.{reducer!r}", args.model, args.image_size, args.batch_size)
        out[name] = {"latency_best_ms": 1e3 * times.best(name), "latency_median_ms": median, "latency_p95_ms": high}
        out[name] |= {"peak_mib": memory}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--shares", nargs="*", type=float, default=(0.5,))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--singles", type=int, default=60, help="forwards at batch 1")
    parser.add_argument("--times-only", action="store_true", help="no single images, no memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = timm.create_model(args.model, img_size=args.image_size).to(args.device).eval()
    rows = []
    for share in args.shares:
        reducers = {"identity": sv.Identity(), **{m: plan_macs(model, m, share) for m in METHODS}}
        speeds = measure(
            model, list(reducers.values()), args.batch_size, args.image_size, rounds=args.rounds, precision=args.precision
        )
        more = {} if args.times_only else singles(model, reducers, args)
        for name, speed in zip(reducers, speeds, strict=True):
            row = {"share": share, "method": name, "label": LABELS[name], **asdict(speed), **more.get(name, {})}
            rows.append(row)
            over = "" if speed.overhead_best is None else f", overhead {speed.overhead:.3f} ({speed.overhead_best:.3f})"
            sys.stdout.write(
                f"{LABELS[name]}: {speed.macs_share:.1%} of MACs, speed-up {speed.speedup:.2f} ({speed.speedup_best:.2f}){over} "
                f"{more.get(name, '')}\n"
            )
            sys.stdout.flush()
    setting = {"created": now(), "command": command(), "machine": machine(args.device), "versions": versions(), "model": args.model}
    setting |= {"image_size": args.image_size, "batch_size": args.batch_size, "rounds": args.rounds, "precision": args.precision}
    file = args.json or RESULTS / f"methods_{torch.device(args.device).type}.json"
    file.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
