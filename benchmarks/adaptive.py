"""Would a budget of each image's own be better than one for all? Redundant images get fewer tokens, at the same mean MACs.

    python benchmarks/adaptive.py        # benchmarks/results/adaptive.json

The training-free preset on emoji (fold 1, as in training_free.py) and solar cells, DINOv2 ViT-S/14. Every image is run at three
budgets; buckets of images of one budget each keep shapes static. An image's bucket follows from the mean uniqueness of its patch
tokens at one block. The block and the direction are chosen on one half of the images and reported on the other. What choosing and
sorting would cost is left out, so that this is more than an adaptive budget could reach.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ttest_1samp
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.plan import make_plan
from squeezevit.presets import PRESETS
from squeezevit.reducers.names import CURVE
from training_free import features, task_of

OUT = Path(__file__).parent / "results" / "adaptive.json"
SHARES = (0.35, 0.5, 0.65)  # of few, of all alike, and of many tokens
BLOCKS = (0, 3)  # stages of the preset


@torch.inference_mode()
def uniqueness(model: nn.Module, batches: list[Tensor]) -> dict[int, np.ndarray]:
    """Mean score of each image's patch tokens at some blocks, of a reduced model."""
    found: dict[int, list[Tensor]] = {b: [] for b in BLOCKS}
    for x in batches:
        with sv.trace(model) as t:
            model(x)
        for stage in t.stages:
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


def compare(name: str, model: nn.Module, batches: list[Tensor], size: int, right) -> dict:
    dense = features(sv.restore_(model), batches)
    plans = [make_plan(model, PRESETS["training-free"], macs=s, image_size=size, curve=CURVE["training-free"]) for s in SHARES]
    hits, cosines = [], []
    for plan in plans:
        found = features(sv.reduce_(model, plan.reducer), batches)
        hits.append(right(found))
        cosines.append(F.cosine_similarity(found, dense).double().numpy())
    measures = uniqueness(sv.reduce_(model, plans[1].reducer), batches)
    hits, cosines, costs = np.array(hits), np.array(cosines), np.array([p.macs_share for p in plans])
    half = np.random.RandomState(0).permutation(len(dense)) < len(dense) // 2

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
        difference = adaptive * 1.0 - fixed
        row |= {"fixed_macs_share": costs[1], "p": float(ttest_1samp(difference, 0).pvalue) if np.ptp(difference) else 1.0}
        rows.append(row)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    return {"shares": SHARES, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=("emoji", "cells"), default=("emoji", "cells"))
    parser.add_argument("--json", type=Path, default=OUT)
    args = parser.parse_args()
    result = {"created": now(), "command": command(), "machine": machine(), "versions": versions()}
    for task in args.tasks:
        model, test, size, right = task_of(task)
        result[task] = compare(task, model, test, size, right)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
