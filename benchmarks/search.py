"""The search behind the training-free preset: schedules, matches and budgets, on images kept apart from those reported on.

    python benchmarks/search.py        # benchmarks/results/search.json

DINOv2 ViT-S/14 without training. Emoji: half of fold 0 at 112 pixels (training_free.py reports on fold 1). Photographs: every other
crop at 224 pixels. Every candidate at the same share of the multiply-adds; mean cosine of features with the unreduced model's.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import squeezevit as sv
from finetune import DATA, TASKS, Pictures, folds
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.data import dinov2
from squeezevit.errors import ConfigError
from squeezevit.plan import make_plan
from training_free import crops, features

OUT = Path(__file__).parent / "results" / "search.json"
SCHEDULES = {
    "every block, geometric": {},
    "every block, linear": {"curve": "linear"},
    "0, 2, 4, 6, 8, 10": {"at": (0, 2, 4, 6, 8, 10)},
    "1, 3, 5, 7, 9, 11": {"at": (1, 3, 5, 7, 9, 11)},
    "0, 3, 6, 9": {"at": (0, 3, 6, 9)},
    "0, 4, 8": {"at": (0, 4, 8)},
    "3, 6, 9": {"at": (3, 6, 9)},
}


def emoji() -> list[Tensor]:
    pictures, arrays = Pictures(TASKS["emoji"], DATA / "emoji.npz", "cpu"), np.load(DATA / "emoji.npz")
    part = np.flatnonzero(folds(arrays["labels"], arrays["groups"], 3) == 0)[::2]
    return [pictures.batch(torch.from_numpy(b)) for b in np.array_split(part, len(part) // 64 + 1)]


def photographs() -> list[Tensor]:
    return list(torch.cat(crops())[::2].split(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.35))
    parser.add_argument("--matches", nargs="*", choices=("tokens", "keys"), default=("tokens", "keys"))
    parser.add_argument("--schedules", nargs="*", choices=tuple(SCHEDULES), default=tuple(SCHEDULES))
    args = parser.parse_args()
    rows = []
    for task, size, batches in (("emoji", 112, emoji()), ("photographs", 224, photographs())):
        model = dinov2.dinov2_vit_small(size).eval()
        dense = features(model, batches)
        for share in args.shares:
            for match in args.matches:
                for schedule in args.schedules:
                    template = sv.Squeeze(score="redundancy", fuse="mass", match=match, at="every")
                    try:
                        plan = make_plan(model, template, macs=share, image_size=size, **SCHEDULES[schedule])
                    except ConfigError:
                        continue
                    found = features(sv.reduce_(model, plan.reducer), batches)
                    sv.restore_(model)
                    cosine = F.cosine_similarity(found, dense)
                    row = {"task": task, "share": share, "match": match, "schedule": schedule, "macs_share": plan.macs_share}
                    rows.append(row | {"n": len(dense), "cosine": cosine.mean().item()})
                    sys.stdout.write(f"{task} {share:.0%} {match} {schedule}: {cosine.mean():.4f}\n")
                    sys.stdout.flush()
    setting = {"created": now(), "command": command(), "machine": machine(), "versions": versions()}
    OUT.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
