"""Photographs in class folders, read so that no bad file ends a run.

Layout, as ImageNet's: `root/val/<class>/*` (or `validation`, `valid`, `test`), or `root/<class>/*`. Classes are
numbered in the order of their sorted folder names, images follow sorted by name, those in deeper folders last.
"""

import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from squeezevit.errors import ConfigError, DataError, MissingExtraError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
MAX_ASPECT = 100

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_SPLITS = {"val": ("val", "validation", "valid", "test")}
_EXTRA = 'run `pip install "squeezevit[timm]"`'
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnreadableImage:
    """A file that had to be left out, and why; both are printable text."""

    path: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One file of a folder: `image` [3, H, W] is None exactly where `reason` says why it could not be read."""

    index: int
    image: Tensor | None
    label: int
    reason: str | None


class Batch(NamedTuple):
    """The readable images of one batch: [b, 3, H, W], their labels [b] and their indices in the dataset [b]."""

    images: Tensor
    labels: Tensor
    indices: Tensor


_Collated = tuple[Batch | None, list[tuple[int, str]]]


class ImageFolder(Dataset[Sample]):
    """The images below one folder per class, as `Sample`s; an unreadable one is reported in its sample, never raised.

    `transform` turns an RGB PIL image into a tensor, see `eval_transform`. A folder `val`, `validation`, `valid` or
    `test` in `root` is taken for the split "val", never for a class. Hidden files and folders and unknown suffixes are
    passed over; a class without images keeps its number.

    Raises DataError for a root that is missing, empty or without class folders, or whose classes hold no image.

    >>> photographs = ImageFolder("imagenet", eval_transform(model))  # doctest: +SKIP
    >>> len(photographs), len(photographs.classes)  # doctest: +SKIP
    (50000, 1000)
    """

    def __init__(self, root: str | Path, transform: Callable[[Any], Tensor], split: str = "val") -> None:
        _pillow()
        self.transform = transform
        try:
            self.folder = _split_folder(Path(root), split)
            self.classes = _subfolders(self.folder)
            self.samples = [(path, label) for label, name in enumerate(self.classes) for path in _images(self.folder / name)]
        except OSError as error:
            raise DataError(f"{root} cannot be listed ({error}): make it readable, or point to another folder") from error
        if not self.samples:
            self._refuse_no_images()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        try:
            image = _decode(path)
        except Exception as error:
            return Sample(index, None, label, _reason(error))
        try:
            return Sample(index, self.transform(image), label, None)
        except Exception as error:
            return Sample(index, None, label, f"the transform failed: {_printable(repr(error))}")

    def check_classes(self, model: nn.Module) -> None:
        """Raises DataError where the model's `num_classes` is not the number of class folders."""
        outputs = getattr(model, "num_classes", None)
        if isinstance(outputs, int):
            self.check_outputs(outputs)

    def check_outputs(self, outputs: int) -> None:
        """Raises DataError where `outputs` is not the number of class folders."""
        found = len(self.classes)
        if outputs == 0:
            raise DataError(
                f"the model has no classifier (num_classes=0), but {self.folder} has {found} classes: "
                f"create it with num_classes={found} and load a checkpoint that was trained on them"
            )
        if outputs != found:
            names = ", ".join(self.classes[:3]) + (", ..." if found > 3 else "")
            raise DataError(
                f"{self.folder} has {found} class folders ({names}), but the model has num_classes={outputs}: "
                f"point to a folder with {outputs} classes, or create the model with num_classes={found} and load "
                "a checkpoint trained on them"
            )

    def _refuse_no_images(self) -> None:
        if not self.classes and any(_images(self.folder)):
            raise DataError(
                f"{self.folder} holds images but no class folders: sort them into one folder per class, as in "
                f"{self.folder.name}/<class>/<image>, or point to the folder above if this is a single class"
            )
        if not self.classes:
            raise DataError(f"{self.folder} has no class folders in it: expected {self.folder.name}/<class>/<image>")
        raise DataError(
            f"the {len(self.classes)} class folders of {self.folder} hold no image: expected files ending in {' '.join(SUFFIXES)}"
        )


