"""What the demo's numbers say, found by rules and never written by hand, and how the report writes numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

from squeezevit.report.rows import Row

TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"


def findings(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What the numbers say, as (heading, plain sentences): one entry across the budgets, then one per budget.

    Two values *tie* where they differ by at most one standard error of their difference. Against the dense model that
    error is the paired one; between two methods it is the root sum of squares of their paired errors, or of their own
    errors where a paired one is missing.
    """
    budgets = by_budget(results["rows"])
    across = [sentence for sentence in (_leaders(budgets), _below_random(budgets)) if sentence]
    out = [("Over all budgets", across)] if across else []
    for target, rows in budgets.items():
        sentences = [_accuracy_sentence(rows), _dense_sentence(rows), _cosine_sentence(rows), _speed_sentence(rows)]
        out.append((f"At {budget_words(target)}", [sentence for sentence in sentences if sentence]))
    return out


def ties(rows: Sequence[Row], best: Row) -> list[Row]:
    """The other rows whose accuracy is within one standard error of the difference of that of `best`."""
    return [row for row in rows if row is not best and _gap(best, row) <= _gap_error(best, row)]


def by_budget(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Rows by target share of MACs, largest budget first; within one, in the order given."""
    targets = sorted({row["target"] for row in rows}, reverse=True)
    return {target: [row for row in rows if row["target"] == target] for target in targets}


def best_of(rows: Sequence[Row]) -> Row:
    """The row of highest accuracy."""
    return max(rows, key=lambda row: row["accuracy"])


def budget_words(target: float) -> str:
    """`65 % of the MACs`."""
    return f"{100 * target:.0f} % of the MACs"


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plus_minus(value: float, error: float | None, scale: float, digits: int = 1) -> str:
    """`85.0 ± 1.8`, both times `scale`; the value alone where there is no error."""
    text = f"{scale * value:.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


def signed(value: float | None, error: float | None) -> str:
    """A difference of shares in points, always with its sign: `+0.3 ± 0.6`."""
    if value is None:
        return NONE
    text = f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return text if error is None else f"{text} ± {100 * error:.1f}"


def _gap(best: Row, row: Row) -> float:
    return best["accuracy"] - row["accuracy"]


def _gap_error(one: Row, other: Row) -> float:
    paired = (one.get("paired_difference_se"), other.get("paired_difference_se"))
    own = (one.get("accuracy_se"), other.get("accuracy_se"))
    return _root_sum(own if None in paired else paired)


def _root_sum(errors: Sequence[float | None]) -> float:
    return sqrt(sum((error or 0.0) ** 2 for error in errors))


def _accuracy_sentence(rows: Sequence[Row]) -> str:
    best = best_of(rows)
    level = ties(rows, best)
    behind = [row for row in rows if row is not best and _gap(best, row) > _gap_error(best, row)]
    text = f"Highest accuracy: {best['label']}, {plus_minus(best['accuracy'], best['accuracy_se'], 100)} %"
    text += f", tied with {listed(row['label'] for row in level)}." if level else "."
    if behind:
        behind.sort(key=lambda row: _gap(best, row))
        lost = (f"{row['label']} by {_points(_gap(best, row))} ± {_points(_gap_error(best, row))}" for row in behind)
        text += f" Behind it, in points: {listed(lost)}."
    return text


def _dense_sentence(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row["paired_difference"] is not None and row["paired_difference_se"] is not None]
    level = [row for row in judged if abs(row["paired_difference"]) <= row["paired_difference_se"]]
    above = [row for row in judged if row["paired_difference"] > row["paired_difference_se"]]
    parts = []
    if above:
        parts.append(f"Above the dense model: {listed(row['label'] for row in above)}.")
    if level:
        parts.append(f"Tied with the dense model: {listed(row['label'] for row in level)}.")
    if len(above) + len(level) < len(judged):
        parts.append("The others are below it." if parts else "Every method is below the dense model.")
    return " ".join(parts)


def _cosine_sentence(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["cosine"] is not None]
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["cosine"])
    level = [
        row["label"]
        for row in rows
        if row is not best and best["cosine"] - row["cosine"] <= _root_sum((best["cosine_se"], row["cosine_se"]))
    ]
    tied = f", tied with {listed(level)}" if level else ""
    return f"Features closest to the dense ones: {best['label']}, mean cosine {best['cosine']:.3f}{tied}."


def _speed_sentence(rows: Sequence[Row]) -> str:
    rows = sorted((row for row in rows if row["speedup"] is not None), key=lambda row: row["speedup"])
    if not rows:
        return ""
    slow, fast = (f"{row['speedup']:.2f}{TIMES} ({row['label']})" for row in (rows[0], rows[-1]))
    return f"Speed-ups from {slow} to {fast}." if len(rows) > 1 else f"Speed-up: {fast}."


def _leaders(budgets: Mapping[float, Sequence[Row]]) -> str:
    """How often each method has the highest accuracy or ties with it; a comparison needs two methods."""
    counts: dict[str, list[int]] = {}
    for rows in budgets.values():
        best = best_of(rows)
        leading = [best, *ties(rows, best)]
        for row in rows:
            count = counts.setdefault(row["label"], [0, 0])
            count[0] += any(row is other for other in leading)
            count[1] += 1
    if len(counts) < 2:
        return ""
    ordered = sorted(counts.items(), key=lambda item: -item[1][0] / item[1][1])
    return f"Highest or tied for it: {listed(f'{label} at {won} of {of}' for label, (won, of) in ordered)} budgets."


def _below_random(budgets: Mapping[float, Sequence[Row]]) -> str:
    """Which methods do worse than pruning at random, the baseline that knows nothing."""
    seen = False
    found: dict[str, list[str]] = {}
    for target, rows in budgets.items():
        for random in (row for row in rows if row["method"] == "random"):
            seen = True
            for row in rows:
                if row is not random and _gap(random, row) > _gap_error(random, row):
                    found.setdefault(row["label"], []).append(f"{100 * target:.0f} %")
    if not seen:
        return ""
    if not found:
        return "No method is behind random pruning by more than one standard error of the difference."
    words = listed(f"{label} at {listed(where)}" for label, where in found.items())
    return f"Behind random pruning by more than one standard error of the difference: {words}."


def _points(value: float) -> str:
    return f"{100 * value:.1f}"
