"""What is run: photographs, lists of them, Parquet and WebDataset shards, cut into the parts that become shards of the table."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from squeezevit.data.folder import images_in, is_image, printable, unread_warning
from squeezevit.errors import ConfigError, DataError
from squeezevit.scale import stores

LISTING = 1000  # parts of a file of the listing
_WILD, _DEEP = "*?[", "photographs/**/*.jpg"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A piece of a source, whose rows become one shard.

    file: a Parquet file, or a tar. group: of rows in a Parquet file; None: the file cannot be read, or is a tar. rows: None where
    nobody knows before it is read.
    """

    number: int
    file: str
    group: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Source:
    """What is run.

    kind: "files", "parquet" or "tar". column, names: of a Parquet file, that hold bytes or paths, and names. base: where relative
    paths begin.
    """

    kind: str
    column: str | None = None
    names: str | None = None
    base: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def found(addresses: Sequence[str], column: str | None, names: str | None) -> tuple[Source, list[str]]:
    """What the addresses hold, all of one kind, and the files: photographs, Parquet files or tars.

    An address is a file, a folder, a pattern (in stores `*` also crosses slashes), or a list: a .txt file with an address a line.

    Raises DataError where there is nothing, or more than one kind; ConfigError for addresses that cannot be opened.
    """
    files: dict[str, None] = {}
    for address in addresses:
        files |= dict.fromkeys(_files(address))
    kinds = {_kind(file) for file in files}
    if not files:
        raise DataError("no photographs are given; give files, folders, patterns, or shards of them")
    if len(kinds) > 1:
        raise DataError(f"{', '.join(addresses)} hold {' and '.join(sorted(kinds))}; give one kind, and the others another --out")
    kind = kinds.pop()
    if kind != "parquet" and (column or names):
        raise ConfigError(f"--column and --names are of Parquet files, and {', '.join(addresses)} hold {kind}; leave them out")
    return Source(kind, column, names, str(Path.cwd())), list(files)


def _kind(file: str) -> str:
    return {"parquet": "parquet", "tar": "tar"}.get(file.rpartition(".")[2].lower(), "files")


def _files(address: str) -> list[str]:
    unread: Counter[str] = Counter()
    try:
        if address.endswith(".txt"):
            lines = stores.read(address).decode("utf-8-sig").splitlines()
            inside = [line for line in lines if line.strip()]
        elif any(c in address for c in _WILD) and ("://" in address or not stores.exists(address)):
            inside = _matching(address)
        elif "://" not in address and Path(address).is_dir():
            inside = _of_one_kind(address, list(images_in(Path(address), unread)), _walked(address))
        elif stores.is_folder(address):
            everything = stores.inside(address)
            images = [file for file, _ in everything if is_image(file.rpartition("/")[2], unread)]
            inside = _of_one_kind(address, images, everything)
        elif stores.exists(address):
            inside = [address]
        else:
            raise DataError(f"{printable(address)} does not exist; give photographs, folders, patterns, or shards of them")
    except (OSError, UnicodeDecodeError, NotImplementedError) as error:
        raise DataError(f"{printable(address)} cannot be listed ({error}); make it readable, or give something else") from error
    text = unread_warning(address, unread)
    if not inside:
        raise DataError(f"{printable(address)} holds nothing that can be read; {text or 'give photographs, or shards of them'}")
    if text:
        logger.warning("%s", text)
    return inside


