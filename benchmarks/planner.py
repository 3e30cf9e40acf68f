"""How well plans keep what they promise: shares of the multiply-adds, of the time on this device, and images a second.

    python benchmarks/planner.py        # benchmarks/results/planner.json

DeiT-S at 224 pixels. Profiles are measured afresh; what a plan promises for time is compared with a second measurement of its own,
alternating with the unreduced model, after the plan was made.
"""

import time
from dataclasses import asdict
from pathlib import Path

import timm

from squeezevit.budget.latency import ratio
from squeezevit.budget.meter import Meter, Setting
from squeezevit.budget.plan import make_plan
from squeezevit.reducers.catalog import method
from workshop import RESULTS, Sheet, arguments

METHODS = ("etps", "dtps", "tome", "training-free")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.4))
    parser.add_argument("--latencies", nargs="*", type=float, default=(0.8, 0.65))
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=(1, 8))
    parser.add_argument("--json", type=Path, default=RESULTS / "planner.json")
    args = parser.parse_args()
    model = timm.create_model("deit_small_patch16_224").to(args.device).eval()
    sheet = Sheet(args.json, args.device)
    for kind in map(method, METHODS):
        for share in args.shares:
            plan = make_plan(model, kind.name, macs=share)
            row = {"kind": kind.name, "budget": "macs", "asked": share, **asdict(plan), "reducer": repr(plan.reducer)}
            sheet.add(row, f"{kind.label} macs={share}: {plan}")
    for batch in args.batch_sizes:
        for kind in map(method, METHODS):
            for asked in args.latencies:
                start = time.perf_counter()
                plan = make_plan(model, kind.name, latency=asked, batch_size=batch, fresh=True)
                took = time.perf_counter() - start
                with Meter(model, Setting(batch)) as meter:
                    again = ratio(meter, plan.reducer)[1]
                row = {"kind": kind.name, "budget": "latency", "asked": asked, "batch_size": batch, "took_seconds": took}
                text = f"{kind.label} latency={asked}, batch {batch}: {plan}; {again:.1%} once more; planned in {took:.0f} s"
                sheet.add({**row, "again": again, **asdict(plan), "reducer": repr(plan.reducer)}, text)
    sheet.save()


if __name__ == "__main__":
    main()
