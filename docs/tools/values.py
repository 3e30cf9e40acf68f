"""Values of results files as people read them: names of columns, digits, methods by their label of today."""

import math
from html import escape
from typing import Any

import dotplots
from squeezevit.report.rows import current

Row = dict[str, Any]
NAMES = {
    "macs_share": "MACs, %",
    "share": "share, %",
    "target": "target, %",
    "macs": "GMACs",
    "accuracy": "accuracy, %",
    "images_per_second": "images/s",
    "images_per_second_best": "images/s, best",
    "n": "images",
    "p": "p",
    "kl": "KL",
    "of_dense": "time, of dense",
    "of_dense_best": "time of dense, best",
}  # fmt: skip
UNITS = {"_ms": ", ms", "_us": ", us", "_mib": ", MiB", "_seconds": ", s", "_bytes": ", bytes"}
PERCENT = (
    "macs_share",
    "share",
    "target",
    "accuracy",
    "asked",
    "predicted",
    "measured",
    "again",
    "top_tenth",
    "counts_right",
    "cells_right",
)
TEXTS = ("reducer", "reducer_full", "default")


def heading(key: str) -> str:
    """A column's name as people say it.

    >>> heading("macs_share"), heading("latency_best_ms"), heading("batch_16.speedup")
    ('MACs, %', 'latency best, ms', 'batch 16: speed-up')
    """
    if key in NAMES:
        return NAMES[key]
    for ending, unit in UNITS.items():
        if key.endswith(ending):
            key = key.removesuffix(ending) + unit
    return key.replace(".", ": ").replace("_", " ").replace("speedup", "speed-up") + (", %" if key in PERCENT else "")


def cell(row: Row, key: str) -> str:
    value = row.get(key)
    shown = text(key, value)
    if isinstance(row.get(f"{key}_se"), float):
        shown += f" ± {text(key, row[f'{key}_se'])}"
    if key in TEXTS and isinstance(value, str):
        return f'<td><code title="{escape(value)}">{escape(dotplots.short(value))}</code></td>'
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f'<td class="number" data-sort="{value!r}">{shown}</td>' if number else f"<td>{shown}</td>"


def text(key: str, value: Any) -> str:
    """A value to the digits that matter.

    >>> text("accuracy", 0.8125), text("macs", 4598882304), text("p", 3e-9), text("tokens", [196, 98])
    ('81.2', '4.60', '3e-09', '196→98')
    """
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        return ("\N{RIGHTWARDS ARROW}" if key == "tokens" else ", ").join(text(key, part) for part in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(str(value))
    if key in PERCENT:
        return f"{100 * value:.1f}"
    if key == "macs" and value > 1e6:
        return f"{value / 1e9:.2f}"
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value) or 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def named(row: Row, key: str) -> str:
    """What a row is called in a plot."""
    if not key:
        return ""
    value = row.get(key)
    if key in ("method", "label"):
        return str(current(row)["label"])
    if key in PERCENT and isinstance(value, float):
        return f"{100 * value:.0f} %"
    if key in TEXTS:
        return dotplots.short(str(value))
    return f"{key.replace('_', ' ')} {value}" if isinstance(value, int | float) else str(value)


def deep(row: Row, path: str) -> float | None:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return 100 * value if path in PERCENT and value is not None else value
