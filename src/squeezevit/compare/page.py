"""The comparison as one page that loads nothing: a table sorted by what the reader chooses, and charts against measured time."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from squeezevit.report.charts import marker_svg, styles, time_chart
from squeezevit.report.findings import NONE, TIMES, plus_minus
from squeezevit.report.html import document, scrolled, section, words
from squeezevit.report.rows import current

FEW = 30  # images that tell methods apart only where they differ much
TITLE = "Methods of token reduction, compared"
STYLE = """
.sortable button { all: unset; cursor: pointer; }
.sortable button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
.sortable [aria-sort] { color: var(--ink); }
.sortable [aria-sort="descending"] button::after { content: " \\2193"; }
.sortable [aria-sort="ascending"] button::after { content: " \\2191"; }
.choices label { margin-left: 0.7rem; white-space: nowrap; }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? "";
    const order = (a, b) => a === "" ? 1 : b === "" ? -1 : (isNaN(a) ? a.localeCompare(b) : a - b) * (up ? 1 : -1);
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
  }));
}
for (const choice of document.querySelectorAll("[data-share]")) choice.addEventListener("change", () => {
  const shown = new Set([...document.querySelectorAll("[data-share]:checked")].map(box => box.dataset.share));
  for (const row of document.querySelectorAll("tr[data-of]")) row.hidden = !shown.has(row.dataset.of);
});
"""


def write_page(results: Mapping[str, Any], path: Path, subject: str = "") -> None:
    """Write what `compare` returned as a page. subject: what was compared on, as "my-vit, 400 images of photographs".

    Raises MissingExtraError without matplotlib.
    """
    results = {**results, "dense": current(results["dense"]), "rows": [current(row) for row in results["rows"]]}
    date = escape(results["created"].replace("T", " ")[:16])
    body = [
        f'<header><p class="over">{date}</p><h1>{TITLE}</h1>{_lead(results, subject)}</header>',
        section("All methods", _table(results), wide=True),
        section("Against measured time", _charts(results), wide=True),
        section("How it was measured", _protocol(results)),
    ]
    path.write_text(document(TITLE, "".join(body), STYLE, SCRIPT), encoding="utf-8")


def judged_by(results: Mapping[str, Any]) -> str:
    """What tells methods apart: "accuracy" where labels are known, else "cosine"."""
    return "accuracy" if "accuracy" in results["dense"] else "cosine"


def _lead(results: Mapping[str, Any], subject: str) -> str:
    measure = judged_by(results)
    parts = []
    for share in results["shares"]:
        if not (rows := [row for row in results["rows"] if row["share"] == share]):
            continue
        first = [row["label"] for row in sorted(rows, key=lambda row: -row[measure]) if row[f"{measure}_rank"] == 1]
        parts.append(f"<li>at {100 * share:.0f} %: {escape(', '.join(first))}</li>")
    told = f"First in {measure}, or not told from the first, by share of the unreduced model's multiply-adds:"
    return f'<p class="lead">{words(subject)}</p><p>{words(told)}</p><ul>{"".join(parts)}</ul>'


def _table(results: Mapping[str, Any]) -> str:
    look, sizes = styles(results["rows"]), results["batch_sizes"]
    labelled, answers = "accuracy" in results["dense"], "same" in results["dense"]
    heads = ["Method", "Share", "% of MACs", *(["Accuracy, %", "Lost, points", "Rank"] if labelled else []), "Cosine", "Rank"]
    heads += [*(["Same answer, %"] if answers else []), *(f"Speed-up, batch {size}" for size in sizes)]
    head = "".join(f'<th scope="col"><button type="button">{escape(text)}</button></th>' for text in heads)
    lines = []
    for row in [results["dense"], *results["rows"]]:
        dense = row is results["dense"]
        share = "" if dense else "own" if row["share"] is None else f"{row['share']:g}"
        mark = "" if dense or row["method"] not in look else marker_svg(look[row["method"]])
        label, setting = escape(row["label"]), escape(row["reducer"])
        cells = [f'<th scope="row" data-value="{label}">{mark}{label}<code>{setting}</code></th>']
        cells.append(_cell(row["share"], NONE if not share else "own" if share == "own" else f"{100 * row['share']:.0f} %"))
        cells.append(_cell(row["macs_share"], f"{100 * row['macs_share']:.1f}"))
        if labelled:
            cells.append(_cell(row["accuracy"], plus_minus(row["accuracy"], row["accuracy_se"], 100)))
            cells.append(_cell(row["loss"], NONE if dense else plus_minus(row["loss"], row["loss_se"], 100)))
            cells.append(_cell(row.get("accuracy_rank"), str(row.get("accuracy_rank", NONE))))
        cells.append(_cell(row["cosine"], NONE if dense else plus_minus(row["cosine"], row["cosine_se"], 1, 4)))
        cells.append(_cell(row.get("cosine_rank"), str(row.get("cosine_rank", NONE))))
        if answers:
            cells.append(_cell(row["same"], NONE if dense else f"{100 * row['same']:.1f}"))
        for size in sizes:
            at = row["times"][str(size)]
            small = "" if dense else f"<small>best {at['speedup_best']:.2f}{TIMES}</small>"
            cells.append(f'<td data-value="{at["speedup"]}">{at["speedup"]:.2f}{TIMES}{small}</td>')
        of = "" if share in ("", "own") else f' data-of="{share}"'  # the others stand beside every share
        lines.append(f"<tr{of}>{''.join(cells)}</tr>")
    boxes = "".join(
        f'<label><input type="checkbox" checked data-share="{share:g}"> {100 * share:.0f} %</label> ' for share in results["shares"]
    )
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    fine = (
        "± is one standard error over the images. Rank: 1 and the number of methods at that share that are told to be better, by "
        "paired tests of all pairs, corrected for their number (Holm, 5 %). Speed-up: median of each round's ratio to the "
        "unreduced model in the same round; below it, best against best. A click on a heading sorts."
    )
    if results["images"] < FEW:
        fine += f" {results['images']} images are few: methods that differ may not be told apart."
    left = "".join(
        f"<li>{escape(one['label'])} at {100 * one['share']:.0f} %: {escape(one['reason'])}</li>" for one in results["left_out"]
    )
    choices = f'<p class="choices">Shares of the multiply-adds: {boxes}</p>'
    missing = f'<p class="fine">Left out:</p><ul class="fine">{left}</ul>' if left else ""
    return f'{choices}{scrolled(table, "All methods")}<p class="fine">{escape(fine)}</p>{missing}'


def _cell(value: float | None, text: str) -> str:
    return f'<td data-value="{"" if value is None else value}">{escape(text)}</td>'


def _charts(results: Mapping[str, Any]) -> str:
    measure = judged_by(results)
    out = []
    for size in results["batch_sizes"]:
        svg = time_chart(results, measure, size)
        text = f"{measure.capitalize()} against the median time of an image at batch {size}; up and to the left is better."
        out.append(f'<figure class="chart">{svg}<figcaption>{escape(text)}</figcaption></figure>')
    return f'<div class="charts">{"".join(out)}</div>'


def _protocol(results: Mapping[str, Any]) -> str:
    machine, sizes = results["machine"], ", ".join(map(str, results["batch_sizes"]))
    facts = {
        "Command": results["command"],
        "Images": f"{results['images']:,}",
        "Timing": f"batches of {sizes}; all methods took turns, round by round, for {results['rounds']} rounds",
        "Machine": f"{machine['cpu']}, {machine['cores']} cores; {machine['device']}, {machine['threads']} threads",
        "Versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f'<dl class="facts">{items}</dl>'
