"""Photographs in class folders, read so that no bad file ends a run.

Layout, as ImageNet's: `root/val/<class>/*` (or `validation`, `valid`, `test`), or `root/<class>/*`. Classes are
numbered in the natural order of their folder names (2 before 10), images follow sorted by name, those in deeper folders last.
"""

import importlib.util
import io
import logging
import os
import re
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from squeezevit.errors import ConfigError, DataError, MissingExtraError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
MAX_ASPECT = 100

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MODERN = {"AVIF": (".avif",), "HEIF": (".heic", ".heif", ".hif")}  # read where Pillow can
_UNREAD = {  # left out, but counted: what cameras and other programs write
    ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".psd", ".psb", ".xcf", ".tga", ".ico",
    ".exr", ".hdr", ".dds", ".svg", ".eps", ".qoi", ".pcx", ".pnm", ".dcm", ".dng", ".raw", ".cr2", ".cr3", ".crw", ".nef", ".nrw",
    ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".rwl",
}  # fmt: skip
_TURNS = {  # EXIF orientations to the names of Pillow's transpositions that undo them
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"
}  # fmt: skip
_SPLITS = {"val": ("val", "validation", "valid", "test")}
_EXTRA = 'run `pip install "squeezevit[timm]"`'
WORKERS_REMEDY = "pass num_workers=0 (--workers 0)"
Read = TypeVar("Read")
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
    passed over; a class without images keeps its number. `unread` counts by suffix the files that look like images but cannot be
    read here, as .heic without pillow-heif.

    classes: the names in the order of the model's outputs, or a file with one name a line; None: the folders in natural order.
    upright: turn photographs as their EXIF data say; see `read_image`.

    Raises DataError for a root that is missing, empty or without class folders, whose classes hold no image, or that has a folder
    which is not among the given classes.

    >>> photographs = ImageFolder("imagenet", eval_transform(model))  # doctest: +SKIP
    >>> len(photographs), len(photographs.classes)  # doctest: +SKIP
    (50000, 1000)
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Tensor],
        split: str = "val",
        classes: str | Path | Sequence[str] | None = None,
        upright: bool = True,
    ) -> None:
        _pillow()
        self.transform, self.upright, self.numbered = transform, upright, classes is not None
        self.unread: Counter[str] = Counter()
        try:
            self.folder = _split_folder(Path(root), split)
            folders = _by_text(self.folder, _subfolders(self.folder))
            self.classes = natural_order(folders) if classes is None else given_classes(classes)
            _require_known(self.folder, folders, self.classes)
            self.samples = [
                (path, label)
                for label, name in enumerate(self.classes)
                if name in folders
                for path in images_in(self.folder / folders[name], self.unread)
            ]
        except OSError as error:
            raise DataError(f"{root} cannot be listed ({error}): make it readable, or point to another folder") from error
        if not self.samples:
            self._refuse_no_images()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        try:
            image = _decode(path, self.upright)
        except Exception as error:
            return Sample(index, None, label, _reason(error, path))
        try:
            return Sample(index, self.transform(image), label, None)
        except Exception as error:
            return Sample(index, None, label, f"the transform failed: {printable(repr(error))}")

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

    def warn(self) -> None:
        """Log what may surprise: classes that others would number otherwise, and images that are left out unread."""
        order = None if self.numbered else _order_warning(self.folder, self.classes)
        for text in filter(None, (order, unread_warning(self.folder, self.unread))):
            logger.warning("%s", text)

    def _refuse_no_images(self) -> None:
        if not self.classes and any(images_in(self.folder)):
            raise DataError(
                f"{self.folder} holds images but no class folders: sort them into one folder per class, as in "
                f"{self.folder.name}/<class>/<image>, or point to the folder above if this is a single class"
            )
        if not self.classes:
            raise DataError(f"{self.folder} has no class folders in it: expected {self.folder.name}/<class>/<image>")
        unread = unread_warning(self.folder, self.unread)
        raise DataError(
            f"the {len(self.classes)} class folders of {self.folder} hold no image: expected files ending in "
            f"{' '.join(_suffixes())}{f'. {unread}' if unread else ''}"
        )


