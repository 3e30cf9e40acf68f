"""All methods at equal multiply-adds: images a second, latency percentiles at batch 1, peak memory.

    python benchmarks/methods.py                      # benchmarks/results/methods_cpu.json
    python benchmarks/methods.py --device cuda --precision bf16

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

import squeezevit as sv
from memory import peak
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.bench.run import forward, images, measure, share_weights
from squeezevit.bench.timing import alternate
from squeezevit.plan import plan_macs
from squeezevit.reducers.names import LABELS

RESULTS = Path(__file__).parent / "results"
MODEL = "deit_small_patch16_224"
METHODS = ("training-free", "etps", "etps+mass", "dtps", "evit", "dynamicvit", "topk", "tome", "random")


def cuda_peak(model: torch.nn.Module, x: torch.Tensor, precision: str) -> float:
    """MiB that a forward adds to what is allocated on the GPU."""
    run = forward(model, x, precision)
    run()
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    run()
    return (torch.cuda.max_memory_allocated(x.device) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--singles", type=int, default=60, help="forwards at batch 1")
    args = parser.parse_args()
    model = timm.create_model(MODEL).to(args.device).eval()
    reducers = {"identity": sv.Identity(), **{m: plan_macs(model, m, args.share) for m in METHODS}}
    speeds = measure(model, list(reducers.values()), args.batch_size, rounds=args.rounds, precision=args.precision, limits=False)
    variants = {name: sv.reduce_(share_weights(model), r) for name, r in reducers.items()}
    one = images(model, 1)
    singles = alternate(
        {name: forward(v, one, args.precision) for name, v in variants.items()}, args.singles, warmup=5, device=args.device
    )
    rows = []
    for (name, reducer), speed in zip(reducers.items(), speeds, strict=True):
        low, high = np.percentile(singles.seconds[name], (50, 95))
        if torch.device(args.device).type == "cuda":
            memory = cuda_peak(variants[name], images(model, args.batch_size), args.precision)
        else:
            memory = peak(f"sv.{reducer!r}", MODEL, 224, 64)
        row = {"method": name, "label": LABELS[name], **asdict(speed), "latency_best_ms": 1e3 * singles.best(name)}
        row |= {"latency_median_ms": 1e3 * low, "latency_p95_ms": 1e3 * high, "peak_mib": memory}
        rows.append(row)
        sys.stdout.write(
            f"{LABELS[name]}: {speed.macs_share:.1%} of MACs, speed-up {speed.speedup:.2f} ({speed.speedup_best:.2f}), batch 1 "
            f"{row['latency_median_ms']:.1f} ms, 95 % below {row['latency_p95_ms']:.1f} ms, {memory:.0f} MiB\n"
        )
        sys.stdout.flush()
    setting = {"created": now(), "command": command(), "machine": machine(args.device), "versions": versions(), "model": MODEL}
    setting |= {"batch_size": args.batch_size, "rounds": args.rounds, "precision": args.precision, "share": args.share}
    file = RESULTS / f"methods_{torch.device(args.device).type}.json"
    file.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
