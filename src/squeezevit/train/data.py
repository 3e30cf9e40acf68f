"""Images for training and validation, read so that a run can be resumed and split over processes to the bit.

What is random about an image follows from (seed, epoch, position in the epoch) alone: neither from a worker process nor from
what was read before.
"""

import csv
import hashlib
import math
import os
import random
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from squeezevit.data.folder import ImageFolder, data_config, given_classes, natural_order, printable, read
from squeezevit.errors import DataError
from squeezevit.train.config import AugmentConfig

READERS_REMEDY = "with data.workers=0, or more memory, --resume goes on from the last checkpoint"
TRIES = 64  # neighbours asked in turn for an image that cannot be read


class Item(NamedTuple):
    """One image [3, H, W] and its label; None and -1 where there is none. `failed`: path and reason of what had to be skipped."""

    image: Tensor | None
    label: int
    failed: list[tuple[str, str]]


class Part(NamedTuple):
    """The images of one process in one of the parts that an update is computed in."""

    images: Tensor  # [b, 3, H, W], zeros where there is none
    labels: Tensor  # [b], -1 where there is no image
    failed: list[tuple[str, str]]


class Split(NamedTuple):
    """How an update's images are split: into `accumulate` parts, and each of them over the processes."""

    batch: int  # b, images a process computes at once
    accumulate: int
    processes: int
    rank: int
    workers: int

    @property
    def whole(self) -> int:
        return self.batch * self.accumulate * self.processes


class CsvImages(ImageFolder):
    """Images named by a table with the columns path (relative to it) and label. Classes are the labels of training in natural
    order, unless they are given.

    Raises DataError, quoting the line, for missing columns, empty labels, and labels outside `classes`.
    """

    def __init__(self, table: Path, classes: str | Path | Sequence[str] | None = None, upright: bool = True) -> None:
        self.folder, self.upright, self.numbered, self.unread = table, upright, classes is not None, Counter()
        rows = _rows(table)
        self.classes = natural_order({label for _, _, label in rows}) if classes is None else given_classes(classes)
        known = {name: i for i, name in enumerate(self.classes)}
        for line, _, label in rows:
            if label not in known:
                raise DataError(f"{table}, line {line}: the label {label!r} has no training image; mend it, or leave the line out")
        self.samples = [(str(table.parent / path), known[label]) for _, path, label in rows]


