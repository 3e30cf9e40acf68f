"""Folders of photographs through a model: reading, decoding and resizing go on while the model computes."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from squeezevit.bundle import Card
from squeezevit.data.folder import decoding, images_in, printable, unread_warning
from squeezevit.data.pixels import Preprocessing
from squeezevit.embed import tables
from squeezevit.embed.engines import Engine
from squeezevit.embed.reading import ahead, at_least, pixels_of, usable_cores
from squeezevit.embed.rows import classes_of, features_of, row_of
from squeezevit.embed.tables import FEATURES, OK, PREDICTIONS, Journal, Row
from squeezevit.errors import ConfigError, DataError
from squeezevit.export.verified import padded

Report = Callable[[str, int, int], None]  # what is done, files done, files in all
SHOWN = 20  # rows, and unreadable files, that a result brings
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

    def preprocessing(self, card: Card) -> Preprocessing:
        """How photographs are made ready for a bundle's model."""
        return card.preprocessing if self.upright is None else replace(card.preprocessing, upright=self.upright)


def told(model: str, how: Preprocessing, draft: bool) -> Row:
    """What a reader of a table must know: the model's id, and how photographs were made ready."""
    values = how.to_dict() | {"draft": draft}
    return {"model": model, "preprocessing": {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def card_sum(card: Card) -> str:
    """A sum of what a bundle says of its model, as its classes, beside what was measured of it and by which versions."""
    values = {k: v for k, v in asdict(card).items() if k not in ("measured", "versions")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


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
    if engine.card.exported.get("puts_out") == "features":
        raise ConfigError(f"{engine.folder} was exported with --features, and puts out no classes; export its model without it")
    if classes is None:
        raise ConfigError(
            f"the bundle {engine.folder} names no classes, so there is nothing to predict; save or export it with them (classes=, "
            "or --classes FILE), or use `squeezevit embed`"
        )
    if top_k < 1:
        raise ConfigError(f"top_k={top_k}: it must be at least 1")
    tables.check_out(file, PREDICTIONS)
    top, run = min(top_k, len(classes)), _Run(engine, settings or Settings(), progress)
    names = _files(paths)
    journal = Journal(file, run.about("predict", {"top-k": top}), _sized(names))
    try:
        seconds, new = run("predicting", names, journal, partial(classes_of, engine, classes, top))
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
        seconds, new = run("embedding", names, journal, partial(features_of, engine))
        width = journal.width
        if width is None:
            first = next(journal.rows())
            journal.forget()
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
        return self.settings.preprocessing(self.engine.card)

    def told(self) -> Row:
        return told(self.engine.id, self.preprocessing, self.settings.draft)

    def about(self, command: str, more: Row) -> Row:
        """What must be the same for a run to go on."""
        own = {"engine": self.engine.name, "batch size": self.batch_size, "card": card_sum(self.engine.card)}
        return {"command": command, **self.told(), **own, **more}

    def __call__(
        self, what: str, files: list[str], journal: Journal, turn: Callable[[np.ndarray], tuple[list[Row], np.ndarray | None]]
    ) -> tuple[float, int]:
        """Do what is not yet done; seconds, and files of this part of the run."""
        start, before = time.perf_counter(), journal.done
        self._report(what, before, len(files))
        with decoding():
            side = self.engine.streams
            answered = ahead(partial(self._answered, turn), self._read(files[before:]), side if side > 1 else 0, side)
            for rows, features in answered:
                journal.add(rows, features)
                self._report(what, journal.done, len(files))
        return time.perf_counter() - start, len(files) - before

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def _answered(
        self, turn: Callable[[np.ndarray], tuple[list[Row], np.ndarray | None]], group: list[tuple[str, np.ndarray | str]]
    ) -> tuple[list[Row], np.ndarray | None]:
        """Rows of a batch of files, those that were not read among them, and features."""
        results, features = self._results([image for _, image in group if isinstance(image, np.ndarray)], turn)
        found = iter(results)
        return [row_of(name, image, found) for name, image in group], features

    def _results(
        self, images: list[np.ndarray], turn: Callable[[np.ndarray], tuple[list[Row], np.ndarray | None]]
    ) -> tuple[list[Row], np.ndarray | None]:
        """Rows of the images, which the model sees in batches of one shape."""
        if not images:
            return [], None
        return turn(self.engine.run(padded(np.stack(images), self.batch_size))[: len(images)])

    def _read(self, files: list[str]) -> Iterator[list[tuple[str, np.ndarray | str]]]:
        """Batches of files with their images, or reasons why not."""
        how, asked = self.preprocessing, self.settings.workers
        workers = min(16, usable_cores()) if asked is None else asked
        read = partial(_image, how=how, at_least=at_least(how, self.settings.draft))
        images = zip(files, ahead(read, files, workers, 2 * self.batch_size + workers), strict=True)
        while group := list(islice(images, self.batch_size)):
            yield group


def _image(path: str, how: Preprocessing, at_least: int | None) -> np.ndarray | str:
    """A file as the model takes it, float32 [3, H, W], or why not."""
    pixels = pixels_of(path, how, at_least)
    return pixels if isinstance(pixels, str) else how.scaled(pixels)


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
    """Names with bytes and times: a file that was changed between two parts of a run is noticed."""
    return [f"{printable(name)} {_stamp(name)}" for name in files]


def _stamp(file: str) -> str:
    try:
        found = Path(file).stat()
    except OSError:
        return "gone"
    return f"{found.st_size} {found.st_mtime_ns}"
