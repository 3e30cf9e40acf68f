"""What the demo's numbers say, found by rules and never written by hand, and how the report writes numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

from squeezevit.report.rows import Row

TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"
PRESET = "training-free"
COARSE = 0.03  # a standard error of accuracy above which accuracies rank nothing: methods differ by a few points


def headline(results: Mapping[str, Any]) -> str:
    """What the preset, or the first method where it was not run, saves and costs at about half of the work, in one sentence.

    Where accuracies are `coarse` the features' fidelity comes first.
    """
    rows = results["rows"]
    row = min(rows, key=lambda row: (row["method"] != PRESET, abs(row["target"] - 0.5)))
    work = "half the work" if abs(row["macs_share"] - 0.5) < 0.015 else f"{100 * row['macs_share']:.0f} % of the work"
    fast = "" if row["speedup"] is None else f"{row['speedup']:.1f} times as fast"
    near = "" if row["cosine"] is None else f"features at a cosine of {row['cosine']:.3f} to the unreduced model's"
    rough = coarse(results)
    parts = [work, near, fast] if rough else [work, _accuracy_kept(row), fast]
    text = f"{row['label']}: {', '.join(part for part in parts if part)}."
    if rough:
        error = results["dense"]["accuracy_se"] or 0.0
        count = results["settings"]["n_test"]
        text += f" {count} photographs tell accuracies to ± {_points(error)} points only, too coarse to rank methods by."
    return text


def coarse(results: Mapping[str, Any]) -> bool:
    """Whether too few photographs were tested to compare methods by accuracy; their features can still be compared."""
    return bool(results["settings"].get("quick")) or (results["dense"]["accuracy_se"] or 0.0) > COARSE


def closest(rows: Sequence[Row]) -> list[Row]:
    """The row whose features are closest to the dense model's, and those within one standard error of the difference of it."""
    rows = [row for row in rows if row["cosine"] is not None]
    if not rows:
        return []
    best = max(rows, key=lambda row: row["cosine"])
    level = (row for row in rows if best["cosine"] - row["cosine"] <= _root_sum((best["cosine_se"], row["cosine_se"])))
    return [best, *(row for row in level if row is not best)]


def most_accurate(rows: Sequence[Row]) -> list[Row]:
    """The row of highest accuracy, and those that tie with it."""
    best = best_of(rows)
    return [best, *ties(rows, best)]


def few_left(results: Mapping[str, Any]) -> str:
    """Why methods end with so different counts of tokens at the smallest budget: where they reduce. Empty where all do so alike.

    Results of earlier versions, which do not tell the blocks of the stages, have none.
    """
    target, rows = list(by_budget(results["rows"]).items())[-1]
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        if row.get("stages"):
            groups.setdefault(tuple(row["stages"]), []).append(row)
    if len(groups) < 2:
        return ""
    parts = [_course(stages, group) for stages, group in sorted(groups.items(), reverse=True)]
    return (
        f"Why some end with few tokens at {100 * target:.0f} % of the work: it is a matter of where a method reduces, not of how "
        f"it chooses tokens. {' '.join(parts)}"
    )


def _course(stages: tuple[int, ...], rows: Sequence[Row]) -> str:
    """What stages at these blocks mean for the tokens of methods that have them."""
    names, left, depth = listed(row["label"] for row in rows), _range([row["tokens"][-1] for row in rows]), rows[0]["depth"]
    if len(stages) == depth:
        halfway = _range([row["tokens"][depth // 2] for row in rows])
        return f"In every block: {names}, with {halfway} left halfway and {left} at the end."
    if stages[0] == 0:
        return f"In {len(stages)} stages from the first block on: {names}, with {left} at the end."
    return (
        f"From block {stages[0]} on: {names}. The {stages[0]} blocks before it, {100 * stages[0] / depth:.0f} % of all, run on "
        f"all {rows[0]['tokens'][0]} patch tokens, so that few can be left to the later ones: {left} at the end."
    )


def findings(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What the numbers say, as (heading, plain sentences): one entry across the budgets, then one per budget.

    Two values *tie* where they differ by at most one standard error of their difference. Against the dense model that
    error is the paired one; between two methods it is the root sum of squares of their paired errors, or of their own
    errors where a paired one is missing. Where accuracies are `coarse`, methods are compared by their features alone.
    """
    budgets = by_budget(results["rows"])
    if coarse(results):
        return _by_fidelity(results, budgets)
    across = [
        sentence for sentence in (_leaders(budgets, most_accurate, "Highest or tied for it"), _below_random(budgets)) if sentence
    ]
    out = [("Over all budgets", across)] if across else []
    for target, rows in budgets.items():
        sentences = [_accuracy_sentence(rows), _dense_sentence(rows), _cosine_sentence(rows), _speed_sentence(rows)]
        out.append((f"At {budget_words(target)}", [sentence for sentence in sentences if sentence]))
    return out


def _by_fidelity(results: Mapping[str, Any], budgets: Mapping[float, Sequence[Row]]) -> list[tuple[str, list[str]]]:
    across = [_leaders(budgets, closest, "Features closest to the dense ones, or tied for it")]
    out = [("Over all budgets", [sentence for sentence in across if sentence])]
    for target, rows in budgets.items():
        sentences = [_cosine_sentence(rows), _speed_sentence(rows)]
        out.append((f"At {budget_words(target)}", [sentence for sentence in sentences if sentence]))
    return [(heading, sentences) for heading, sentences in out if sentences]


def _accuracy_kept(row: Row) -> str:
    gap, error = row["paired_difference"], row["paired_difference_se"]
    if gap is None:
        return f"{plus_minus(row['accuracy'], row['accuracy_se'], 100)} % accuracy"
    if error is not None and abs(gap) <= error:
        return f"the same accuracy ({signed(gap, error)} points)"
    return f"{plus_minus(abs(gap), error, 100)} points of accuracy {'lost' if gap < 0 else 'gained'}"


def _range(counts: Sequence[int]) -> str:
    """`2 to 4 tokens`."""
    low, high = min(counts), max(counts)
    return f"{high} token{'' if high == 1 else 's'}" if low == high else f"{low} to {high} tokens"


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
    leading = closest(rows)
    if not leading:
        return ""
    best, level = leading[0], [row["label"] for row in leading[1:]]
    tied = f", tied with {listed(level)}" if level else ""
    return f"Features closest to the dense ones: {best['label']}, mean cosine {best['cosine']:.3f}{tied}."


def _speed_sentence(rows: Sequence[Row]) -> str:
    rows = sorted((row for row in rows if row["speedup"] is not None), key=lambda row: row["speedup"])
    if not rows:
        return ""
    slow, fast = (f"{row['speedup']:.2f}{TIMES} ({row['label']})" for row in (rows[0], rows[-1]))
    return f"Speed-ups from {slow} to {fast}." if len(rows) > 1 else f"Speed-up: {fast}."


def _leaders(budgets: Mapping[float, Sequence[Row]], first: Callable[[Sequence[Row]], list[Row]], words: str) -> str:
    """How often each method is among the `first`; a comparison needs two methods."""
    counts: dict[str, list[int]] = {}
    for rows in budgets.values():
        leading = first(rows)
        for row in rows:
            count = counts.setdefault(row["label"], [0, 0])
            count[0] += any(row is other for other in leading)
            count[1] += 1
    if len(counts) < 2 or not any(won for won, _ in counts.values()):
        return ""
    ordered = sorted(counts.items(), key=lambda item: -item[1][0] / item[1][1])
    return f"{words}: {listed(f'{label} at {won} of {of}' for label, (won, of) in ordered)} budgets."


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