class TrainImages(Dataset[Item]):
    """Augmented images by (epoch, position in the epoch, index); one that cannot be read is replaced by the next in the folder."""

    def __init__(self, source: ImageFolder, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Item:
        epoch, position, index = key
        failed: list[tuple[str, str]] = []
        for step in range(min(TRIES, len(self.source))):
            seed_everything(self.seed, epoch, position)
            sample = self.source[(index + step) % len(self.source)]
            if sample.image is not None:
                return Item(sample.image, sample.label, failed)
            failed.append((printable(self.source.samples[sample.index][0]), str(sample.reason)))
        return Item(None, -1, failed)


class ValImages(Dataset[Item]):
    """Images by index; -1 is padding, and neither it nor an unreadable image has a label."""

    def __init__(self, source: ImageFolder) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Item:
        if index < 0:
            return Item(None, -1, [])
        sample = self.source[index]
        if sample.image is None:
            return Item(None, -1, [(printable(self.source.samples[index][0]), str(sample.reason))])
        return Item(sample.image, sample.label, [])


def open_folder(
    root: str | Path, classes: str | Path | Sequence[str] | None = None, upright: bool = True
) -> tuple[ImageFolder, ImageFolder]:
    """The training and validation images of a folder, transforms still to be set; `classes` and `upright` as `ImageFolder`.

    Raises DataError where they cannot be used.
    """
    root = Path(root)
    if (root / "train.csv").is_file():
        train: ImageFolder = CsvImages(root / "train.csv", classes, upright)
        val: ImageFolder = CsvImages(root / "val.csv", train.classes, upright)
    elif (root / "train").is_dir():
        train, val = (ImageFolder(root, _no_transform, split, classes, upright) for split in ("train", "val"))
    else:
        raise DataError(
            f"{root} has neither train/<class>/<image> nor train.csv; arrange it as {root.name}/train/<class>/<image> and "
            f"{root.name}/val/<class>/<image>, or write train.csv and val.csv with the columns path,label"
        )
    _check_classes(train, val)
    return train, val


def listing(images: ImageFolder) -> str:
    """A digest of names and labels, by which another set of images, or another order of them, is told."""
    root = images.folder if images.folder.is_dir() else images.folder.parent
    digest, prefix = hashlib.sha256(), f"{root}{os.sep}"
    for path, label in images.samples:
        digest.update(os.fsencode(path.removeprefix(prefix)) + b"\0%d\n" % label)
    return digest.hexdigest()


def train_transform(model: nn.Module, config: AugmentConfig, image_size: int | None) -> Any:
    """timm's training transform for `model`, random erasing included: RGB PIL image -> [3, H, W]."""
    own = data_config(model, image_size)
    jitter: Any = config.color_jitter or None
    return create_transform(
        own["input_size"], is_training=True, scale=(config.crop_scale[0], config.crop_scale[1]), hflip=config.hflip,
        vflip=config.vflip, color_jitter=jitter, auto_augment=config.auto_augment, interpolation=own["interpolation"],
        mean=own["mean"], std=own["std"], re_prob=config.erase, re_mode="pixel",
    )  # fmt: skip


def train_batches(images: TrainImages, size: tuple[int, int], split: Split, epoch: int, repeats: int, start: int) -> Iterator[Part]:
    """This process's parts of the epoch's updates from number `start` on; a last incomplete update is left out.

    Raises DataError where `TRIES` neighbouring images in a row cannot be read.
    """
    order = _order(len(images.source), images.seed, epoch, repeats)
    part = split.batch * split.processes
    keys = (
        [(epoch, p, order[p]) for p in range(first + split.rank, first + part, split.processes)]
        for first in range(start * split.whole, len(order) // split.whole * split.whole, part)
    )
    for batch in read(_loader(images, keys, size, split.workers), images.source.folder, READERS_REMEDY):
        if (batch.labels < 0).any():
            path, reason = batch.failed[-1]
            raise DataError(f"{len(batch.failed)} images up to {path} cannot be read ({reason}): replace or remove them")
        yield batch


def val_batches(images: ValImages, size: tuple[int, int], split: Split) -> Iterator[Part]:
    """This process's share of all images, padded to as many whole batches as any other process has."""
    n = len(images.source)
    whole = split.batch * split.processes
    indices = [i if i < n else -1 for i in range(split.rank, math.ceil(n / whole) * whole, split.processes)]
    keys = [indices[i : i + split.batch] for i in range(0, len(indices), split.batch)]
    return read(_loader(images, keys, size, split.workers), images.source.folder, READERS_REMEDY)


def epoch_length(n: int, repeats: int) -> int:
    """Images of one epoch; timm's sampler for repeated augmentation rounds them down to a multiple of 256."""
    return n if repeats == 1 else len(_repeated(n, repeats))


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and torch's generators with a hash of `key`."""
    states = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(states[0]))
    np.random.seed(states[1])
    torch.manual_seed(int(states[2]))


def _loader(images: Any, keys: Iterable[list[Any]], size: tuple[int, int], workers: int) -> DataLoader[Part]:
    return DataLoader(
        images,  # a dataset of items, which `_collate` makes batches of
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=partial(_collate, size),
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def _collate(size: tuple[int, int], items: list[Item]) -> Part:
    nothing = torch.zeros(3, *size)
    images = torch.stack([nothing if item.image is None else item.image for item in items])
    return Part(images, torch.tensor([item.label for item in items]), [f for item in items for f in item.failed])


def _ignore_signals(worker: int) -> None:
    """A Ctrl-C reaches the reading processes too, which must live until the checkpoint is written."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _order(n: int, seed: int, epoch: int, repeats: int) -> list[int]:
    shuffle = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    if repeats == 1:
        return cast(list[int], torch.randperm(n, generator=torch.Generator().manual_seed(shuffle)).tolist())
    sampler = _repeated(n, repeats)
    sampler.set_epoch(shuffle)
    return list(sampler)


def _repeated(n: int, repeats: int) -> Any:
    return RepeatAugSampler(range(n), num_replicas=1, rank=0, num_repeats=repeats)


def _no_transform(image: Any) -> Tensor:
    raise NotImplementedError("the transform is set once the model is there")


def _rows(table: Path) -> list[tuple[int, str, str]]:
    """Line number, path and label of each line."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, (r.get("path") or "").strip(), printable((r.get("label") or "").strip())) for r in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read ({error}); write a UTF-8 table with the columns path,label") from error
    if "path" not in columns or "label" not in columns:
        raise DataError(f"{table} has the columns {', '.join(columns) or 'none'}; its first line must name path,label")
    if not rows:
        raise DataError(f"{table} lists no image; give one line of path,label for each")
    for line, path, label in rows:
        if not path or not label:
            raise DataError(f"{table}, line {line}: {'label' if path else 'path'} is empty; fill it in, or leave the line out")
    return rows


def _check_classes(train: ImageFolder, val: ImageFolder) -> None:
    if len(train.classes) < 2:
        raise DataError(f"{train.folder} has the single class {train.classes[0]!r}; a classifier needs two or more")
    full = {label for _, label in train.samples}
    empty = [name for i, name in enumerate(train.classes) if i not in full]
    if empty:
        raise DataError(f"{train.folder}: no image of {', '.join(empty[:5])}; add some, or leave these classes out")
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        raise DataError(
            f"{train.folder} and {val.folder} differ in their classes ({', '.join(odd[:5])}), so that labels would be mistaken; "
            "give both the same folders, a validation folder may be empty"
        )
