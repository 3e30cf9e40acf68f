"""How well plans keep what they promise: shares of the multiply-adds, of the time on this device, and images a second.

    python benchmarks/planner.py        # benchmarks/results/planner.json

DeiT-S at 224 pixels. Profiles are measured afresh; what a plan promises for time is compared with a second measurement of its own,
alternating with the unreduced model, after the plan was made.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm

import squeezevit as sv
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.latency import ratio
from squeezevit.plan import make_plan
from squeezevit.presets import PRESETS
from squeezevit.reducers.names import CURVE

OUT = Path(__file__).parent / "results" / "planner.json"
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ETPS": (sv.ETPS, {}),
    "DTPS": (sv.DTPS, {}),
    "ToMe": (sv.ToMe, {}),
    "preset": (PRESETS["training-free"], {"curve": CURVE["training-free"]}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.4))
    parser.add_argument("--latencies", nargs="*", type=float, default=(0.8, 0.65))
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=(1, 8))
    args = parser.parse_args()
    model = timm.create_model("deit_small_patch16_224").to(args.device).eval()
    rows: list[dict[str, Any]] = []
    for name, (kind, how) in KINDS.items():
        for share in args.shares:
            plan = make_plan(model, kind, macs=share, **how)
            rows.append({"kind": name, "budget": "macs", "asked": share, **asdict(plan), "reducer": repr(plan.reducer)})
            sys.stdout.write(f"{name} macs={share}: {plan}\n")
    for batch in args.batch_sizes:
        for name, (kind, how) in KINDS.items():
            for asked in args.latencies:
                start = time.perf_counter()
                plan = make_plan(model, kind, latency=asked, batch_size=batch, fresh=True, **how)
                took = time.perf_counter() - start
                again = ratio(model, plan.reducer, batch)[1]
                row = {"kind": name, "budget": "latency", "asked": asked, "batch_size": batch, "took_seconds": took}
                rows.append({**row, "again": again, **asdict(plan), "reducer": repr(plan.reducer)})
                sys.stdout.write(f"{name} latency={asked}, batch {batch}: {plan}; {again:.1%} once more; planned in {took:.0f} s\n")
                sys.stdout.flush()
    setting = {"created": now(), "command": command(), "machine": machine(args.device), "versions": versions()}
    OUT.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
