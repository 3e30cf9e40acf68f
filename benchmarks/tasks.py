"""The tasks of all experiments, once: pictures and labels, how they are split, DINOv2 ViT-S/14 on them, and how it is judged.

Emoji: 68 kinds at 112 pixels, both pictures of an emoji on one side of a split (fetched where missing, never redistributed). Solar
cells: defective or not, at 168 or 112 pixels. Photographs: crops of scikit-image's and scikit-learn's at 224 pixels, no labels.
"""

import io
import json
import math
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.budget.plan import Kind, Plan, make_plan
from squeezevit.core.reducer import Reducer
from squeezevit.data import dinov2, elpv
from squeezevit.data.probe import Probe, cosine, extract, fit_probe, load_images

DATA = Path(__file__).parent / "data"
STRENGTHS = (1e-3, 1e-2, 1e-1)  # of the probe


@dataclass(frozen=True)
class Task:
    """What is trained on."""

    name: str
    classes: int
    folds: int
    image_size: int
    turn: float  # degrees of random rotation
    flip_vertically: bool


TASKS = {
    "emoji": Task("emoji", 68, 3, 112, 10.0, False),
    "cells": Task("cells", 2, 4, 168, 0.0, True),
}


def pack(task: Task, file: Path) -> None:
    """Write a task's pictures, labels and groups into one file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **(_emoji_arrays() if task.name == "emoji" else _cell_arrays(task.image_size)))


def _emoji_arrays() -> dict[str, np.ndarray]:
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


def _cell_arrays(size: int) -> dict[str, np.ndarray]:
    """Photographs [n, size, size] in grey, whether the cell is defective, and a group of its own for each."""
    from PIL import Image

    paths, probabilities, _ = elpv.load_elpv()
    images = [np.asarray(Image.open(p).convert("L").resize((size, size), Image.Resampling.BICUBIC)) for p in paths]
    labels = elpv.is_defective(probabilities).astype(np.int64)
    return {"images": np.stack(images), "labels": labels, "groups": np.arange(len(paths))}


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
    """All images of a task on the device, normalised and augmented there in whole batches."""

    def __init__(self, task: Task, file: Path, device: str = "cpu") -> None:
        arrays = np.load(file)
        images = torch.from_numpy(arrays["images"])
        images = images[..., None].expand(-1, -1, -1, 3) if images.dim() == 3 else images
        self.images = images.permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.from_numpy(arrays["labels"]).to(device)
        self.fold = folds(arrays["labels"], arrays["groups"], task.folds)
        self.task, self.device = task, device

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, 3, S, S]; with a generator, each turned, shifted, scaled and mirrored by chance."""
        size = self.task.image_size
        x = self.images[index.to(self.device)].float() / 255
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        if generator is not None:
            x = self._augment(x, generator)
        return _normalised(x)

    def batches(self, index: np.ndarray, most: int = 64) -> list[Tensor]:
        """The images as they are, in batches of about one size."""
        return [self.batch(torch.from_numpy(part)) for part in np.array_split(index, len(index) // most + 1)]

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


def _normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (elpv.MEAN, elpv.STD))
    return (x - mean) / std


def backbone(task: Task, weights: Path | None) -> nn.Module:
    """DINOv2 ViT-S/14 with a fresh classifier."""
    import timm

    if weights is None:
        model = dinov2.dinov2_vit_small(task.image_size)
    else:
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
        sv.load_checkpoint_(model, {k: v.float() for k, v in torch.load(weights, weights_only=True).items()})
        model.set_input_size(img_size=(task.image_size, task.image_size))
    model.reset_classifier(task.classes)
    return model


@dataclass(frozen=True)
class Trial:
    """A task without training: the unreduced model, images, its features of them, and a probe where there are labels."""

    model: nn.Module
    batches: list[Tensor]
    size: int
    dense: np.ndarray  # [n, C]
    probe: Probe | None = None

    def plan(self, kind: Kind, share: float, curve: str | None = None) -> Plan:
        """The reducer of a kind, by name or by example, that costs this share of the multiply-adds."""
        return make_plan(self.model, kind, macs=share, image_size=self.size, curve=curve)

    def features(self, reducer: Reducer) -> np.ndarray:
        """Of all images under a reducer, [n, C]; the model is left unreduced."""
        found = extract(sv.reduce_(self.model, reducer), self.batches)
        sv.restore_(self.model)
        return found

    def near(self, found: np.ndarray) -> np.ndarray:
        """Cosine of features with the unreduced model's, [n]."""
        return cosine(found, self.dense).astype(np.float64)


Labelled = tuple[list[Tensor], np.ndarray]  # batches, and the labels of all their images


def _emoji() -> tuple[Labelled, Labelled, int]:
    """To fit the probe on, and to test on: fold 1; and the image size."""
    pictures = emoji_pictures()
    labels = pictures.labels.numpy()
    train, test = (np.flatnonzero(pictures.fold != 1), np.flatnonzero(pictures.fold == 1))
    return (pictures.batches(train), labels[train]), (pictures.batches(test), labels[test]), pictures.task.image_size


def emoji_pictures() -> Pictures:
    """All emoji, fetched where they are missing."""
    if not (file := DATA / "emoji.npz").is_file():
        pack(TASKS["emoji"], file)
    return Pictures(TASKS["emoji"], file)


def _cells(size: int = 168) -> tuple[Labelled, Labelled, int]:
    paths, probabilities, _ = elpv.load_elpv()
    labels = elpv.is_defective(probabilities)
    train, test = ((load_images([paths[i] for i in p], size, 40), labels[p]) for p in elpv.split(probabilities, 800, 600))
    return train, test, size


def crops() -> list[Tensor]:
    """Sixteen square crops of each of four photographs."""
    from skimage import data

    return _crops([data.astronaut(), data.chelsea(), data.coffee(), data.rocket()])


def photographs() -> list[Tensor]:
    """The crops on which nothing was chosen, half of which are of photographs that nobody looked at before."""
    from sklearn.datasets import load_sample_images

    return [*torch.cat(crops())[1::2].split(16), *_crops(load_sample_images().images)]


def _crops(photos: Sequence[np.ndarray]) -> list[Tensor]:
    out = []
    for photo in photos:
        x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255
        side = min(x.shape[2:])
        for i in range(16):
            size = side - (i % 4) * side // 8
            top, left = (x.shape[2] - size) * (i // 4) // 3, (x.shape[3] - size) * (i % 4) // 3
            crop = x[..., top : top + size, left : left + size]
            out.append(_normalised(F.interpolate(crop, (224, 224), mode="bicubic", antialias=True)[0].clamp(0, 1)))
    return list(torch.stack(out).split(16))


PROBED: dict[str, Callable[[], tuple[Labelled, Labelled, int]]] = {
    "emoji": _emoji,
    "cells": _cells,
    "cells at 112": partial(_cells, 112),
}
TRIALS = (*PROBED, "photographs")


def trial(name: str) -> Trial:
    """What is reported on: images on which nothing was chosen."""
    if name == "photographs":
        return _unlabelled(photographs(), 224)
    (train, labels), (test, truth), size = PROBED[name]()
    model = dinov2.dinov2_vit_small(size).eval()
    dense = extract(model, test)
    return Trial(model, test, size, dense, fit_probe(extract(model, train), labels, dense, truth, None, 3, STRENGTHS))


def searched() -> dict[str, Trial]:
    """What the preset was searched on: a quarter of the emoji of fold 0, 96 of the probe's cells, every other crop."""
    pictures = emoji_pictures()
    paths, probabilities, _ = elpv.load_elpv()
    cells = [paths[i] for i in elpv.split(probabilities, 800, 600)[0][:96]]
    return {
        "emoji": _unlabelled(pictures.batches(np.flatnonzero(pictures.fold == 0)[::4]), 112),
        "cells": _unlabelled(load_images(cells, 168, 32), 168),
        "photographs": _unlabelled(list(torch.cat(crops())[::2].split(16)), 224),
    }


def _unlabelled(batches: list[Tensor], size: int) -> Trial:
    model = dinov2.dinov2_vit_small(size).eval()
    return Trial(model, batches, size, extract(model, batches))
