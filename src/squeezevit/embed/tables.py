"""Tables of classes and of features, and the journal beside one that is still being written, from which a run goes on."""

import errno
import importlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from squeezevit.errors import CheckpointError, ConfigError, DataError, MissingExtraError, SqueezeViTError

Row = dict[str, Any]  # file, status and reason; "top": [[class, probability], ...] of a file whose status is OK
Features = Iterator[np.ndarray]  # one [C] for each row that is OK
OK, UNREADABLE, NOT_FINITE = "ok", "unreadable", "not finite"
PREDICTIONS, FEATURES = (".csv", ".json", ".parquet"), (".npy", ".parquet")
GROUP = 4096  # rows of a Parquet file that are written together
_ROWS, _BLOCKS = "rows.jsonl", "features.f32"  # of a journal: a line a batch, and the features it tells of
_ABOUT = "squeezevit"  # key of a Parquet file's metadata


class Journal:
    """What a run has done so far, in the folder `<out>.parts`: whole batches only, so that a run that ended anywhere goes on.

    out: the table to be. run: by names people know, what must be the same for the run to go on. files: what is run, in order.
    before: files of an old table to which this one is added.

    Raises ConfigError where the folder cannot be written, holds another run, or another process writes to it.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], files: Sequence[str], before: Sequence[Path] = ()) -> None:
        self.out, self.folder, self.run = out, parts_of(out), dict(run)
        try:
            self._begin(list(files), before)
            self._rows, self._features = ((self.folder / name).open("ab", buffering=0) for name in (_ROWS, _BLOCKS))
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose a file in a folder of your own") from error
        if not locked(self._rows):
            self.close()
            raise ConfigError(f"another process is writing {out}; wait for it, or choose another --out")
        self.done = 0  # files
        self.width: int | None = None  # numbers of a feature, once there is one
        self._go_on()

    def _begin(self, files: list[str], before: Sequence[Path]) -> None:
        """Write down what is run, or see that it is what was."""
        note, listed = self.folder / "run.json", json.dumps(files)
        if note.is_file():
            self._require_same(json.loads(note.read_text(encoding="utf-8")), files)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "before").mkdir(parents=True)
        for file in before:
            shutil.copy(file, self.folder / "before")
        (self.folder / "files.json").write_text(listed, encoding="utf-8")
        beside = note.with_suffix(".new")
        beside.write_text(json.dumps(self.run), encoding="utf-8")
        beside.replace(note)

    def _require_same(self, began: Row, files: list[str]) -> None:
        remedy = f"run the command as it was begun, or remove {self.folder} to begin anew"
        for name in [*began, *(name for name in self.run if name not in began)]:
            was, now = began.get(name), json.loads(json.dumps(self.run.get(name)))
            if was != now:
                raise ConfigError(f"{self.folder} holds the beginning of a run with {name} {was}, and this one has {now}; {remedy}")
        listed = json.loads((self.folder / "files.json").read_text(encoding="utf-8"))
        if listed != files:
            i = next((i for i, (a, b) in enumerate(zip(listed, files, strict=False)) if a != b), min(len(listed), len(files)))
            was, now = (names[i] if i < len(names) else "nothing" for names in (listed, files))
            raise ConfigError(
                f"{self.folder} holds the beginning of a run over {len(listed)} files, and now there are {len(files)}; file "
                f"{i + 1} was {was}, and is {now} (name, bytes, time of writing); put the files back, with their times (cp -a, "
                f"rsync -t), and {remedy}"
            )

    def _go_on(self) -> None:
        """Pass over all whole batches, and cut off what comes after them."""
        good = kept = 0
        with (self.folder / _ROWS).open("rb") as lines, (self.folder / _BLOCKS).open("rb") as features:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    batch = json.loads(line)
                    block = features.read(batch["bytes"])
                    if line.endswith(b"\n") and len(block) == batch["bytes"] and zlib.crc32(block) == batch["sum"]:
                        good, kept = good + len(line), kept + len(block)
                        self._count(batch["rows"], len(block))
                        continue
                break
        self._rows.truncate(good)
        self._features.truncate(kept)

    def add(self, rows: list[Row], features: np.ndarray | None = None) -> None:
        """One batch: its rows, and float32 [n, C] of those that are OK. It is done once its line ends."""
        block = b"" if features is None else np.ascontiguousarray(features, "<f4").tobytes()
        line = {"rows": rows, "bytes": len(block), "sum": zlib.crc32(block)}
        _whole(self._features, block)
        _whole(self._rows, json.dumps(line).encode() + b"\n")
        self._count(rows, len(block))

    def _count(self, rows: list[Row], size: int) -> None:
        self.done += len(rows)
        if size:
            self.width = size // 4 // sum(row["status"] == OK for row in rows)

    def rows(self) -> Iterator[Row]:
        """All rows so far, in order."""
        with (self.folder / _ROWS).open("rb") as lines:
            for line in lines:
                yield from json.loads(line)["rows"]

    def features(self, width: int) -> Features:
        """The features of all rows that are OK, float32 [C] each."""
        with (self.folder / _BLOCKS).open("rb") as content:
            while block := content.read(4 * width):
                yield np.frombuffer(block, "<f4")

    def before(self) -> Path | None:
        """The old table to which this one is added, if there is one."""
        file = self.folder / "before" / self.out.name
        return file if file.is_file() else None

    def finish(self, write: Callable[[Path], None]) -> None:
        """Put the table in place: `write` writes it, and what belongs beside it, into a folder, whose files are then moved."""
        new = self.folder / "joined"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write(new / self.out.name)
        for file in sorted(new.iterdir()):
            file.replace(self.out.parent / file.name)
        self.forget()

    def forget(self) -> None:
        """Take the journal away: its table is in place, or what is done is of no use."""
        self.close()
        (self.folder / "run.json").unlink()  # first: without it what is left of the folder is no run, and is begun anew
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """What is done so far stays where it is."""
        self._rows.close()
        self._features.close()


def parts_of(out: Path) -> Path:
    """The folder with the journal of a table."""
    return out.with_name(f"{out.name}.parts")


def _whole(file: IO[bytes], content: bytes) -> None:
    """Write all of it: an unbuffered file may take less at a time."""
    while content:
        content = content[file.write(content) :]


def locked(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; False where another process holds it. Windows and some file systems have no such lock."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # file systems without locks
            raise
    return True


def check_out(out: Path, suffixes: Sequence[str]) -> None:
    """Raises ConfigError, before any work, for a table that cannot be written; MissingExtraError where pyarrow is missing."""
    if out.suffix not in suffixes:
        raise ConfigError(f"--out {out} is none of the kinds that are written; choose a name that ends in {', '.join(suffixes)}")
    if out.suffix == ".parquet":
        _pyarrow()
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written; choose a file in a folder that exists")


def write_predictions(file: Path, rows: Iterable[Row], about: Row, top: int) -> None:
    """Files, status, reason, the class and its probability, and the next likely ones, as `file` ends in .csv, .json or .parquet."""
    if file.suffix == ".csv":
        _predictions_csv(file, rows, top)
    elif file.suffix == ".json":
        _predictions_json(file, rows, about)
    else:
        _write_parquet(file, prediction_kinds(), map(flat, rows), about)


def prediction_kinds() -> Row:
    """The columns of predictions in a Parquet file."""
    arrow = _pyarrow()
    text, number = arrow.string(), arrow.float64()
    kinds = {"file": text, "status": text, "reason": text, "class": text, "probability": number}
    return kinds | {"top_classes": arrow.list_(text), "top_probabilities": arrow.list_(number)}


def feature_kinds(width: int) -> Row:
    """The columns of features of so many numbers in a Parquet file."""
    text = _pyarrow().string()
    return {"file": text, "status": text, "reason": text, "features": _pyarrow().list_(_pyarrow().float32(), width)}


def flat(row: Row) -> Row:
    """Predictions as a row of a Parquet file."""
    top = row.get("top") or []
    classes, probabilities = zip(*top, strict=True) if top else (None, None)
    best = top[0] if top else (None, None)
    more = {"class": best[0], "probability": best[1], "top_classes": classes, "top_probabilities": probabilities}
    return {**{name: row[name] for name in ("file", "status", "reason")}, **more}


def _predictions_csv(file: Path, rows: Iterable[Row], top: int) -> None:
    import csv

    ranks = [name for i in range(1, top + 1) for name in (f"class_{i}", f"probability_{i}")]
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["file", "status", "reason", "class", "probability", *ranks[2:]])
        for row in rows:
            cells = [cell for pair in row.get("top", ()) for cell in pair]
            table.writerow([row["file"], row["status"], row["reason"], *cells, *[""] * (2 * top - len(cells))])


def _predictions_json(file: Path, rows: Iterable[Row], about: Row) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.write(json.dumps(about, ensure_ascii=False)[:-1] + ', "rows": [')
        for i, row in enumerate(rows):
            top = [{"class": name, "probability": probability} for name, probability in row.get("top", ())]
            best = top[0] if top else {"class": None, "probability": None}
            told = {"file": row["file"], "status": row["status"], "reason": row["reason"], **best, "top": top}
            out.write((",\n" if i else "\n") + json.dumps(told, ensure_ascii=False))
        out.write("\n]}\n")


def write_features(file: Path, journal: Journal, about: Row, width: int) -> None:
    """The features of a run after those of the table it is added to; `read_about` says what stands in which file."""
    old = journal.before()
    if file.suffix == ".parquet":
        _features_parquet(file, journal, about, width, old)
        return
    names, unreadable = [], []
    if old is not None:
        names, unreadable = _lines(_names_of(old)), json.loads(_about_of(old).read_text(encoding="utf-8"))["unreadable"]
    for row in journal.rows():
        if row["status"] == OK:
            names.append(row["file"])
        else:
            unreadable.append(row)
    with file.open("wb") as out:
        head = {"descr": "<f4", "fortran_order": False, "shape": (len(names), width)}
        np.lib.format.write_array_header_1_0(out, head)
        if old is not None:
            _of_width(np.load(old, mmap_mode="r"), width, journal.out).tofile(out)
        with (journal.folder / _BLOCKS).open("rb") as content:
            shutil.copyfileobj(content, out)
    _names_of(file).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    text = json.dumps({**about, "unreadable": unreadable}, indent=1, ensure_ascii=False)
    _about_of(file).write_text(text + "\n", encoding="utf-8")


def _of_width(features: np.ndarray, width: int, out: Path) -> np.ndarray:
    if features.dtype != np.float32 or features.shape[1:] != (width,):
        raise DataError(
            f"{out} holds {features.dtype} {features.shape}, and the model gives float32 of {width} numbers; leave --append out"
        )
    return features


def _features_parquet(file: Path, journal: Journal, about: Row, width: int, old: Path | None) -> None:
    def rows() -> Iterator[Row]:
        if old is not None:
            for group in _parquet().ParquetFile(old).iter_batches(GROUP):
                yield from group.to_pylist()
        features = journal.features(width)
        for row in journal.rows():
            yield {**row, "features": next(features) if row["status"] == OK else None}

    _write_parquet(file, feature_kinds(width), rows(), about)


def _write_parquet(file: Path, kinds: Row, rows: Iterator[Row], about: Row) -> None:
    arrow = _pyarrow()
    schema = arrow.schema(list(kinds.items()), metadata={_ABOUT: json.dumps(about)})
    with _parquet().ParquetWriter(file, schema) as out:
        while group := list(islice(rows, GROUP)):
            out.write_table(arrow.Table.from_pylist(group, schema))


def read_about(out: Path) -> tuple[Row, set[str]]:
    """What is told of a table of features, and the files in it.

    `x.parquet` has all in it. `x.npy` has the features, `x.names.txt` a name for each of its rows, `x.about.json` the rest.
    Raises DataError where it cannot be read, CheckpointError where no model is named in it.
    """
    try:
        if out.suffix == ".parquet":
            table = _parquet().ParquetFile(out)
            about = json.loads((table.schema_arrow.metadata or {}).get(_ABOUT.encode(), b"{}"))
            if "features" not in table.schema_arrow.names:
                raise DataError(f"{out} holds no features; give a table that `squeezevit embed` wrote")
            names = {name for group in table.iter_batches(GROUP, columns=["file"]) for name in group.column(0).to_pylist()}
        else:
            about = json.loads(_about_of(out).read_text(encoding="utf-8"))
            listed = _lines(_names_of(out))
            if len(np.load(out, mmap_mode="r")) != len(listed):
                raise ValueError(f"{len(listed)} names for another number of rows")
            names = {*listed, *(row["file"] for row in about.pop("unreadable"))}
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if isinstance(error, SqueezeViTError):
            raise
        raise DataError(f"{out} cannot be added to ({error}); put its files back, or leave --append out") from error
    if "model" not in about:
        raise CheckpointError(f"{out} does not say which model its features come from; leave --append out, or choose another --out")
    return about, names


def beside(out: Path) -> list[Path]:
    """All files of a table of features."""
    return [out] if out.suffix == ".parquet" else [out, _names_of(out), _about_of(out)]


def _names_of(file: Path) -> Path:
    return file.with_suffix(".names.txt")


def _about_of(file: Path) -> Path:
    return file.with_suffix(".about.json")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _pyarrow() -> Any:
    return _module("pyarrow")


def _parquet() -> Any:
    return _module("pyarrow.parquet")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f'tables in .parquet need pyarrow ({error}): run `pip install "squeezevit[predict]"`') from error
