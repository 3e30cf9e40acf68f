"""The nearest photographs in a table of features: exact cosine similarities, by faiss, one shard in memory at a time."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from squeezevit.data.folder import decoding, printable
from squeezevit.data.pixels import Preprocessing
from squeezevit.embed import tables
from squeezevit.embed.engines import Engine, open_engine
from squeezevit.embed.reading import at_least, pixels_of
from squeezevit.embed.tables import GROUP, OK, Row
from squeezevit.errors import ConfigError, DataError, MissingExtraError
from squeezevit.scale import stores
from squeezevit.scale.table import manifest, rows_of


@dataclass(frozen=True)
class Hit:
    """A photograph of the table, and the cosine of its features with the query's."""

    file: str
    similarity: float


def about(table: str) -> Row:
    """What a table of features says of itself: a folder of shards, a .parquet or an .npy. Raises DataError where there is none."""
    if table.endswith((".parquet", ".npy")) and not stores.is_folder(table):
        if not Path(table).is_file():
            raise DataError(f"{table} does not exist; give a table that `squeezevit embed` wrote")
        return tables.read_about(Path(table))[0]
    told = manifest(table)
    if told["command"] != "embed":
        raise DataError(f"{table} holds classes, not features; give a table that `squeezevit embed` wrote")
    return told


def questioner(told: Row, bundle: str | Path | None = None) -> Engine:
    """The engine whose features the table holds. Raises ConfigError where no bundle is known, or it is of another model."""
    bundle = bundle or told.get("bundle")
    if bundle is None:
        raise ConfigError("the table does not say where its bundle lies; give it, --from BUNDLE")
    opened = open_engine(bundle, told.get("engine"), features=True)
    if opened.id != told["model"]:
        raise ConfigError(
            f"the table's features are of model {told['model'][:12]}, and {bundle} is {opened.id[:12]}: they do not compare; give "
            "the bundle that the table was made with, --from BUNDLE"
        )
    return opened


def features(images: Sequence[str], engine: Engine, told: Row) -> np.ndarray:
    """Features [q, C] of photographs, made ready as those of the table were. Raises DataError for one that cannot be read."""
    values = dict(told["preprocessing"])
    draft = values.pop("draft")
    how, cuts = Preprocessing.from_dict(values), []
    with decoding():
        for image in images:
            content = stores.read(image) if "://" in image else None
            cut = pixels_of(image, how, at_least(how, draft), content)
            if isinstance(cut, str):
                raise DataError(f"{printable(image)} cannot be read ({cut}); give another photograph")
            cuts.append(cut)
    return engine.run(how.scaled(np.stack(cuts)))


def nearest(table: str, queries: np.ndarray, k: int) -> list[list[Hit]]:
    """The k photographs of the table with the highest cosines, for each query [q, C], in falling order.

    Every photograph is compared: no index stands between, and memory is that of one shard.

    >>> nearest("features", features(["q.jpg"], engine, about("features")), 10)  # doctest: +SKIP
    """
    faiss = _faiss()
    best: list[list[tuple[float, str]]] = [[] for _ in queries]
    queries = _unit(queries)
    for names, rows in _blocks(table):
        if not names:
            continue
        similar, index = faiss.knn(queries, _unit(rows), min(k, len(names)), metric=faiss.METRIC_INNER_PRODUCT)
        for found, values, places in zip(best, similar, index, strict=True):
            found += [(float(value), names[i]) for value, i in zip(values, places, strict=True)]
            found.sort(key=lambda hit: -hit[0])
            del found[k:]
    return [[Hit(name, min(value, 1.0)) for value, name in found] for found in best]


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))


def _blocks(table: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and features [n, C] of the photographs that have them."""
    if table.endswith(".npy"):
        array = np.load(table, mmap_mode="r")
        names = Path(table).with_suffix(".names.txt").read_text(encoding="utf-8").splitlines()
        for start in range(0, len(names), GROUP):
            yield names[start : start + GROUP], array[start : start + GROUP]
        return
    columns = ["file", "status", "features"]
    if table.endswith(".parquet") and not stores.is_folder(table):
        parquet = stores.arrow("pyarrow.parquet").ParquetFile(table)
        shards: Iterator[Any] = (
            stores.arrow("pyarrow").Table.from_batches([b]) for b in parquet.iter_batches(GROUP, columns=columns)
        )
    else:
        shards = rows_of(table, columns)
    compute = stores.arrow("pyarrow.compute")
    for shard in shards:
        good = shard.filter(compute.equal(shard.column("status"), OK))
        if not len(good):
            continue
        column = good.column("features").combine_chunks()
        yield good.column("file").to_pylist(), column.flatten().to_numpy(zero_copy_only=False).reshape(len(good), -1)


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise MissingExtraError(f'searching needs faiss ({error}): run `pip install "squeezevit[search]"`') from error
