"""A table of shards in a folder: what is whole is seen, what was begun by another run is refused, what is done is found again.

part-0000017.parquet   the rows of part 17, by any reader of Parquet; whole from the moment that it is there
_manifest.json         all shards with their rows and bytes, and what made them: written last, so that the table is whole
_run/                  run.json and parts.json: what is run; listing/: names of photographs; shards that are being written
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from squeezevit.embed.tables import GROUP, OK, Row, locked
from squeezevit.errors import ConfigError, DataError
from squeezevit.scale import stores
from squeezevit.scale.sources import Part, Source

MANIFEST = "_manifest.json"
_KEY = b"squeezevit"  # of a shard's metadata
_SEEN = 32  # footers that are read at once


class Table:
    """A table that is being written. Shards are named by their parts, so that doing a part twice gives one shard.

    begin: gives the source and its parts, asked only where the run is new: a run goes on with the photographs that it began with.
    Raises ConfigError where the folder cannot be written, holds another run, or another process on this machine writes to it.
    """

    def __init__(self, out: str, run: Row, begin: Callable[[str], tuple[Source, list[Part]]]) -> None:
        whole = stores.within(str(Path.cwd()), out).rstrip("/")  # Ray's workers begin in other folders than this process
        self.out, self.inner = out.rstrip("/"), stores.beneath(whole, "_run")
        try:
            stores.make(self.inner)
            self._lock = _lock_of(self.inner)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written ({error}); choose a folder of your own") from error
        if self._lock is not None and not locked(self._lock):
            self.close()
            raise ConfigError(f"another process is writing {out}; wait for it, or choose another --out")
        note = stores.beneath(self.inner, "run.json")
        if stores.exists(note):
            self._require_same(json.loads(stores.read(note)), run)
        else:
            self._begin(run, begin, note)
        began = json.loads(stores.read(note))
        self.id, self.run = str(began["id"]), began["run"]
        self.source = Source(**began["source"])
        self.parts = [Part(*part) for part in json.loads(stores.read(stores.beneath(self.inner, "parts.json")))]

    def _begin(self, run: Row, begin: Callable[[str], tuple[Source, list[Part]]], note: str) -> None:
        if any(file.endswith(".parquet") for file, _ in stores.inside(self.out, recursive=False)):
            raise ConfigError(f"--out {self.out} holds Parquet files that are not of this run; choose a folder that is empty")
        listing = stores.beneath(self.inner, "listing")
        stores.make(listing)
        source, parts = begin(listing)
        pieces = json.dumps([list(asdict(part).values()) for part in parts])
        stores.write(stores.beneath(self.inner, "parts.json"), pieces.encode())
        told = {"run": run, "source": source.to_dict()}
        name = hashlib.sha256(json.dumps([told, pieces]).encode()).hexdigest()
        stores.write(note, json.dumps({"id": name, **told}, indent=1).encode())

    def _require_same(self, began: Row, run: Row) -> None:
        for name in {**began["run"], **run}:
            was, now = began["run"].get(name), json.loads(json.dumps(run.get(name)))
            if was != now:
                raise ConfigError(
                    f"--out {self.out} holds a run with {name} {was}, and this one has {now}; run the command as it was begun, or "
                    "choose another --out"
                )

    def address(self, number: int) -> str:
        return stores.beneath(self.out, f"part-{number:07}.parquet")

    def done(self) -> dict[int, Row]:
        """What the manifest says of each shard that is there, whole and of this run."""
        there = {file: size for file, size in stores.inside(self.out, recursive=False)}
        mine = {part.number: self.address(part.number) for part in self.parts}
        numbers = [number for number, file in mine.items() if file in there]

        def told(number: int) -> Row | None:
            return self._told(number, mine[number], there[mine[number]])

        with ThreadPoolExecutor(_SEEN) as pool:
            return {n: row for n, row in zip(numbers, pool.map(told, numbers), strict=True) if row is not None}

    def _told(self, number: int, file: str, size: int) -> Row | None:
        parquet = stores.arrow("pyarrow.parquet")
        system, path = stores.opened(file)
        try:
            with system.open_input_file(path) as content:
                footer = parquet.read_metadata(content)
            about = json.loads(footer.metadata[_KEY])
        except Exception:  # a spoilt shard is done again, however it is spoilt
            return None
        whole = about["run"] == self.id and about["part"] == number
        return {"file": file.rpartition("/")[2], "rows": footer.num_rows, "ok": about["ok"], "bytes": size} if whole else None

    def commit(self, number: int, batches: Iterable[bytes]) -> tuple[Row, list[Row]]:
        """Write a shard from the rows of its batches; what the manifest says of it, and the rows that failed. Raises OSError."""
        arrow, parquet = stores.arrow("pyarrow"), stores.arrow("pyarrow.parquet")
        table = arrow.concat_tables(arrow.ipc.open_stream(batch).read_all() for batch in batches)
        status = table.column("status").to_pylist()
        about = {"run": self.id, "part": number, "ok": status.count(OK), **{k: self.run[k] for k in ("model", "preprocessing")}}
        sink = arrow.BufferOutputStream()
        table = table.replace_schema_metadata({_KEY: json.dumps(about)})
        parquet.write_table(table, sink, row_group_size=GROUP, write_page_checksum=True)
        content = sink.getvalue().to_pybytes()
        stores.write(self.address(number), content, self.inner)
        told = table.select(["file", "status", "reason"])
        rows = told.filter(arrow.array([kind != OK for kind in status], arrow.bool_())).to_pylist()
        file = self.address(number).rpartition("/")[2]
        return {"file": file, "rows": len(status), "ok": about["ok"], "bytes": len(content)}, rows

    def finish(self, shards: dict[int, Row]) -> None:
        """Write the manifest: from then on the table is whole."""
        listed = [shards[part.number] for part in self.parts]
        sums = {name: sum(shard[name] for shard in listed) for name in ("rows", "ok", "bytes")}
        told = {"format": 1, "id": self.id, **self.run, "source": self.source.to_dict(), **sums, "shards": listed}
        stores.write(stores.beneath(self.out, MANIFEST), json.dumps(told, indent=1).encode(), self.inner)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def _lock_of(folder: str) -> Any:
    """A file to lock on this machine; None in a store, where two runs write the same shards twice."""
    system, path = stores.opened(folder)
    return Path(path, "lock").open("ab") if system.type_name == "local" else None


def manifest(table: str) -> Row:
    """What is said of a whole table. Raises DataError where it is not whole."""
    try:
        return dict(json.loads(stores.read(stores.beneath(table, MANIFEST))))
    except FileNotFoundError as error:
        begun = stores.exists(stores.beneath(table, "_run/run.json"))
        remedy = "run its command again, which goes on" if begun else "give a table that squeezevit embed wrote"
        raise DataError(f"{table} is not whole: it has no {MANIFEST}; {remedy}") from error


def rows_of(table: str, columns: list[str]) -> Iterator[Any]:
    """The rows of a whole table, shard by shard, as Arrow tables. Raises DataError where a shard is not as it was written."""
    parquet = stores.arrow("pyarrow.parquet")
    for shard in manifest(table)["shards"]:
        address = stores.beneath(table, shard["file"])
        try:
            content = stores.read(address)
            if len(content) != shard["bytes"]:
                raise OSError(f"{len(content)} bytes, and {shard['bytes']} were written")
            reader = stores.arrow("pyarrow").BufferReader(content)
            yield parquet.ParquetFile(reader, page_checksum_verification=True).read(columns)
        except (OSError, ValueError) as error:  # what pyarrow makes of a spoilt page
            raise DataError(
                f"{address} is not as it was written ({error}); remove it, and the command that made the table makes it again"
            ) from error
