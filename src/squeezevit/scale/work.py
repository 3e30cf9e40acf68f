"""What the workers do: tasks decode a part into batches of one shape, actors hold the model and make rows of them."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from squeezevit.data.folder import decoding, printable
from squeezevit.data.pixels import Preprocessing
from squeezevit.embed.engines import open_engine
from squeezevit.embed.reading import Patience, ahead, pixels_of
from squeezevit.embed.rows import classes_of, features_of, row_of
from squeezevit.embed.tables import OK, Row, feature_kinds, flat, prediction_kinds
from squeezevit.export.verified import padded
from squeezevit.scale import stores
from squeezevit.scale.reading import Item, items
from squeezevit.scale.sources import Part, Source

Pixels = np.ndarray | str  # uint8 [3, H, W], or why not


@dataclass(frozen=True)
class Decode:
    """A part -> its batches: uint8 [batch, 3, H, W], the last one padded, with a name and perhaps a reason for each photograph.

    threads: that fetch and decode. patience: seconds after which a photograph that does not arrive is given up.
    """

    source: Source
    how: Preprocessing
    at_least: int | None
    batch: int
    threads: int
    patience: float

    def __call__(self, part: Row) -> Iterator[Row]:
        with decoding():
            batches = self._batches(Part(**part))
            now = next(batches, [])
            for number in range(1 << 62):
                following = next(batches, None)
                yield self._packed(now) | {"part": part["number"], "batch": number, "last": following is None}
                if following is None:
                    return
                now = following

    def _batches(self, part: Part) -> Iterator[list[tuple[str, Pixels]]]:
        patience = Patience[Item, tuple[str, Pixels]](self.patience, self._late)
        read = ahead(self._read, items(part, self.source), self.threads, self.batch + self.threads, patience)
        while group := list(islice(read, self.batch)):
            yield group

    def _read(self, item: Item) -> tuple[str, Pixels]:
        if item.reason is not None:
            return item.name, item.reason
        try:
            content = item.content()
        except Exception as error:  # each store has its own
            return item.name, f"it cannot be fetched: {printable(' '.join(str(error).split()) or repr(error))}"
        return item.name, pixels_of(item.path or item.name, self.how, self.at_least, content)

    def _late(self, item: Item) -> tuple[str, Pixels]:
        return item.name, f"not read within {self.patience:g} seconds"

    def _packed(self, group: list[tuple[str, Pixels]]) -> Row:
        good = [pixels for _, pixels in group if not isinstance(pixels, str)]
        empty = np.zeros((0, 3, *self.how.crop), np.uint8)
        images = padded(np.stack(good), self.batch) if good else np.resize(empty, (self.batch, 3, *self.how.crop))
        told = [[printable(name), pixels if isinstance(pixels, str) else None] for name, pixels in group]
        return {"images": images, "told": json.dumps(told)}


@dataclass(frozen=True)
class Task:
    """What the model is asked. top: likeliest classes, None: features. folder: of the bundle, for messages."""

    folder: str
    engine: str | None
    threads: int
    device: str
    how: Preprocessing
    batch: int
    top: int | None


class Model:
    """An actor: the engine of a bundle, which came along as files, so that no machine needs to see the folder it was in."""

    def __init__(self, task: Task, files: Any) -> None:
        import ray

        self.task = task
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(files).items():
                (Path(folder) / name).write_bytes(content)
            opened = open_engine(folder, task.engine, task.threads, task.top is None, task.device)
        self.engine = replace(opened, folder=Path(task.folder))
        first = self.engine.run(np.zeros((task.batch, 3, *self.engine.image_size), np.float32))
        classes = self.engine.card.classes
        if task.top is None or classes is None:
            self.rows_of: Any = partial(features_of, self.engine)
            kinds = feature_kinds(first.shape[1])
        else:
            self.rows_of = partial(classes_of, self.engine, classes, task.top)
            kinds = prediction_kinds()
            self.rows_of(first)  # a card with other classes is refused before any work
        self.schema = stores.arrow("pyarrow").schema(list(kinds.items()))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One batch of images -> its rows, as Arrow writes them."""
        told = json.loads(str(batch["told"][0]))
        rows = self._rows(np.asarray(batch["images"][0]), told)
        table = stores.arrow("pyarrow").Table.from_pylist(rows, self.schema)
        sink = stores.arrow("pyarrow").BufferOutputStream()
        with stores.arrow("pyarrow").ipc.new_stream(sink, self.schema) as out:
            out.write_table(table)
        return {name: batch[name] for name in ("part", "batch", "last")} | {"rows": [sink.getvalue().to_pybytes()]}

    def _rows(self, images: np.ndarray, told: list[tuple[str, str | None]]) -> list[Row]:
        good = sum(reason is None for _, reason in told)
        results: list[Row] = []
        features: np.ndarray | None = None
        if good:
            results, features = self.rows_of(self.engine.run(self.task.how.scaled(images))[:good])
        found, vectors = iter(results), iter(() if features is None else features)
        rows = [row_of(name, images if reason is None else reason, found) for name, reason in told]
        if self.task.top is not None:
            return [flat(row) for row in rows]
        return [{**row, "features": next(vectors) if row["status"] == OK else None} for row in rows]


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a bundle, to be sent along."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
