"""The search behind the training-free preset, on images kept apart from those that are reported on.

    python benchmarks/search.py        # benchmarks/results/search.json

DINOv2 ViT-S/14 without training: schedules first, then the parts of the reducer one at a time. Emoji: a quarter of fold 0 at 112
pixels (training_free.py reports on fold 1). Cells: 96 of the photographs that its probe is fitted on, at 168 pixels. Photographs:
every other crop of four at 224 pixels. Every candidate at the same share of the multiply-adds; mean cosine of features with the
unreduced model's, and over all tasks the mean of log10(1 - cosine), so that no task drowns the others.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import squeezevit as sv
from finetune import DATA, TASKS, Pictures, folds
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.data import dinov2, elpv
from squeezevit.errors import ConfigError
from squeezevit.plan import make_plan
from training_free import TEMPLATES, crops, features

OUT = Path(__file__).parent / "results" / "search.json"
START = sv.Squeeze(score="redundancy", fuse="mass", at="quarters")
QUARTERS = (0, 3, 6, 9)
SCHEDULES: dict[str, dict[str, Any]] = {
    "0, 3, 6, 9, lorentzian": {"at": QUARTERS, "curve": "lorentzian"},
    "0, 3, 6, 9, geometric": {"at": QUARTERS, "curve": "geometric"},
    "0, 3, 6, 9, cosine": {"at": QUARTERS, "curve": "cosine"},
    "every block, lorentzian": {"at": range(12), "curve": "lorentzian"},
    "every block, geometric": {"at": range(12), "curve": "geometric"},
    "0, 2, 4, 6, 8, 10, lorentzian": {"at": range(0, 12, 2), "curve": "lorentzian"},
    "1, 4, 7, 10, lorentzian": {"at": (1, 4, 7, 10), "curve": "lorentzian"},
    "0, 2, 5, 8, lorentzian": {"at": (0, 2, 5, 8), "curve": "lorentzian"},
    "0, 4, 8, lorentzian": {"at": (0, 4, 8), "curve": "lorentzian"},
    "3, 6, 9, geometric": {"at": (3, 6, 9), "curve": "geometric"},
}


PARTS: dict[str, dict[str, Any]] = {
    "score: class attention": {"score": "cls"},
    "score: received attention": {"score": "received"},
    "score: random": {"score": "random"},
    "score: mrmr": {"score": "mrmr"},
    "match: normed tokens": {"match": "normed"},
    "match: keys": {"match": "keys"},
    "fuse: the paper's weights": {"fuse": "cosine"},
    "no bias": {"bias": False},
}


def emoji() -> list[Tensor]:
    pictures, arrays = Pictures(TASKS["emoji"], DATA / "emoji.npz", "cpu"), np.load(DATA / "emoji.npz")
    part = np.flatnonzero(folds(arrays["labels"], arrays["groups"], 3) == 0)[::4]
    return [pictures.batch(torch.from_numpy(b)) for b in np.array_split(part, len(part) // 64 + 1)]


def cells() -> list[Tensor]:
    paths, probabilities, _ = elpv.load_elpv()
    part = elpv.split(probabilities, 800, 600)[0][:96]
    return [elpv.load_batch([paths[i] for i in part[k : k + 32]], 168) for k in range(0, 96, 32)]


def photographs() -> list[Tensor]:
    return list(torch.cat(crops())[::2].split(16))


def candidates() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name: a reducer, and what plan is told beside it."""
    out: dict[str, tuple[Any, dict[str, Any]]] = {name: (START, how) for name, how in SCHEDULES.items()}
    first = next(iter(SCHEDULES.values()))
    out |= {name: (replace(START, **change), first) for name, change in PARTS.items()}
    return out | {"ToMe": (TEMPLATES["ToMe"], {}), "eTPS + mass": (TEMPLATES["eTPS + mass"], {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.35))
    parser.add_argument("--candidates", nargs="*", choices=tuple(candidates()), help="rows of others stay")
    args = parser.parse_args()
    tasks = [(name, dinov2.dinov2_vit_small(size).eval(), size, load()) for name, size, load in
             (("emoji", 112, emoji), ("cells", 168, cells), ("photographs", 224, photographs))]  # fmt: skip
    unreduced = {name: features(model, batches) for name, model, _, batches in tasks}
    chosen = args.candidates or list(candidates())
    old = json.loads(OUT.read_text()) if args.candidates else {"rows": []}
    rows = [r for r in old["rows"] if r["candidate"] not in chosen]
    for candidate in chosen:
        template, how = candidates()[candidate]
        cosines = {}
        for share in args.shares:
            for task, model, size, batches in tasks:
                try:
                    plan = make_plan(model, template, macs=share, image_size=size, **how)
                except ConfigError:
                    continue
                found = features(sv.reduce_(model, plan.reducer), batches)
                sv.restore_(model)
                cosines[task, share] = F.cosine_similarity(found, unreduced[task]).mean().item()
                row = {"candidate": candidate, "task": task, "share": share, "macs_share": plan.macs_share, "n": len(found)}
                rows.append(row | {"cosine": cosines[task, share]})
        far = {s: np.mean([math.log10(1 - v) for (_, share), v in cosines.items() if share == s]) for s in args.shares}
        sys.stdout.write(
            f"{candidate}: " + ", ".join(f"{t} {s:.0%} {v:.4f}" for (t, s), v in cosines.items())
            + "; " + ", ".join(f"{s:.0%} {v:.3f}" for s, v in far.items()) + f"; mean {np.mean(list(far.values())):.3f}\n"
        )  # fmt: skip
        sys.stdout.flush()
    setting = {"created": now(), "command": command(), "machine": machine(), "versions": versions()}
    if args.candidates:
        setting = {**old, "also": [*old.get("also", []), setting]}
    OUT.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