class Batches:
    """Batches of the readable images of an `ImageFolder`, in its order; may be iterated again.

    `unreadable` lists what the latest pass had to leave out. `num_workers` is a number of reading processes, 0 reads
    in this one; None is half the usable cores, at most 8: without an accelerator, reading and computing share them.

    Raises ConfigError for a batch size below 1 or a negative number of workers, DataError where a worker process dies.
    """

    def __init__(self, dataset: ImageFolder, batch_size: int = 32, num_workers: int | None = None) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: it must be at least 1")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"num_workers={num_workers}: it must be 0 (read in this process) or more")
        self.dataset = dataset
        self.unreadable: list[UnreadableImage] = []
        self._loader = DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=half_the_cores() if num_workers is None else num_workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # without it each pass would draw from the global random stream
        )

    def __iter__(self) -> Iterator[Batch]:
        self.unreadable = []
        for batch, failed in self._collated():
            self.unreadable += [UnreadableImage(_printable(self.dataset.samples[index][0]), reason) for index, reason in failed]
            if batch is not None:
                yield batch

    def _collated(self) -> Iterator[_Collated]:
        loading = iter(self._loader)
        while True:
            try:
                collated = next(loading, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise DataError(f"a process reading {self.dataset.folder} died ({error}): pass num_workers=0") from error
            if collated is None:
                return
            yield collated


def load(
    root: str | Path,
    model: nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    split: str = "val",
    batch_size: int = 32,
    num_workers: int | None = None,
) -> Batches:
    """The batches of a folder as `model` wants them; what can be refused is refused here, before the first batch.

    Raises what `ImageFolder`, `ImageFolder.check_classes`, `eval_transform` and `Batches` raise.

    >>> batches = load("imagenet", model, batch_size=64)  # doctest: +SKIP
    >>> images, labels, indices = next(iter(batches))  # doctest: +SKIP
    """
    dataset = ImageFolder(root, eval_transform(model, image_size), split)
    dataset.check_classes(model)
    return Batches(dataset, batch_size, num_workers)


def eval_transform(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Callable[[Any], Tensor]:
    """timm's evaluation transform for `model` (resize, centre crop, mean and std): RGB PIL image -> [3, H, W].

    The size is `image_size` in pixels (a side, or height and width), else the one the model was made for.

    Raises ConfigError for a size that the model cannot take, MissingExtraError without timm.
    """
    config = data_config(model, image_size)
    from timm.data.transforms_factory import create_transform

    return cast(Callable[[Any], Tensor], create_transform(**config, is_training=False))


def data_config(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """timm's data configuration for `model` (input_size [3, H, W], mean, std, interpolation, crop); raises as `eval_transform`."""
    try:
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise MissingExtraError(f"image transforms need timm ({error}): {_EXTRA}") from error
    config = resolve_model_data_config(model)
    config["input_size"] = (3, *(_checked_size(model, image_size) or config["input_size"][-2:]))
    return cast(dict[str, Any], config)


def read_image(path: str | Path) -> Any:
    """A file as an 8-bit RGB PIL image, as timm and torchvision read it: no EXIF rotation, no alpha, first frame only.

    Departures: 16-bit grey is scaled to 8 bits, where `convert("RGB")` would clip nearly every pixel to white. Refused
    are images beyond Pillow's bomb limit (89 million pixels), sides more than 100 times each other's length (resizing
    would blow them up), 32-bit pixels, which have no fixed range, and rare formats, some of which Pillow opens with
    other programs.

    Raises DataError quoting the path and the reason, MissingExtraError without Pillow.
    """
    _pillow()
    try:
        return _decode(str(path))
    except Exception as error:
        raise DataError(f"{_printable(str(path))} cannot be read ({_reason(error)}): replace or remove it") from error


def _collate(samples: list[Sample]) -> _Collated:
    """The batch, and (index, reason) of what it lacks. Stacked in the worker, which then shares one tensor, not b."""
    failed = [(s.index, s.reason) for s in samples if s.reason is not None]
    read = [(s.index, s.label, s.image) for s in samples if s.image is not None]
    if not read:
        return None, failed
    indices, labels, images = zip(*read, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices)), failed


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(f"reading images needs Pillow ({error}): {_EXTRA}") from error
    return Image


def _decode(path: str) -> Any:
    """Raises whatever Pillow's decoders stumble over, from OSError and SyntaxError to struct.error and MemoryError."""
    pillow = _pillow()
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("empty file (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        with pillow.open(path, formats=_formats()) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels, one side over {MAX_ASPECT} times the other")
            return _to_rgb(image)


@cache
def _formats() -> tuple[str, ...]:
    """Pillow may be built without one of them, and trips over a format that it does not know."""
    pillow = _pillow()
    pillow.init()
    return tuple(name for name in _FORMATS if name in pillow.OPEN)


def _to_rgb(image: Any) -> Any:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        import numpy

        high_byte = (numpy.asarray(image) >> 8).astype(numpy.uint8)
        return _pillow().fromarray(high_byte).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no fixed range, save it with 8 or 16 bits")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, _pillow().UnidentifiedImageError):
        return f"not one of {', '.join(_FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _printable(str(error)) or type(error).__name__


def _printable(text: str) -> str:
    """File names may hold bytes that are not UTF-8, which would break a later print or JSON file."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def sample_images(root: str | Path, most: int, transform: Callable[[Any], Tensor]) -> list[Tensor]:
    """At most so many images of a folder, spread evenly over its sorted files at any depth, unreadable ones left out.

    Raises DataError where fewer than two are readable.
    """
    files = list(_images(Path(root)))
    chosen = files[:: max(len(files) // most, 1)][:most]
    out = []
    for path in chosen:
        try:
            out.append(transform(read_image(path)))
        except DataError as error:
            logger.warning("%s is left out: %s", path, error)
    if len(out) < 2:
        raise DataError(f"{root} holds {len(files)} images, {len(out)} of them readable; give a folder of some tens")
    return out


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}: point to a folder with {split}/<class>/<image> or <class>/<image> in it")
    for name in _SPLITS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    others = [name for name in ("train", *_SPLITS["val"]) if (root / name).is_dir() and _subfolders(root / name)]
    if others:
        raise DataError(f"{root} has {', '.join(others)} but nothing for split={split!r}: point to {root / others[0]}")
    return root


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield f"{parent}{os.sep}{name}"


def _raise(error: OSError) -> None:
    raise error


def half_the_cores(sharing: int = 1) -> int:
    """Reading processes where nothing else is said: half of the usable cores, split over those who share them, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable // 2 // sharing)


def _checked_size(model: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    own = getattr(embed, "img_size", None)
    if image_size is None:
        return _pair(own) if own else None
    size = _pair(image_size)
    if min(size) < 1:
        raise ConfigError(f"image_size={image_size}: it must be at least 1 pixel")
    if own and size != _pair(own) and getattr(embed, "strict_img_size", False):
        raise ConfigError(
            f"image_size={image_size}: the model takes {_pair(own)[0]} x {_pair(own)[1]} pixels only. "
            f"Create it with timm.create_model(..., img_size={image_size}) or with dynamic_img_size=True"
        )
    patch = _pair(getattr(embed, "patch_size", 1))
    if (size[0] % patch[0] or size[1] % patch[1]) and not getattr(embed, "dynamic_img_pad", False):
        raise ConfigError(f"image_size={image_size}: it must be a multiple of the model's patches, {patch[0]} x {patch[1]}")
    return size


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
