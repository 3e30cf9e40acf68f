"""Without training: every method at equal multiply-adds, on images on which nothing was chosen.

    python benchmarks/training_free.py        # benchmarks/results/training_free.json

DINOv2 ViT-S/14, a linear probe on the unreduced model's features. Emoji at 112 pixels (fetched where they are missing): the preset
was chosen on images of fold 0 (search.py), this tests on fold 1. Solar cells at 168 and 112 pixels: some that the probe is fitted
on were chosen on, none that are tested. Photographs at 224 pixels, how near features stay: those crops of scikit-image's that
search.py did not see, and as many of scikit-learn's two, of which it saw none.
"""

from pathlib import Path
from typing import Any

import numpy as np

from squeezevit.bench.machine import header, write_json
from squeezevit.reducers.catalog import method
from squeezevit.report.rows import current
from tasks import TRIALS, Trial, trial
from workshop import RESULTS, arguments, earlier, known, p_value, say, standard_error, untrained

RIVALS = ("tome", "evit", "evit+norm", "topk", "random")


def compare(task: str, t: Trial, shares: list[float], names: list[str]) -> list[dict[str, Any]]:
    """A row for each method and share, with p-values against the rivals among them."""
    expected = None if t.probe is None else t.probe.hits(t.dense)
    unreduced = method("identity")
    rows = [{"task": task, "method": unreduced.name, "label": unreduced.label, "share": 1.0, "n": len(t.dense)}]
    rows[0] |= accuracy(expected, None, {})
    for share in shares:
        hits: dict[str, np.ndarray | None] = {}
        cosines: dict[str, np.ndarray] = {}
        own = []
        for row in map(method, names):
            plan = t.plan(row.name, share)
            found = t.features(plan.reducer)
            cosines[row.name], hits[row.name] = t.near(found), None if t.probe is None else t.probe.hits(found)
            own.append({"task": task, "method": row.name, "label": row.label, "share": share})
            own[-1] |= {"macs_share": plan.macs_share, "reducer": repr(plan.reducer)}
            right = accuracy(hits[row.name], None, {})
            say(f"{task} {share:.0%} {row.label}: cosine {cosines[row.name].mean():.4f} {right}")
        for line in own:
            name = line["method"]
            rivals = {method(r).label: r for r in RIVALS if r in names and r != name}
            against = {} if expected is None else {label: hits[r] for label, r in rivals.items()}
            line |= {"n": len(t.dense), "cosine": cosines[name].mean(), "cosine_se": standard_error(cosines[name])}
            line |= accuracy(hits[name], expected, against)
            line |= {f"p_cosine_{label}": p_value(cosines[name] - cosines[r]) for label, r in rivals.items()}
        rows += own
    return rows


def accuracy(hits: np.ndarray | None, dense: np.ndarray | None, against: dict[str, Any]) -> dict[str, float]:
    if hits is None:
        return {}
    out = {"accuracy": hits.mean(), "accuracy_se": standard_error(hits)}
    if dense is not None:
        out |= {"loss": (dense * 1.0 - hits).mean(), "loss_se": standard_error(dense * 1.0 - hits)}
    return out | {f"p_{label}": p_value(hits * 1.0 - other) for label, other in against.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="*", choices=TRIALS, default=TRIALS)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.44, 0.35))
    parser.add_argument("--methods", nargs="*", type=known, choices=untrained(), default=untrained(), help="rows of others stay")
    parser.add_argument("--json", type=Path, default=RESULTS / "training_free.json")
    args = parser.parse_args()
    result = earlier(args.json)  # other tasks stay
    for task in args.tasks:
        rows = compare(task, trial(task), args.shares, args.methods)
        before = [current(row) for row in result.get(task, {}).get("rows", [])]
        rows = [row for row in before if row["method"] not in {own["method"] for own in rows}] + rows
        result[task] = {**header(), "rows": rows}
        write_json(args.json, result)


if __name__ == "__main__":
    main()
