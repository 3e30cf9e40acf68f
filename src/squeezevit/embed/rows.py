"""Rows of a table from what a model puts out."""

from collections.abc import Iterator, Sequence

import numpy as np

from squeezevit.data.folder import printable
from squeezevit.embed.engines import Engine
from squeezevit.embed.tables import NOT_FINITE, OK, UNREADABLE, Row
from squeezevit.errors import ConfigError

ODD = "the model put out a number that is not finite"


def row_of(name: str, image: np.ndarray | str, found: Iterator[Row]) -> Row:
    """The row of a file: why it could not be read, or the next of those found."""
    result = {"status": UNREADABLE, "reason": image} if isinstance(image, str) else next(found)
    return {"file": printable(name), **result}


def classes_of(engine: Engine, classes: Sequence[str], top: int, logits: np.ndarray) -> tuple[list[Row], None]:
    if logits.shape[1] != len(classes):
        raise ConfigError(
            f"the model of {engine.folder} puts out {logits.shape[1]} numbers, and its card names {len(classes)} classes; save or "
            "export it again with a name for each"
        )
    return [_likely(row, classes, top) for row in logits.astype(np.float64)], None


def _likely(logits: np.ndarray, classes: Sequence[str], top: int) -> Row:
    """The likeliest classes of one photograph, from its logits float64 [K]."""
    if not np.isfinite(logits).all():
        return {"status": NOT_FINITE, "reason": ODD}
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-logits, kind="stable")[:top]
    return {"status": OK, "reason": None, "top": [[classes[i], float(f"{shares[i]:.6g}")] for i in best]}


def features_of(engine: Engine, features: np.ndarray) -> tuple[list[Row], np.ndarray]:
    finite = np.isfinite(features).all(axis=1)
    failed = {"status": NOT_FINITE, "reason": ODD}
    return [{"status": OK, "reason": None} if good else failed for good in finite], features[finite]