class PlainFolder(ImageFolder):
    """The images of a folder at any depth, in the order of their paths, all of label -1. Raises DataError where there are none."""

    def __init__(self, root: str | Path, transform: Callable[[Any], Tensor], upright: bool = True) -> None:
        _pillow()
        self.transform, self.upright, self.numbered = transform, upright, True
        self.unread, self.folder, self.classes = Counter[str](), Path(root), []
        self.samples = [(path, -1) for path in images_in(self.folder, self.unread)]
        if not self.samples:
            raise DataError(f"{root} holds no image: expected files ending in {' '.join(_suffixes())}")
        self.warn()


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
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=half_the_cores() if num_workers is None else num_workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # without it each pass would draw from the global random stream
        )

    def __iter__(self) -> Iterator[Batch]:
        self.unreadable = []
        for batch, failed in self._collated():
            self.unreadable += [UnreadableImage(printable(self.dataset.samples[index][0]), reason) for index, reason in failed]
            if batch is not None:
                yield batch

    def _collated(self) -> Iterator[_Collated]:
        yield from read(self._loader, self.dataset.folder, WORKERS_REMEDY)


def load(
    root: str | Path,
    model: nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    split: str = "val",
    batch_size: int = 32,
    num_workers: int | None = None,
    classes: str | Path | Sequence[str] | None = None,
    upright: bool = True,
) -> Batches:
    """The batches of a folder as `model` wants them; what can be refused is refused here, before the first batch.

    classes: names in the order of the model's outputs, or a file with one name a line, as `squeezevit train` leaves in
    `classes.txt`. None: the folders in natural order, as timm numbers them; a warning says where sorting as text, as
    torchvision does, would number them otherwise. upright: as `read_image`. Images of unread formats are counted in a warning.

    Raises what `ImageFolder`, `ImageFolder.check_classes`, `eval_transform` and `Batches` raise.

    >>> batches = load("imagenet", model, batch_size=64)  # doctest: +SKIP
    >>> images, labels, indices = next(iter(batches))  # doctest: +SKIP
    """
    dataset = ImageFolder(root, eval_transform(model, image_size), split, classes, upright)
    dataset.check_classes(model)
    dataset.warn()
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


def read_image(path: str | Path, upright: bool = True) -> Any:
    """A file as an 8-bit RGB PIL image, upright: no alpha, first frame only.

    With `upright` a photograph is turned as its EXIF data say, as every viewer shows it. timm and torchvision do not, so that a
    camera's portraits lie on their side there; upright=False does as they do. Decoders of TIFF and HEIF turn it either way.

    Departures: 16-bit grey is scaled to 8 bits, where `convert("RGB")` would clip nearly every pixel to white. Refused
    are images beyond Pillow's bomb limit (89 million pixels), sides more than 100 times each other's length (resizing
    would blow them up), 32-bit pixels, which have no fixed range, and rare formats, some of which Pillow opens with
    other programs. HEIF needs pillow-heif, AVIF a Pillow built with it.

    Raises DataError quoting the path and the reason, MissingExtraError without Pillow.
    """
    _pillow()
    try:
        return _decode(str(path), upright)
    except Exception as error:
        raise DataError(f"{printable(str(path))} cannot be read ({_reason(error, path)}): replace or remove it") from error


def natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order of timm's class folders: numbers in them by value, letters without regard to case.

    >>> natural_order(["class10", "Class2", "class1"])
    ['class1', 'Class2', 'class10']
    """
    return sorted(names, key=lambda name: (_natural(name), name))


def given_classes(classes: str | Path | Sequence[str]) -> list[str]:
    """Class names from a list, or from a file with one a line. Raises DataError where they cannot be used."""
    names = _lines(Path(classes)) if isinstance(classes, str | Path) else [printable(str(name)) for name in classes]
    where = str(classes) if isinstance(classes, str | Path) else "classes"
    if not names:
        raise DataError(f"{where} names no class; give one name a line, in the order of the model's outputs")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where} names {_shorten(twice)} twice; give each class once, in the order of the model's outputs")
    return names


def printable(text: str) -> str:
    """File names may hold bytes that are not UTF-8, line breaks and codes that move a terminal's cursor: they are spelt out."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)