def _matching(pattern: str) -> list[str]:
    plain = pattern[: min(pattern.index(c) for c in _WILD if c in pattern)]
    folder, slash, _ = plain.rpartition("/")
    if "://" not in pattern:
        below = pattern[len(folder + slash) :]
        try:
            matching = list(Path(folder + slash).glob(below))
        except ValueError as error:
            raise DataError(f"{printable(pattern)} is no pattern ({error}); write ** alone between slashes, as {_DEEP}") from error
        return sorted(str(file) for file in matching if file.is_file() and not _hidden(file.relative_to(folder + slash).parts))
    return [file for file, _ in stores.inside(folder) if fnmatch(file, pattern)]


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _walked(folder: str) -> Iterator[tuple[str, int]]:
    """Files of a folder of this machine but hidden ones; also those whose names are no text, which pyarrow cannot list."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _hidden([name]))
        yield from ((str(Path(root, name)), 0) for name in sorted(names) if not _hidden([name]))


def _of_one_kind(address: str, images: list[str], everything: Iterable[tuple[str, int]]) -> list[str]:
    """The images of a folder, or its shards."""
    shards = _shards(everything)
    if images and shards:
        raise DataError(
            f"{printable(address)} holds {len(images)} images, as {printable(images[0])}, and {len(shards)} shards, as "
            f"{printable(shards[0])}; give one kind, by a pattern"
        )
    return images or shards


def _shards(files: Iterable[tuple[str, int]]) -> list[str]:
    return [file for file, _ in files if _kind(file) != "files" and not file.rpartition("/")[2].startswith("_")]


def cut(source: Source, files: Sequence[str], folder: str, rows: int) -> tuple[Source, list[Part]]:
    """The parts of a source. Photographs are listed in `folder`, as Parquet files whose row groups are the parts, of `rows` each.

    Raises ConfigError where nothing says which column of a Parquet file holds photographs.
    """
    if source.kind == "tar":
        return source, [Part(i, file) for i, file in enumerate(files)]
    if source.kind == "files":
        return source, list(_listed(files, folder, rows))
    parquet = stores.arrow("pyarrow.parquet")

    def footer(file: str) -> Any:
        try:
            return parquet.ParquetFile(_opened(file))
        except Exception:  # a spoilt file becomes a row, with its reason, when it is read
            return None

    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(footer, files))
    good = [table for table in footers if table is not None]
    if not good:
        raise DataError(f"none of {len(files)} Parquet files can be read, {files[0]} among them; give others")
    column, names = _columns(good[0].schema_arrow, files[0], source)
    pieces: list[tuple[str, int | None, int | None]] = []
    for file, table in zip(files, footers, strict=True):
        if table is None:
            pieces.append((file, None, None))
        else:
            pieces += [(file, g, table.metadata.row_group(g).num_rows) for g in range(table.metadata.num_row_groups)]
    parts = [Part(i, *piece) for i, piece in enumerate(pieces)]
    return Source(source.kind, column, names, source.base), parts


def _opened(file: str) -> Any:
    system, path = stores.opened(file)
    return system.open_input_file(path)


def _listed(files: Sequence[str], folder: str, rows: int) -> Iterator[Part]:
    """Write names down, as bytes, since not all names are text."""
    arrow, parquet = stores.arrow("pyarrow"), stores.arrow("pyarrow.parquet")
    schema, left, number = arrow.schema([("file", arrow.binary())]), iter(files), 0
    for start in range(0, len(files), rows * LISTING):
        address, content = stores.beneath(folder, f"{start // (rows * LISTING):05}.parquet"), arrow.BufferOutputStream()
        with parquet.ParquetWriter(content, schema) as out:
            for group, _ in enumerate(range(start, min(len(files), start + rows * LISTING), rows)):
                names = [os.fsencode(name) for name in islice(left, rows)]
                out.write_table(arrow.table([names], schema), row_group_size=rows)
                yield Part(number, address, group, len(names))
                number += 1
        stores.write(address, content.getvalue().to_pybytes())


def _columns(schema: Any, file: str, source: Source) -> tuple[str, str | None]:
    """The columns with photographs, and with their names."""
    given = {field.name: str(field.type) for field in schema}
    for option, name in (("--column", source.column), ("--names", source.names)):
        if name is not None and name not in given:
            raise ConfigError(f"{option} {name}: {file} has the columns {', '.join(given)}; choose one of them")
    if source.column:
        return source.column, source.names
    pictures = [n for n, kind in given.items() if kind in ("binary", "large_binary") or "bytes: binary" in kind]
    texts = [n for n, kind in given.items() if kind in ("string", "large_string") and n != source.names]
    choice = pictures or texts
    if len(choice) != 1:
        columns = ", ".join(f"{name} ({kind})" for name, kind in given.items())
        raise ConfigError(f"{file} has the columns {columns}; say by --column which one holds the bytes or paths of photographs")
    return choice[0], source.names
