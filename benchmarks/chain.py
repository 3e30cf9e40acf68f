"""The whole chain on solar cells: fine-tune unreduced and at a fixed share, export to int8, and count what is lost and gained.

    python benchmarks/chain.py        # benchmarks/results/chain.json

DINOv2 ViT-S/14 at 112 pixels. The share was fixed before any test: 40 % of the multiply-adds. All is trained on three folds of four
and tested on the other, every deployed model by what its own runtime answers. int8 is calibrated on photographs of the training
part. Recipes are those of finetune.py with fewer epochs; times are alternating rounds of all models at batch 16.
"""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import squeezevit as sv
from deploy import exported, of_torch
from finetune import make
from squeezevit.bench.timing import alternate
from tasks import DATA, TASKS, Pictures, backbone, pack
from training import Recipe, train
from workshop import RESULTS, Sheet, arguments, say, standard_error

SIZE, SHARE, BATCH, FOLD = 112, 0.4, 16, 0
FORMATS: dict[str, dict[str, Any] | None] = {
    "torch fp32": None,
    "openvino fp32": {"to": "openvino"},
    "openvino int8": {"to": "openvino", "int8": True},
    "openvino int8 + bf16": {"to": "openvino", "int8": True, "precision": "bf16"},
    "onnx int8": {"to": "onnx", "int8": True},
}


def trained(pictures: Pictures, index: np.ndarray, recipe: Recipe, methods: list[str]) -> dict[str, nn.Module]:
    """The unreduced model, and of its weights one for each method, all fine-tuned."""
    task = pictures.task
    torch.manual_seed(0)
    dense = sv.reduce_(backbone(task, None), sv.Identity())
    say(f"dense: {train(dense, sv.Identity(), pictures, index, recipe, None, 0)}")
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    dense.eval().requires_grad_(False)
    models = {"unreduced": dense}
    for method in methods:
        reducer, model = make(method, SHARE, task, None), backbone(task, None)
        sv.load_checkpoint_(model, state)
        sv.reduce_(model, reducer)
        if method != "training-free":
            say(f"{method}: {train(model, reducer, pictures, index, recipe, dense, 0)}")
        models[method] = model.eval()
    return models


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dense-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["training-free", "class-token"])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=Recipe.precision, help="of the training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS / "chain.json")
    args = parser.parse_args()
    task = replace(TASKS["cells"], image_size=SIZE)
    if not (file := DATA / "cells.npz").is_file():
        pack(TASKS["cells"], file)
    pictures = Pictures(task, file)
    test, rest = (np.flatnonzero(mask) for mask in (pictures.fold == FOLD, pictures.fold != FOLD))
    epochs = {"dense_epochs": args.dense_epochs, "epochs": args.epochs, "anneal_epochs": args.epochs / 3}
    recipe = replace(Recipe(precision=args.precision), **epochs)
    models = trained(pictures, rest, recipe, args.methods)
    calibration = pictures.batch(torch.from_numpy(np.random.RandomState(0).permutation(rest)[:192]))
    images, labels = [batch.numpy() for batch in pictures.batches(test, BATCH)], pictures.labels[torch.from_numpy(test)].numpy()
    sheet = Sheet(
        args.json, share=SHARE, image_size=SIZE, n_test=len(test), recipe=asdict(recipe), batch=BATCH, rounds=args.rounds,
    )  # fmt: skip
    runs: dict[tuple[str, str], Any] = {}
    hits: dict[tuple[str, str], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for (name, model), (kind, how) in ((m, f) for m in models.items() for f in FORMATS.items()):
            where = Path(folder, f"{name}-{kind}")
            run = of_torch(model, kind) if how is None else exported(model, how, calibration, BATCH, SIZE, where)
            runs[name, kind] = run
            hits[name, kind] = np.concatenate([run(batch).argmax(axis=1) for batch in images]) == labels
        x = np.ascontiguousarray(calibration[:BATCH].numpy())
        times = alternate({key: (lambda run=run: run(x)) for key, run in runs.items()}, args.rounds)
    base, macs = next(iter(runs)), sv.macs(models["unreduced"], SIZE)
    for name, kind in runs:
        own, lost = hits[name, kind], 100 * (hits[base].astype(float) - hits[name, kind])
        step = 100 * (hits[name, "torch fp32"].astype(float) - own)
        row = {
            "method": name, "format": kind, "macs_share": sv.macs(models[name], SIZE) / macs, "accuracy": float(own.mean()),
            "loss": float(lost.mean()), "loss_se": standard_error(lost), "of_format": float(step.mean()),
            "of_format_se": standard_error(step), "images_per_second": BATCH / times.median((name, kind)),
            "speedup": 1 / times.ratio((name, kind), base), "speedup_best": 1 / times.best_ratio((name, kind), base),
        }  # fmt: skip
        text = f"{name} {kind}: {100 * row['accuracy']:.1f} %, loss {row['loss']:.1f} ± {row['loss_se']:.1f}, "
        sheet.add(row, text + f"{row['speedup']:.2f}x ({row['speedup_best']:.2f}x)")
    sheet.save()


if __name__ == "__main__":
    main()
