"""One table of all results: a line for each row of each file in benchmarks/results, whoever wrote it and whatever it measured.

    python benchmarks/table.py                            # everything, as Markdown
    python benchmarks/table.py --methods tome etps        # some methods; also --files demo methods_cpu
    python benchmarks/table.py --csv results.csv          # the same for a spreadsheet

Accuracy is in percent, % MACs of the unreduced model's, cosine that of features with the unreduced model's, speed-up and overhead
over the limit those of the best rounds, memory what a forward adds (of a training step: what it keeps for its backward).
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from squeezevit.reducers.catalog import methods
from squeezevit.report.rows import current
from workshop import RESULTS, arguments, known, say

Row = dict[str, Any]
COLUMNS = ("file", "on", "what", "% MACs", "accuracy", "cosine", "speed-up", "overhead", "ms", "MiB")
# whom a row is about
WHAT = (
    "name",
    "label",
    "what",
    "case",
    "format",
    "candidate",
    "variant",
    "pruned_by",
    "kind",
    "step",
    "measure",
    "killed",
    "ends",
    "reducer",
)
WHERE = ("task", "model", "image_size", "batch_size", "compiled", "fold", "seed", "keep", "share", "asked", "target")
SETTINGS = ("settings", "model", "task")  # that some files keep in a part of their own


def table(folder: Path, files: Sequence[str] = (), names: Sequence[str] = ()) -> list[dict[str, str]]:
    """The lines of all files of a folder, or of some files and some methods."""
    lines = []
    for path in sorted(folder.rglob("*.json")):
        file = path.relative_to(folder).with_suffix("").as_posix()
        if not files or file in files:
            found = rows_of(json.loads(path.read_text()), {})
            lines += [line(file, row, setting) for row, setting in found if not names or method_of(row) in names]
    return lines


def rows_of(part: Row, around: Row) -> Iterator[tuple[Row, Row]]:
    """Each row of a part of a file, and the settings that it stands under."""
    setting = {**around, **{key: value for key, value in part.items() if not isinstance(value, dict | list)}}
    for key in SETTINGS:
        if isinstance(part.get(key), dict):
            setting |= {key: part[key]["name"]} if "name" in part[key] else part[key]
    for key, value in part.items():
        if key == "dense":
            yield value, setting
        elif isinstance(value, dict):
            yield from rows_of(value, {**setting, "task": key} if "rows" in value else setting)
        elif isinstance(value, list) and key != "also" and value and isinstance(value[0], dict):
            yield from ((row, setting) for row in value)


def line(file: str, row: Row, setting: Row) -> dict[str, str]:
    """A row in the table's columns; what a row does not say is empty."""
    both = {**setting, **row}
    if "method" in row:
        row = row | dict(zip(("method", "label"), today(row["method"], row.get("label")), strict=True))
    row = {**row, row.get("measure"): row.get("adaptive")}
    return {
        "file": file,
        "on": ", ".join(f"{key.replace('_', ' ')} {both[key]}" for key in WHERE if both.get(key) not in (None, "")),
        "what": next((str(row[key]) for key in WHAT if key in row), ""),
        "% MACs": number(row, ("macs_share",), 100, 1),
        "accuracy": number(row, ("accuracy",), 100, 1),
        "cosine": number(row, ("cosine", "mean", "held_out"), 1, 4),
        "speed-up": number(row, ("speedup_best",), 1, 2) or inverse(row, ("of_dense_best", "again")),
        "overhead": number(row, ("overhead_best",), 1, 3),
        "ms": number(row, ("latency_median_ms",), 1, 1) or number(row, ("best_us",), 1e-3, 3),
        "MiB": number(row, ("peak_mib", "forward_mib", "kept_for_backward_mib"), 1, 0),
    }


def method_of(row: Row) -> str:
    """The catalogue's name, as far as a row tells it: of those that only show a reducer, its class."""
    word = row.get("method") or row.get("kind") or row.get("name") or row.get("reducer") or ""
    return today(word if "method" in row else re.split(r"[ (:]", word)[0], row.get("label"))[0]


@cache
def today(method: str, label: str | None) -> tuple[str, str]:
    """A method's name and label as they would be written today."""
    row = current({"method": method, "label": label})
    return row["method"], row["label"]


def number(row: Row, keys: Sequence[str], scale: float, digits: int) -> str:
    """The first of these that the row has, times by name apart; of a list its first entry."""
    value = next((row[key] for key in keys if row.get(key) is not None and not isinstance(row[key], dict)), None)
    return "" if value is None else f"{scale * (value[0] if isinstance(value, list) else value):.{digits}f}"


def inverse(row: Row, keys: Sequence[str]) -> str:
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    return "" if value is None else f"{1 / value:.2f}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--files", nargs="*", help="only these, as demo or finetune/finetune_emoji_0_0")
    parser.add_argument("--methods", nargs="*", type=known, choices=tuple(methods()), help="only these")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = table(args.results, args.files or (), args.methods or ())
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(lines)
        return
    for cells in ({name: name for name in COLUMNS}, dict.fromkeys(COLUMNS, "---"), *lines):
        say(f"| {' | '.join(cells[name] for name in COLUMNS)} |")


if __name__ == "__main__":
    main()
