"""The record of a run: log.csv with one row per epoch, TensorBoard, and the list of unreadable images."""

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from squeezevit.train.checkpoints import failure, find_folder, write_file


def write_log(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """log.csv as a whole, so that a resumed run repeats no row."""
    write_file(out / "log.csv", _table([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))


def write_unreadable(out: Path, unreadable: Mapping[str, str]) -> None:
    if unreadable:
        write_file(out / "unreadable.csv", _table([{"path": p, "reason": r} for p, r in sorted(unreadable.items())]))


class Board:
    """TensorBoard scalars, or nothing where `folder` is None. `start`: updates done; later ones of an earlier try are hidden."""

    def __init__(self, folder: Path | None, start: int) -> None:
        self._folder, self._writer = folder, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def add(self, prefix: str, values: Mapping[str, Any], update: int) -> None:
        """Raises TrainingError where the folder cannot be written any more."""
        if self._writer is None or self._folder is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{prefix}/{name}", value, update)
        except OSError as error:
            raise failure(self._folder, error, find_folder(self._folder.parent / "last")) from error

    def close(self) -> None:
        if self._writer is not None:
            with suppress(OSError):  # on a full disk, which another message tells of
                self._writer.close()


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
