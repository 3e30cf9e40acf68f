"""Would a budget of each image's own be better than one for all? Redundant images get fewer tokens, at the same mean MACs.

    python benchmarks/adaptive.py        # benchmarks/results/adaptive.json

The training-free preset on emoji (fold 1, as in leaderboard.py) and solar cells, DINOv2 ViT-S/14. Every image is run at three
budgets; buckets of images of one budget each keep shapes static. An image's bucket follows from the mean uniqueness of its patch
tokens at one block. The block and the direction are chosen on one half of the images and reported on the other. What choosing and
sorting would cost is left out, so that this is more than an adaptive budget could reach.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import squeezevit as sv
from squeezevit.bench.machine import header, write_json
from squeezevit.compare.ranks import p_value
from squeezevit.core.reducer import Reducer
from tasks import Trial, trial
from workshop import RESULTS, arguments, say

SHARES = (0.35, 0.5, 0.65)  # of few, of all alike, and of many tokens
BLOCKS = (0, 3)  # stages of the preset


@torch.inference_mode()
def uniqueness(t: Trial, reducer: Reducer) -> dict[int, np.ndarray]:
    """Mean score of each image's patch tokens at some blocks, under a reducer."""
    found: dict[int, list[Tensor]] = {b: [] for b in BLOCKS}
    model = sv.reduce_(t.model, reducer)
    for x in t.batches:
        with sv.trace(model) as traced:
            model(x)
        for stage in traced.stages:
            if stage.block in found:
                found[stage.block].append(stage.scores.mean(dim=1))
    return {b: torch.cat(parts).numpy() for b, parts in found.items()}


def buckets(measure: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The budget of each image: the third with the lowest measure gets the fewest tokens, as many images the most as pay for it."""
    order, n = np.argsort(measure), len(measure)
    low, middle, high = costs
    few = n // 3
    many = int(few * (middle - low) / (high - middle))
    out = np.full(n, 1)
    out[order[:few]] = 0
    out[order[n - min(many, n - few) :]] = 2
    return out


def compare(name: str, t: Trial) -> dict[str, Any]:
    plans = [t.plan("training-free", share) for share in SHARES]
    found = [t.features(plan.reducer) for plan in plans]
    hits, cosines = np.array([t.probe.hits(f) for f in found]), np.array([t.near(f) for f in found])
    costs = np.array([plan.macs_share for plan in plans])
    measures = uniqueness(t, plans[1].reducer)
    half = np.random.RandomState(0).permutation(len(t.dense)) < len(t.dense) // 2

    def outcome(measure: np.ndarray, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        return values[buckets(measure[images], costs), np.flatnonzero(images)]

    directed = {(block, sign): sign * m for block, m in measures.items() for sign in (1, -1)}
    rows = []
    for what, values in (("accuracy", hits), ("cosine", cosines)):
        chosen = max(directed, key=lambda k: outcome(directed[k], half, values).mean())
        adaptive, fixed = outcome(directed[chosen], ~half, values), values[1, ~half]
        spent = costs[buckets(directed[chosen][~half], costs)].mean()
        row = {"task": name, "measure": what, "block": chosen[0], "unique_images_get": "more" if chosen[1] > 0 else "fewer"}
        row |= {"n": int((~half).sum()), "fixed": fixed.mean(), "adaptive": adaptive.mean(), "macs_share": spent}
        row |= {"fixed_macs_share": costs[1], "p": p_value(adaptive * 1.0 - fixed)}
        rows.append(row)
        say(f"{row}")
    return {"shares": SHARES, "rows": rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="*", choices=("emoji", "cells"), default=("emoji", "cells"))
    parser.add_argument("--json", type=Path, default=RESULTS / "adaptive.json")
    args = parser.parse_args()
    result = header()
    for task in args.tasks:
        result[task] = compare(task, trial(task))
        write_json(args.json, result)


if __name__ == "__main__":
    main()
