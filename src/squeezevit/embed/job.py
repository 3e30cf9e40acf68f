"""Folders of photographs through a model: reading, decoding and resizing go on while the model computes."""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from squeezevit.data.folder import decoding, image_or_reason, images_in, printable, unread_warning
from squeezevit.data.pixels import Preprocessing
from squeezevit.embed import tables
from squeezevit.embed.engines import Engine
from squeezevit.embed.tables import FEATURES, NOT_FINITE, OK, PREDICTIONS, UNREADABLE, Journal, Row
from squeezevit.errors import ConfigError, DataError
from squeezevit.export.verified import padded

Report = Callable[[str, int, int], None]  # what is done, files done, files in all
SHOWN = 20  # rows, and unreadable files, that a result brings
_ODD = "the model put out a number that is not finite"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How photographs are read.

    batch_size: None: the model's own, or 16. workers: threads that read, decode and resize, 0: this one; None: one a usable core,
    at most 16. upright: turn photographs as their EXIF data say; None: as the bundle says. draft: decode JPEGs at a half, quarter
    or eighth where at least twice the pixels needed remain: at 12 megapixels a fifth of the time, and features of DINOv2 with a
    cosine of 0.9999 (at worst 0.9992, of 19 photographs), which is more than bfloat16 changes. Raises
    ConfigError for what cannot be.
    """

    batch_size: int | None = None
    workers: int | None = None
    upright: bool | None = None
    draft: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: it must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers={self.workers}: it must be 0 (read in this thread) or more")


@dataclass(frozen=True)
class Done:
    """What a run did: counts of files, the first rows and the first that failed; speed of this part of the run, reading included.

    resumed: files that an interrupted run had done before. width: numbers of a feature, None where classes were asked for.
    """

    out: tuple[Path, ...]
    files: int
    read: int
    rows: tuple[Row, ...]
    failed: tuple[Row, ...]
    resumed: int
    images_per_second: float
    width: int | None = None


def predict(
    paths: Sequence[str | Path],
    engine: Engine,
    out: str | Path,
    settings: Settings | None = None,
    top_k: int = 5,
    progress: Report | None = None,
) -> Done:
    """The likely classes of photographs, files or folders of them, as a table `out` (.csv, .json, .parquet).

    A row per file, in order: file, status ("ok", "unreadable", "not finite"), reason, class, probability, and those of the top_k
    likeliest classes. Probabilities are the softmax of the logits in float64, to six digits. An interrupted run goes on from
    `<out>.parts`, and gives the same file to the last byte.

    Raises ConfigError where the model has no classes, `out` cannot be written or another run was begun there; DataError where a
    path does not exist or holds no image.

    >>> predict(["photographs"], open_engine("my-vit"), "classes.csv").read  # doctest: +SKIP
    812
    """
    file, classes = Path(out), engine.card.classes
    if classes is None:
        raise ConfigError(f"the model of {engine.folder} has no classes, so there is nothing to predict; use `squeezevit embed`")
    if top_k < 1:
        raise ConfigError(f"top_k={top_k}: it must be at least 1")
    tables.check_out(file, PREDICTIONS)
    top, run = min(top_k, len(classes)), _Run(engine, settings or Settings(), progress)
    names = _files(paths)
    journal = Journal(file, run.about("predict", {"top-k": top}), _sized(names))
    try:
        seconds, new = run("predicting", names, journal, partial(_classes, engine, classes, top))
        done = _done(journal, (file,), new, seconds)
        journal.finish(lambda to: tables.write_predictions(to, journal.rows(), run.told(), top))
        return done
    finally:
        journal.close()


def embed(
    paths: Sequence[str | Path],
    engine: Engine,
    out: str | Path,
    settings: Settings | None = None,
    append: bool = False,
    progress: Report | None = None,
) -> Done:
    """The features of photographs as a table `out`: .parquet, or .npy [n, C] with `.names.txt` and `.about.json` beside it.

    The model's id is kept with them, as features of two models, or of two exports of one, do not compare. append: add to a table
    that is there, passing over files that are in it, failed ones too. Files that fail are listed, and have no features. Otherwise
    as `predict`.

    Raises ConfigError where the table holds features of another model, or files made ready in another way; DataError where no file
    at all gives features.

    >>> embed(["photographs"], open_engine("my-vit", features=True), "features.npy").width  # doctest: +SKIP
    384
    """
    file = Path(out)
    tables.check_out(file, FEATURES)
    run, names = _Run(engine, settings or Settings(), progress), _files(paths)
    before, inside = _table_before(file, run.told()) if append else ([], set())
    names = [name for name in names if printable(name) not in inside]
    if not names:
        return Done(tuple(tables.beside(file)), 0, 0, (), (), 0, 0.0)  # all of them are in the table
    journal = Journal(file, run.about("embed", {"append": append}), _sized(names), before)
    try:
        seconds, new = run("embedding", names, journal, partial(_features, engine))
        width = journal.width
        if width is None:
            first = next(journal.rows())
            raise DataError(f"none of {len(names)} files gives features; {first['file']}: {first['reason']}")
        done = replace(_done(journal, tuple(tables.beside(file)), new, seconds), width=width)
        journal.finish(lambda to: tables.write_features(to, journal, run.told(), width))
        return done
    finally:
        journal.close()


def _table_before(file: Path, told: Row) -> tuple[list[Path], set[str]]:
    """The files of a table that is added to, and what is in it already. A run that goes on has a copy of the table as it was."""
    kept = tables.parts_of(file) / "before" / file.name
    table = kept if (tables.parts_of(file) / "run.json").is_file() else file
    if not table.exists():
        return [], set()
    about, names = tables.read_about(table)
    for name, now in told.items():
        if (was := about.get(name)) != now:
            raise ConfigError(
                f"{file} holds features with {name} {was}, and this run has {now}: they do not compare. Choose another --out, or "
                "embed everything anew, without --append"
            )
    return tables.beside(table), names


@dataclass(frozen=True)
class _Run:
    engine: Engine
    settings: Settings
    progress: Report | None

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size or self.engine.batch or 16

    @property
    def preprocessing(self) -> Preprocessing:
        upright = self.settings.upright
        return self.engine.card.preprocessing if upright is None else replace(self.engine.card.preprocessing, upright=upright)

    def told(self) -> Row:
        """What a reader of the table must know."""
        how = self.preprocessing.to_dict() | {"draft": self.settings.draft}
        return {"model": self.engine.id, "preprocessing": {k: list(v) if isinstance(v, tuple) else v for k, v in how.items()}}

    def about(self, command: str, more: Row) -> Row:
        """What must be the same for a run to go on."""
        return {"command": command, **self.told(), "engine": self.engine.name, "batch size": self.batch_size, **more}

    def __call__(
        self, what: str, files: list[str], journal: Journal, turn: Callable[[np.ndarray], tuple[list[Row], np.ndarray | None]]
    ) -> tuple[float, int]:
        """Do what is not yet done; seconds, and files of this part of the run."""
        start, before = time.perf_counter(), journal.done
        self._report(what, before, len(files))
        with decoding():
            for group in self._read(files[before:]):
                images = [image for _, image in group if isinstance(image, np.ndarray)]
                results, features = self._results(images, turn)
                found = iter(results)
                rows = [_row(name, image, found) for name, image in group]
                journal.add(rows, features)
                self._report(what, journal.done, len(files))
        return time.perf_counter() - start, len(files) - before

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def _results(
        self, images: list[np.ndarray], turn: Callable[[np.ndarray], tuple[list[Row], np.ndarray | None]]
    ) -> tuple[list[Row], np.ndarray | None]:
        """Rows of the images, which the model sees in batches of one shape."""
        if not images:
            return [], None
        return turn(self.engine.run(padded(np.stack(images), self.batch_size))[: len(images)])

    def _read(self, files: list[str]) -> Iterator[list[tuple[str, np.ndarray | str]]]:
        """Batches of files with their images, or reasons why not."""
        how, workers = self.preprocessing, _workers(self.settings.workers)
        resize = max(how.resize) if isinstance(how.resize, tuple) else how.resize
        read = partial(_image, how=how, at_least=2 * resize if self.settings.draft else None)
        images = zip(files, _ahead(read, files, workers, 2 * self.batch_size + workers), strict=True)
        while group := list(islice(images, self.batch_size)):
            yield group


def _image(path: str, how: Preprocessing, at_least: int | None) -> np.ndarray | str:
    """A file as the model takes it, float32 [3, H, W], or why not."""
    image = image_or_reason(path, how.upright, at_least)
    if isinstance(image, str):
        return image
    try:
        return how(image)
    except Exception as error:
        return f"it cannot be made ready: {printable(repr(error))}"


def _ahead(read: Callable[[str], np.ndarray | str], files: list[str], workers: int, most: int) -> Iterator[np.ndarray | str]:
    """`map` by threads, in order, with at most so many results waiting. Pillow and NumPy let other threads run meanwhile."""
    if workers == 0:
        yield from map(read, files)
        return
    pool, waiting = ThreadPoolExecutor(workers, "reading"), deque[Future[np.ndarray | str]]()
    try:
        for file in files:
            waiting.append(pool.submit(read, file))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _workers(asked: int | None) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, usable) if asked is None else asked


def _row(name: str, image: np.ndarray | str, found: Iterator[Row]) -> Row:
    result = {"status": UNREADABLE, "reason": image} if isinstance(image, str) else next(found)
    return {"file": printable(name), **result}


def _classes(engine: Engine, classes: Sequence[str], top: int, logits: np.ndarray) -> tuple[list[Row], None]:
    if logits.shape[1] != len(classes):
        raise ConfigError(
            f"the model of {engine.folder} puts out {logits.shape[1]} numbers, and its card names {len(classes)} classes; save or "
            "export it again with a name for each"
        )
    return [_likely(row, classes, top) for row in logits.astype(np.float64)], None


def _likely(logits: np.ndarray, classes: Sequence[str], top: int) -> Row:
    """The likeliest classes of one photograph, from its logits float64 [K]."""
    if not np.isfinite(logits).all():
        return {"status": NOT_FINITE, "reason": _ODD}
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-logits, kind="stable")[:top]
    return {"status": OK, "reason": None, "top": [[classes[i], float(f"{shares[i]:.6g}")] for i in best]}


def _features(engine: Engine, features: np.ndarray) -> tuple[list[Row], np.ndarray]:
    finite = np.isfinite(features).all(axis=1)
    failed = {"status": NOT_FINITE, "reason": _ODD}
    return [{"status": OK, "reason": None} if good else failed for good in finite], features[finite]


def _done(journal: Journal, out: tuple[Path, ...], new: int, seconds: float) -> Done:
    counts: Counter[str] = Counter(row["status"] for row in journal.rows())
    failed = islice((row for row in journal.rows() if row["status"] != OK), SHOWN)
    rows = tuple(islice(journal.rows(), SHOWN))
    return Done(out, journal.done, counts[OK], rows, tuple(failed), journal.done - new, new / seconds if new else 0.0)


def _files(paths: Sequence[str | Path]) -> list[str]:
    """Files as they are, folders as the images in them at any depth, each once. What only looks like an image is told of."""
    found: dict[str, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{printable(str(path))} does not exist; give photographs, or folders of them")
        unread: Counter[str] = Counter()
        try:
            inside = list(images_in(path, unread)) if path.is_dir() else [str(path)]
        except OSError as error:
            raise DataError(f"{path} cannot be listed ({error}); make it readable, or point to another folder") from error
        text = unread_warning(path, unread)
        if not inside:
            raise DataError(f"{path} holds no image that can be read here; {text or 'give photographs, or folders of them'}")
        if text:
            logger.warning("%s", text)
        found |= dict.fromkeys(inside)
    if not found:
        raise DataError("no photographs are given; give files, or folders of them")
    return list(found)


def _sized(files: list[str]) -> list[str]:
    """Names with bytes: a file that was changed between two parts of a run is noticed."""
    return [f"{printable(name)} {_size(name)}" for name in files]


def _size(file: str) -> int | str:
    try:
        return Path(file).stat().st_size
    except OSError:
        return "gone"
