"""Without training: every method at equal multiply-adds, on images on which nothing was chosen.

    python benchmarks/training_free.py        # benchmarks/results/training_free.json

DINOv2 ViT-S/14, a linear probe on the unreduced model's features. Emoji at 112 pixels (fetched where they are missing): the preset
was chosen on images of fold 0 (search.py), this tests on fold 1. Solar cells at 168 and 112 pixels: some that the probe is fitted
on were chosen on, none that are tested. Photographs at 224 pixels, how near features stay: those crops of scikit-image's that
search.py did not see, and as many of scikit-learn's two, of which it saw none.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ttest_1samp
from sklearn.linear_model import LogisticRegressionCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import squeezevit as sv
from finetune import DATA, TASKS, Pictures, emoji_arrays, folds
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.data import dinov2, elpv
from squeezevit.plan import make_plan
from squeezevit.presets import PRESETS
from squeezevit.reducer import Reducer
from squeezevit.reducers.names import CURVE

OUT = Path(__file__).parent / "results" / "training_free.json"
RIVALS = ("ToMe", "EViT", "EViT (normalised)", "TopK", "Random")
TEMPLATES: dict[str, Reducer] = {
    "preset": PRESETS["training-free"],
    "eTPS": sv.ETPS(),
    "eTPS + mass": sv.ETPS(mass=True),
    "ToMe": sv.ToMe(),
    "EViT": sv.EViT(),
    "EViT (normalised)": sv.EViT(normalize=True),
    "TopK": sv.TopK(),
    "Random": sv.Random(),
}
CURVES = {"preset": CURVE["training-free"]}


def emoji() -> tuple[list[Tensor], np.ndarray, list[Tensor], np.ndarray, int]:
    """Batches and labels to fit the probe on and to test on, and the image size."""
    file = DATA / "emoji.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **emoji_arrays())
    pictures, arrays = Pictures(TASKS["emoji"], file, "cpu"), np.load(file)
    fold = folds(arrays["labels"], arrays["groups"], 3)
    parts = [np.flatnonzero(fold != 1), np.flatnonzero(fold == 1)]
    train, test = ([pictures.batch(torch.from_numpy(b)) for b in np.array_split(p, len(p) // 64 + 1)] for p in parts)
    return train, arrays["labels"][parts[0]], test, arrays["labels"][parts[1]], 112


def cells(size: int = 168) -> tuple[list[Tensor], np.ndarray, list[Tensor], np.ndarray, int]:
    paths, probabilities, _ = elpv.load_elpv()
    parts = elpv.split(probabilities, 800, 600)
    labels = elpv.is_defective(probabilities)
    train, test = ([elpv.load_batch([paths[i] for i in p[k : k + 40]], size) for k in range(0, len(p), 40)] for p in parts)
    return train, labels[parts[0]], test, labels[parts[1]], size


def crops() -> list[Tensor]:
    """Sixteen square crops of each of four photographs."""
    from skimage import data

    return _crops([data.astronaut(), data.chelsea(), data.coffee(), data.rocket()])


def photographs() -> list[Tensor]:
    """The crops on which nothing was chosen, half of which are of photographs that nobody looked at before."""
    from sklearn.datasets import load_sample_images

    return [*torch.cat(crops())[1::2].split(16), *_crops(load_sample_images().images)]


def _crops(photos: Sequence[np.ndarray]) -> list[Tensor]:
    mean, std = (torch.tensor(v)[:, None, None] for v in (elpv.MEAN, elpv.STD))
    out = []
    for photo in photos:
        x = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        side = min(x.shape[2:])
        for i in range(16):
            size = side - (i % 4) * side // 8
            top, left = (x.shape[2] - size) * (i // 4) // 3, (x.shape[3] - size) * (i % 4) // 3
            crop = x[..., top : top + size, left : left + size]
            out.append((F.interpolate(crop, (224, 224), mode="bicubic", antialias=True)[0].clamp(0, 1) - mean) / std)
    return list(torch.stack(out).split(16))


PROBED = {"emoji": emoji, "cells": cells, "cells at 112": partial(cells, 112)}
TASKS_HERE = (*PROBED, "photographs")


@torch.inference_mode()
def features(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(x) for x in batches])


def task_of(name: str) -> tuple[nn.Module, list[Tensor], int, Callable[[Tensor], np.ndarray] | None]:
    """The unreduced model, batches to test on, the image size, and which images features get right (None: nobody knows)."""
    if name == "photographs":
        return dinov2.dinov2_vit_small(224).eval(), photographs(), 224, None
    train, labels, test, truth, size = PROBED[name]()
    model = dinov2.dinov2_vit_small(size).eval()
    x = features(model, train).numpy()
    scaler = StandardScaler().fit(x)
    probe = LogisticRegressionCV(Cs=[1e-3, 1e-2, 1e-1], cv=3, max_iter=500).fit(scaler.transform(x), labels)
    return model, test, size, lambda found: probe.predict(scaler.transform(found.numpy())) == truth


def compare(
    name: str, model: nn.Module, shares: list[float], batches: list[Tensor], size: int, right, methods: list[str]
) -> list[dict]:
    """A row for each method and share; `right` tells of features which images they get right, or is None."""
    rivals = [r for r in RIVALS if r in methods]
    dense = features(sv.restore_(model), batches)
    expected = None if right is None else right(dense)
    rows = [{"task": name, "method": "unreduced", "share": 1.0, "n": len(dense), **_accuracy(expected, None, {})}]
    for share in shares:
        hits, cosines = {}, {}
        own = []
        for method in methods:
            template = TEMPLATES[method]
            plan = make_plan(model, template, macs=share, image_size=size, curve=CURVES.get(method))
            found = features(sv.reduce_(model, plan.reducer), batches)
            sv.restore_(model)
            cosines[method] = F.cosine_similarity(found, dense).double().numpy()
            hits[method] = None if right is None else right(found)
            own.append(
                {"task": name, "method": method, "share": share, "macs_share": plan.macs_share, "reducer": repr(plan.reducer)}
            )
            sys.stdout.write(
                f"{name} {share:.0%} {method}: cosine {cosines[method].mean():.4f} {_accuracy(hits[method], None, {})}\n"
            )
            sys.stdout.flush()
        for row in own:
            method = row["method"]
            against = {r: hits[r] for r in rivals if r != method} if right is not None else {}
            row |= {"n": len(dense), "cosine": cosines[method].mean(), "cosine_se": _se(cosines[method])}
            row |= _accuracy(hits[method], expected, against)
            row |= {f"p_cosine_{r}": _p(cosines[method] - cosines[r]) for r in rivals if r != method}
        rows += own
    return rows


def _accuracy(hits: np.ndarray | None, dense: np.ndarray | None, against: dict[str, np.ndarray]) -> dict[str, float]:
    if hits is None:
        return {}
    out = {"accuracy": hits.mean(), "accuracy_se": _se(hits)}
    if dense is not None:
        out |= {"loss": (dense * 1.0 - hits).mean(), "loss_se": _se(dense * 1.0 - hits)}
    return out | {f"p_{r}": _p(hits * 1.0 - other) for r, other in against.items()}


def _se(x: np.ndarray) -> float:
    return float(np.std(x, ddof=1) / math.sqrt(len(x)))


def _p(difference: np.ndarray) -> float:
    """Of a paired t-test over images."""
    return float(ttest_1samp(difference, 0.0).pvalue) if np.ptp(difference) else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS_HERE, default=TASKS_HERE)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.44, 0.35))
    parser.add_argument("--methods", nargs="*", choices=tuple(TEMPLATES), default=tuple(TEMPLATES), help="rows of others stay")
    parser.add_argument("--json", type=Path, default=OUT)
    args = parser.parse_args()
    result = json.loads(args.json.read_text()) if args.json.is_file() else {}  # other tasks stay
    for task in args.tasks:
        model, test, size, right = task_of(task)
        rows = compare(task, model, args.shares, test, size, right, args.methods)
        rows = [r for r in result.get(task, {}).get("rows", []) if r["method"] not in {row["method"] for row in rows}] + rows
        setting = {"created": now(), "command": command(), "machine": machine(), "versions": versions()}
        result[task] = {**setting, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
