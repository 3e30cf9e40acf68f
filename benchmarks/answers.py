"""What fine-tuned models say of the images they are tested on: a file for each fold and seed, and one table of all."""

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.bench.machine import command, now, write_json
from squeezevit.compare.ranks import p_value, ranks
from squeezevit.core.reducer import Reducer
from tasks import TASKS, Pictures, Task
from training import Recipe
from workshop import Sheet, say, standard_error

RIVALS = ("evit", "topk", "tome", "random")


class Answers:
    """Of one fold and seed."""

    def __init__(self, args: argparse.Namespace, task: Task, recipe: Recipe, pictures: Pictures, at: Sequence[int]) -> None:
        self.stem = args.out / f"finetune_{task.name}_{args.fold}_{args.seed}"
        setting = {"task": asdict(task), "recipe": asdict(recipe), "at": at, "fold": args.fold, "seed": args.seed}
        self.sheet = Sheet(self.stem.with_suffix(".json"), args.device, **setting)
        self.where, self.task = f"{task.name} fold {args.fold} seed {args.seed}", task
        self.test, self.rest = np.flatnonzero(pictures.fold == args.fold), np.flatnonzero(pictures.fold != args.fold)
        self.labels = pictures.labels.cpu()[torch.from_numpy(self.test)]
        self.found: dict[str, Tensor] = {}

    def note(self, name: str, share: float, reducer: Reducer, model: nn.Module, found: Tensor, how: dict[str, object]) -> None:
        """A row of what the model says, logits [n, classes]; the dense model's comes first."""
        self.found[name], cost = found, sv.macs(model)
        self.dense_cost = cost if name == "dense" else self.dense_cost
        expected = self.found["dense"].log_softmax(1)
        far = F.kl_div(found.log_softmax(1), expected, reduction="batchmean", log_target=True).item()
        accuracy = (found.argmax(1) == self.labels).double().mean().item()
        row = {"name": name, "method": name.split()[0], "share": share, "reducer": repr(reducer)}
        row |= {"macs_share": cost / self.dense_cost, "accuracy": accuracy, "kl_to_dense": far, **how}
        self.sheet.add(row, f"{self.where} {name}: {100 * accuracy:.1f} {far:.3f} {how}")

    def save(self) -> None:
        """The rows, and beside them all answers: logits of two classes, the class of more."""
        self.sheet.save()
        few = self.task.classes == 2
        small = {name: x.half().numpy() if few else x.argmax(1).numpy().astype(np.uint8) for name, x in self.found.items()}
        np.savez_compressed(self.stem.with_suffix(".npz"), test=self.test, labels=self.labels.numpy(), **small)


def write_tables(folder: Path) -> None:
    """Accuracy, AUROC and KL over all folds and seeds; ranks at each share, and p-values of single paired t-tests, over images."""
    out: dict[str, Any] = {"created": now(), "command": command(), "tasks": {}}
    for task in TASKS.values():
        files = sorted(folder.glob(f"finetune_{task.name}_*.json"))
        if files:
            out["tasks"][task.name] = _table(files, task)
    write_json(folder / "finetune.json", out)
    rows = [{"task": name, **row} for name, content in out["tasks"].items() for row in content["rows"]]
    with (folder / "finetune.csv").open("w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _table(files: list[Path], task: Task) -> dict[str, Any]:
    runs = [(json.loads(f.read_text()), dict(np.load(f.with_suffix(".npz")))) for f in files]
    found = {n for _, arrays in runs for n in arrays} - {"test", "labels"}
    names = [n for n in runs[0][1] if n in found and all(n in arrays for _, arrays in runs)]
    if left := sorted(found - {*names}):
        say(f"{task.name}: not of every fold and seed, and left out: {', '.join(left)}")
    image = np.concatenate([arrays["test"] for _, arrays in runs])
    # seeds of one image are no independent draws: its mean is one
    means = {n: _image_means(image, np.concatenate([_classes(a[n]) == a["labels"] for _, a in runs])) for n in names}
    shares = {n: n.split()[-1] for n in names if n.split()[-1][0].isdigit()}
    places = {}
    for share in {*shares.values()}:
        places |= ranks({n: means[n] for n in names if shares.get(n) == share})
    rows = []
    for n in names:
        own = [next(r for r in setting["rows"] if r["name"] == n) for setting, _ in runs]
        row = {"name": n, "macs_share": own[0]["macs_share"], "reducer": own[0]["reducer"], "accuracy": means[n].mean()}
        row |= {"accuracy_se": standard_error(means[n]), "rank": places.get(n, "")}
        row |= {key: float(np.mean([r[key] for r in own])) for key in ("kl_to_dense", "seconds_per_step")}
        row["auroc"] = float(np.mean([_auroc(a[n], a["labels"]) for _, a in runs])) if task.classes == 2 else ""
        for rival in RIVALS:
            other = f"{rival} {n.split()[-1]}"
            row[f"p_against_{rival}"] = p_value(means[n] - means[other]) if other in names and other != n else ""
        rows.append(row)
    kept = {k: runs[0][0][k] for k in ("created", "machine", "versions", "recipe", "task", "at")}
    return {"images": len(np.unique(image)), "seeds": sorted({setting["seed"] for setting, _ in runs}), **kept, "rows": rows}


def _image_means(image: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.array([right[image == i].mean() for i in np.unique(image)])


def _classes(output: np.ndarray) -> np.ndarray:
    """Classes [n], of logits [n, classes] or of what is kept of them."""
    return output.argmax(1) if output.ndim == 2 else output


def _auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    wide = logits.astype(np.float64)
    return float(roc_auc_score(labels, wide[:, 1] - wide[:, 0]))
