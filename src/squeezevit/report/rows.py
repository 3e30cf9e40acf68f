"""Rows of results files: which method of the catalogue a row is of, whatever that was called when it was written."""

from collections.abc import Mapping
from typing import Any

from squeezevit.reducers.catalog import Method, methods

Row = Mapping[str, Any]

_FORMER = {"preset": "training-free"}  # labels of earlier results


def current(row: Row) -> dict[str, Any]:
    """The row as it would be written today: its method by the catalogue's name, the label that goes with it where it had another.

    A method that the catalogue does not know stays as it is.

    >>> current({"method": "Preset", "label": "preset", "accuracy": 0.8})
    {'method': 'training-free', 'label': 'training-free', 'accuracy': 0.8}
    """
    known = methods()
    name, label = _name(row, known), row.get("label")
    if label is None or label in _FORMER:
        label = known[name].label if name in known else name
    return {**row, "method": name, "label": label}


def method_name(row: Row) -> str:
    """The catalogue's name of a row's method: earlier results have labels or classes, as "eTPS + mass" or "ETPS+mass"."""
    return _name(row, methods())


def _name(row: Row, known: Mapping[str, Method]) -> str:
    method = str(row["method"])
    names = {entry.label: name for name, entry in known.items()} | _FORMER
    words = (str(row.get("label") or method), method, method.lower())
    found = [names.get(word, word) for word in words]
    return method if method in known else next((name for name in found if name in known), method)
