"""The search behind the training-free preset, on images kept apart from those that are reported on.

    python benchmarks/search.py        # benchmarks/results/search.json

DINOv2 ViT-S/14 without training: schedules first, then the parts of the reducer one at a time. Emoji: a quarter of fold 0 at 112
pixels (leaderboard.py reports on fold 1). Cells: 96 of the photographs that its probe is fitted on, at 168 pixels. Photographs:
every other crop of four at 224 pixels. Every candidate at the same share of the multiply-adds; mean cosine of features with the
unreduced model's, and over all tasks the mean of log10(1 - cosine), so that no task drowns the others.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import squeezevit as sv
from squeezevit.core.reducer import Reducer
from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import method
from tasks import Trial, searched
from workshop import RESULTS, Sheet, arguments, earlier, say

START = sv.Squeeze(score="redundancy", fuse="mass", at="quarters")
SCHEDULES: dict[str, tuple[Sequence[int], str]] = {  # stages, and the curve
    "0, 3, 6, 9, lorentzian": ((0, 3, 6, 9), "lorentzian"),
    "0, 3, 6, 9, geometric": ((0, 3, 6, 9), "geometric"),
    "0, 3, 6, 9, cosine": ((0, 3, 6, 9), "cosine"),
    "every block, lorentzian": (range(12), "lorentzian"),
    "every block, geometric": (range(12), "geometric"),
    "0, 2, 4, 6, 8, 10, lorentzian": (range(0, 12, 2), "lorentzian"),
    "1, 4, 7, 10, lorentzian": ((1, 4, 7, 10), "lorentzian"),
    "0, 2, 5, 8, lorentzian": ((0, 2, 5, 8), "lorentzian"),
    "0, 4, 8, lorentzian": ((0, 4, 8), "lorentzian"),
    "3, 6, 9, geometric": ((3, 6, 9), "geometric"),
}
PARTS: dict[str, dict[str, Any]] = {
    "score: class attention": {"score": "cls"},
    "score: received attention": {"score": "received"},
    "score: random": {"score": "random"},
    "score: mrmr": {"score": "mrmr"},
    "match: normed tokens": {"match": "normed"},
    "match: keys": {"match": "keys"},
    "fuse: the paper's weights": {"fuse": "cosine"},
    "fuse: masses at mean length": {"fuse": "length"},
    "no bias": {"bias": False},
}


def candidates() -> dict[str, tuple[Reducer, str | None]]:
    """Name: a reducer, and the curve that its ratios follow."""
    out: dict[str, Any] = {name: (replace(START, at=tuple(at)), curve) for name, (at, curve) in SCHEDULES.items()}
    first, curve = next(iter(out.values()))
    out |= {name: (replace(first, **change), curve) for name, change in PARTS.items()}
    rows = map(method, ("training-free", "class-token", "tome", "etps+mass"))
    return out | {row.label: (row.template(), row.curve) for row in rows}


def rows_of(candidate: str, tasks: dict[str, Trial], shares: list[float]) -> list[dict[str, Any]]:
    """A row for each task and share that the candidate can reach."""
    template, curve = candidates()[candidate]
    rows = []
    for share in shares:
        for task, t in tasks.items():
            try:
                plan = t.plan(template, share, curve)
            except ConfigError:
                continue
            near = t.near(t.features(plan.reducer))
            row = {"candidate": candidate, "task": task, "share": share, "macs_share": plan.macs_share, "n": len(near)}
            rows.append(row | {"cosine": near.mean()})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.35))
    parser.add_argument("--candidates", nargs="*", choices=tuple(candidates()), help="rows of others stay")
    parser.add_argument("--json", type=Path, default=RESULTS / "search.json")
    args = parser.parse_args()
    tasks = searched()
    chosen = args.candidates or list(candidates())
    sheet = Sheet(args.json)
    if args.candidates:
        old = earlier(args.json)
        sheet.rows = [row for row in old.pop("rows", []) if row["candidate"] not in chosen]
        sheet.head = {**old, "also": [*old.get("also", []), sheet.head]} if old else sheet.head
    for candidate in chosen:
        own = rows_of(candidate, tasks, args.shares)
        sheet.rows += own
        far = {s: np.mean([math.log10(1 - row["cosine"]) for row in own if row["share"] == s]) for s in args.shares}
        near = ", ".join(f"{row['task']} {row['share']:.0%} {row['cosine']:.4f}" for row in own)
        distances = ", ".join(f"{share:.0%} {distance:.3f}" for share, distance in far.items())
        say(f"{candidate}: {near}; {distances}; mean {np.mean(list(far.values())):.3f}")
        sheet.save()


if __name__ == "__main__":
    main()