def read(loader: DataLoader[Read], folder: str | Path, remedy: str) -> Iterator[Read]:
    """What a loader's processes read. Raises DataError where one of them dies, and leaves none behind to be told of later."""
    iterator = iter(loader)
    try:
        with reading(folder, remedy):
            yield from iterator
    except (OSError, EOFError) as error:  # the connection to it broke before torch noticed
        raise _died(folder, error, remedy) from error
    finally:
        with suppress(RuntimeError):
            getattr(iterator, "_shutdown_workers", lambda: None)()


@contextmanager
def reading(folder: str | Path, remedy: str) -> Iterator[None]:
    """Turn the death of a reading process, which torch may report at any line, into a DataError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not reader_died(error):
            raise
        raise _died(folder, error, remedy) from error


def _died(folder: str | Path, error: Exception, remedy: str) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"a process reading {folder} died ({reason}): somebody ended it, or memory ran out; {remedy}")


def reader_died(error: BaseException) -> bool:
    """Whether torch says that a process of a DataLoader is gone."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


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


def _decode(path: str, upright: bool) -> Any:
    """Raises whatever Pillow's decoders stumble over, from OSError and SyntaxError to struct.error and MemoryError."""
    with decoding():
        return _decoded(path, upright, None)


@contextmanager
def decoding() -> Iterator[None]:
    """Meanwhile Pillow's warnings are not shown, and that of a bomb is an error, in all threads; to be entered by one alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif|squeezevit\.data)\b")
        warnings.simplefilter("error", _pillow().DecompressionBombWarning)
        _formats()  # found once, before threads ask
        yield


def image_or_reason(path: str, upright: bool = True, at_least: int | None = None, content: bytes | None = None) -> Any:
    """What `read_image` gives, or a text that says why it cannot; many threads may call it, within one `decoding`.

    at_least: pixels that the shorter side needs, so that a JPEG of twice, four or eight times as many may be decoded to fewer.
    content: of the file, where it was read already.
    """
    try:
        return _decoded(path, upright, at_least, content)
    except Exception as error:
        return _reason(error, path)


def _decoded(path: str, upright: bool, at_least: int | None, content: bytes | None = None) -> Any:
    pillow = _pillow()
    if content is None:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        size = status.st_size
    else:
        size = len(content)
    if size == 0:
        raise ValueError("empty file (0 bytes)")
    with pillow.open(path if content is None else io.BytesIO(content), formats=_formats()) as image:
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels, one side over {MAX_ASPECT} times the other")
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        rgb = _to_rgb(image)
        return rgb.transpose(getattr(pillow.Transpose, turn)) if upright and (turn := _turn(image)) else rgb


def _turn(image: Any) -> str | None:
    """The transposition that puts a decoded image upright, None where it is, or where its EXIF data are broken."""
    try:
        return _TURNS.get(image.getexif().get(0x0112))
    except Exception:  # whatever a spoilt tag makes the parser stumble over: the picture itself is good
        return None


@cache
def _formats() -> tuple[str, ...]:
    """Pillow may be built without one of them, and trips over a format that it does not know."""
    pillow = _pillow()
    pillow.init()
    return tuple(name for name in (*_FORMATS, *_modern_formats(pillow.OPEN)) if name in pillow.OPEN)


def _modern_formats(known: Mapping[str, Any]) -> Iterator[str]:
    from PIL import features

    if "AVIF" in known and features.check("avif"):  # it may be known by name alone
        yield "AVIF"
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        yield "HEIF"


@cache
def _suffixes() -> tuple[str, ...]:
    """Suffixes of the files that can be read here."""
    return SUFFIXES + tuple(suffix for name in _formats() for suffix in _MODERN.get(name, ()))


def _to_rgb(image: Any) -> Any:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        import numpy

        high_byte = (numpy.asarray(image) >> 8).astype(numpy.uint8)
        return _pillow().fromarray(high_byte).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no fixed range, save it with 8 or 16 bits")
    return image.convert("RGB")


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, _pillow().UnidentifiedImageError):
        return f"not one of {', '.join(_formats())}{_hint([_suffix(Path(path).name)])}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error)) or type(error).__name__


def evenly(n: int, most: int) -> list[int]:
    """At most so many of n places in a line, as evenly apart as they can be.

    >>> evenly(7, 4)
    [0, 1, 3, 5]
    """
    count = min(most, n)
    return [i * n // count for i in range(count)]


def sample_images(root: str | Path, most: int, transform: Callable[[Any], Tensor], upright: bool = True) -> list[Tensor]:
    """At most so many images of a folder, spread evenly over its sorted files at any depth, unreadable ones left out.

    upright: as for `read_image`. Raises DataError where fewer than two are readable.
    """
    unread: Counter[str] = Counter()
    files = list(images_in(Path(root), unread))
    out = []
    for index in evenly(len(files), most):
        path = files[index]
        try:
            out.append(transform(read_image(path, upright)))
        except DataError as error:
            logger.warning("%s is left out: %s", path, error)
    if len(out) < 2:
        raise DataError(f"{root} holds {len(files)} images, {len(out)} of them readable; give a folder of some tens")
    if text := unread_warning(root, unread):
        logger.warning("%s", text)
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


def _by_text(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Folder names by their printable text, which is what a class is called."""
    out: dict[str, str] = {}
    for name in names:
        if printable(name) in out:
            raise DataError(f"{folder} has two class folders that read {printable(name)}; rename one of them")
        out[printable(name)] = name
    return out


