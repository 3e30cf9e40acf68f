"""One part of a source, photograph by photograph: a name, and how to get what is in it."""

import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from squeezevit.data.folder import is_image, printable
from squeezevit.errors import DataError, RunError
from squeezevit.scale import stores
from squeezevit.scale.sources import Part, Source

AT_ONCE = 64  # rows of a Parquet file that are in memory together
TRIES, PAUSE = 3, 1.0  # of a store that does not answer; seconds before the second, twice as many before the third


class Item(NamedTuple):
    """One photograph to be. reason: why there is none."""

    name: str
    content: Callable[[], bytes | None]  # None: it is read from the path, which is the name
    path: str = ""
    reason: str | None = None


def items(part: Part, source: Source) -> Iterator[Item]:
    """The photographs of a part; what ends it too early is an item of its own, with the reason."""
    count, tries = 0, TRIES if "://" in part.file else 1
    for again in range(tries):
        try:
            for item in islice(_TAKEN[source.kind](part, source), count, None):
                yield item
                count += 1
            return
        except Exception as error:  # tarfile, pyarrow and the stores have each their own
            reason = printable(" ".join(str(error).split()) or type(error).__name__)
        if again < tries - 1:
            time.sleep(PAUSE * 2**again)
    if source.kind == "files":
        raise RunError(
            f"{part.file}, the run's own list, cannot be read here ({reason}); give --out as an address that every machine of the "
            "cluster reaches, and run the same command again"
        )
    told = f"after {count} photographs" if count else "from its beginning"
    yield Item(part.file, bytes, reason=f"this shard cannot be read {told} ({reason})")


def _of_listing(part: Part, source: Source) -> Iterator[Item]:
    for (name,) in _rows(part, source, ["file"]):
        yield _at(os.fsdecode(name), source.base)


def _of_parquet(part: Part, source: Source) -> Iterator[Item]:
    assert source.column is not None
    columns = [source.column] + ([source.names] if source.names else [])
    folder = part.file.rpartition("/")[0] or ("/" if part.file.startswith("/") else ".")
    for i, (value, *given) in enumerate(_rows(part, source, columns)):
        name = given[0] if given else None
        where = f"{part.file}#{part.group}.{i}" if name is None else str(name)
        if isinstance(value, dict):  # as the datasets of Hugging Face have them
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            at = _at(stores.within(folder, value), source.base)
            yield at if name is None else at._replace(name=where)
        elif value is None:
            yield Item(where, bytes, reason="nothing in this row")
        else:
            yield Item(where, partial(bytes, value))


def _rows(part: Part, source: Source, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    parquet = stores.arrow("pyarrow.parquet")
    system, path = stores.opened(stores.within(source.base, part.file))
    with system.open_input_file(path) as file:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        groups = range(table.metadata.num_row_groups) if part.group is None else [part.group]
        for batch in table.iter_batches(AT_ONCE, list(groups), columns):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _at(name: str, base: str) -> Item:
    """A photograph by its address, or by its path from `base`."""
    if "://" in name:
        return Item(name, partial(_fetched, name), name)
    if "://" in base:
        return Item(name, partial(_fetched, stores.beneath(base, name)), name)
    path = str(Path(base, name))
    return Item(name, lambda: None, path)


def _fetched(address: str) -> bytes:
    """What lies there; a store that fails is asked again, one that says no is not."""
    for left in reversed(range(TRIES)):
        try:
            return stores.read(address)
        except FileNotFoundError:
            raise
        except OSError:
            if not left:
                raise
            time.sleep(PAUSE * 2 ** (TRIES - 1 - left))
    raise AssertionError


def _of_tar(part: Part, source: Source) -> Iterator[Item]:
    system, path = stores.opened(stores.within(source.base, part.file))
    with system.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            if member.isfile() and is_image(member.name.rpartition("/")[2]):
                content = archive.extractfile(member)
                assert content is not None
                yield Item(f"{part.file}/{member.name}", partial(bytes, content.read()))


class _Member(tarfile.TarInfo):
    """tarfile takes a spoilt header for the end of the archive, and what comes after would be lost without a word."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the end that the archive itself states
                raise
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def content_of(name: str, source: Source) -> tuple[str, bytes | None]:
    """A photograph by its name in a table: its path, and its content where it is not a file of its own.

    Raises OSError where it is not there any more, DataError where the name does not say where it is.
    """
    shard, _, member = name.partition(".tar/")
    if source.kind == "tar" and member:
        return name, _one(item for item in items(Part(0, f"{shard}.tar"), source) if item.name == name)
    row = re.fullmatch(r"(.+)#(\d+)\.(\d+)", name)
    if source.kind == "parquet" and row:
        return name, _one(islice(items(Part(0, row[1], int(row[2])), source), int(row[3]), None))
    if source.names is not None:
        raise DataError(f"{name} is a name of the column {source.names}, which does not say where it lies")
    item = _at(name, source.base)
    return item.path, item.content()


def _one(found: Iterator[Item]) -> bytes | None:
    item = next(found, None)
    if item is None or item.reason is not None:
        raise FileNotFoundError("it is not there any more" if item is None else item.reason)
    return item.content()


_TAKEN: dict[str, Callable[[Part, Source], Iterator[Item]]] = {"files": _of_listing, "parquet": _of_parquet, "tar": _of_tar}