def _require_known(folder: Path, found: Iterable[str], classes: Sequence[str]) -> None:
    unknown = natural_order(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has class folders that are not among the {len(classes)} given classes: {_shorten(unknown)}; add them in the "
            "order of the model's outputs, or move the folders away"
        )


def _natural(name: str) -> list[str | tuple[int, str]]:
    """Text and numbers in turn; a number is told by its length first, so that none is too long."""
    parts = re.split(r"(\d+)", name.lower())
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts)]


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the classes {printable(str(file))} cannot be read ({error}); give UTF-8 text, one name a line") from error
    names = [line.removesuffix("\r") for line in lines]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise DataError(f"{file}, line {names.index('') + 1} is empty, so that later classes would move; fill it in")
    return [printable(name) for name in names]


def _order_warning(folder: Path, classes: Sequence[str]) -> str | None:
    text = sorted(classes)
    if list(classes) == text:
        return None
    return (
        f"{folder}: classes are numbered in natural order, {_shorten(classes)}, as timm does; sorted as text, as torchvision does, "
        f"they would be {_shorten(text)}. If the model was trained in that order, give its class names in a file, --classes FILE"
    )


def unread_warning(folder: str | Path, unread: Mapping[str, int]) -> str | None:
    if not unread:
        return None
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
    return f"{folder}: {sum(unread.values())} image files are left out, as they cannot be read here: {counts}{_hint(unread)}"


def _hint(suffixes: Iterable[str]) -> str:
    """What to do about files of these suffixes."""
    unread = {*suffixes} & _UNREAD - {*_suffixes()}
    heif = unread & {*_MODERN["HEIF"]}
    remedies = ['for HEIF run `pip install "squeezevit[heic]"`'] * bool(heif) + ["convert them to JPEG or PNG"] * (unread > heif)
    return f"; {'; '.join(remedies)}" if remedies else ""


def _shorten(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _suffix(name: str) -> str:
    _, dot, last = name.lower().rpartition(".")
    return dot + last


def images_in(folder: Path, unread: Counter[str] | None = None) -> Iterator[str]:
    """Paths of what can be read; what merely looks like an image is counted in `unread`."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (f"{parent}{os.sep}{name}" for name in sorted(files) if is_image(name, unread))


def is_image(name: str, unread: Counter[str] | None = None) -> bool:
    """Whether a file of this name can be read; one that merely looks like an image is counted in `unread`."""
    suffix = "" if name.startswith(".") else _suffix(name)
    if suffix in _suffixes():
        return True
    if suffix in _UNREAD and unread is not None:
        unread[suffix] += 1
    return False


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
