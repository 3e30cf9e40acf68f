"""A page for each results file: what was asked, how it was run, a plot, and a table to sort. Nothing on them is typed by hand."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS, Experiment
from squeezevit.report.rows import current
from values import Row, cell, heading

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LEFT_OUT = ("created", "machine", "versions", "command", "also", "seconds")


def files() -> dict[str, Path]:
    """The results files by the name of their page; one that no experiment is known for gets a page as well."""
    found = {path.stem: path for path in sorted(RESULTS.glob("*.json"))}
    folder = RESULTS / "finetune"
    short = {f"finetune_{path.parent.name}": path for path in sorted(folder.glob("*/finetune.json"))}
    return found | {"finetune": folder / "finetune.json"} | short


def experiment(name: str) -> Experiment:
    return EXPERIMENTS.get(name) or Experiment("Elsewhere", name.replace("_", " "), "")


def page_of(path: str) -> str:
    """The page of a path under results/: that of the file, or of the folder it is in."""
    return path.split("/", 1)[0].removesuffix(".json")


def navigation() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"Accuracy": [], "Speed": [], "Elsewhere": []}
    for name in sorted(files(), key=list(EXPERIMENTS).index if files().keys() <= EXPERIMENTS.keys() else str):
        groups[experiment(name).group].append(f"benchmarks/{name}.md")
    return groups


def pages() -> dict[str, str]:
    """All pages of this part of the site by their place."""
    read = {name: json.loads(path.read_text()) for name, path in files().items()}
    return {"benchmarks/index.md": overview(read)} | {
        f"benchmarks/{name}.md": page(name, content) for name, content in read.items()
    }


def overview(read: Mapping[str, Any]) -> str:
    known = [name for name in EXPERIMENTS if name in read] + [name for name in read if name not in EXPERIMENTS]
    rows = []
    for name in known:
        head = headers(read[name])[0]
        link = f'<a href="{name}.html">{escape(experiment(name).title)}</a>'
        rows.append([link, escape(experiment(name).asks), f"<time>{escape(head.get('created', '')[:10])}</time>"])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        "# Benchmarks\n\nEach page here is made from a file in `benchmarks/results` when the site is built: no number is typed. "
        "Click a column's head to sort by it. [Results](../results.md), [speed](../speed.md) and "
        "[without training](../training-free.md) say what the numbers mean.\n\n"
        f"<table><thead><tr><th>experiment</th><th>what it asks</th><th>date</th></tr></thead><tbody>{body}</tbody></table>\n"
    )


def page(name: str, content: Any) -> str:
    about = experiment(name)
    parts = [f"# {about.title}\n\n{about.asks}"]
    found = sections(content)
    for title, rows in found:
        if len(found) > 1:
            parts.append(f"## {title}")
        parts += [about.draw(rows), table(rows)]
    parts += ["## How it was run", *map(setting, headers(content))]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections(content: Any) -> list[tuple[str, list[Row]]]:
    """Every list of rows of a file, under the name that leads to it; an unreduced model is the first of its rows."""
    if isinstance(content, list):
        return [("rows", content)] if content and isinstance(content[0], dict) else []
    found = []
    for key, value in content.items():
        if key in LEFT_OUT or key == "dense":
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found.append((key, [*([content["dense"]] if "dense" in content else []), *value]))
        elif isinstance(value, dict):
            inside = sections(value)
            found += [
                (title if len(value) == len(inside) else key if title == "rows" else f"{key}, {title}", rows)
                for title, rows in inside
            ]
    return found


def headers(content: Any) -> list[Row]:
    """The part of a file that says when and how it was run: its own, or that of the first of its parts."""
    if not isinstance(content, dict):
        return [{}]
    parts = [head for value in content.values() if isinstance(value, dict) for head in headers(value) if head]
    first = parts[0] if parts else {}
    return [{**first, **content}] if "created" in content else [first]


def setting(head: Row) -> str:
    """Command, machine, versions and whatever else was the same for all rows."""
    said = {key: value for key, value in head.items() if isinstance(value, str | int | float) and key not in LEFT_OUT}
    lines = [f"- {key.replace('_', ' ')}: {escape(str(value))}" for key, value in said.items()]
    command = head.get("command", "")
    lines.insert(0, f"- command: `{command if command.startswith(('squeezevit', 'make')) else 'python benchmarks/' + command}`")
    machine, versions = head.get("machine", {}), head.get("versions", {})
    lines.append("- machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    lines.append("- versions: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
    lines.append(f"- date: {head.get('created', '')[:10]}")
    return "\n".join(lines) if command else ""


def table(rows: Sequence[Row]) -> str:
    """A table to sort: constant columns left out, standard errors behind what they belong to."""
    flat = [dict(flattened(tidy(row))) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    keys = [
        key
        for key in keys
        if not (key.endswith("_se") and key[:-3] in keys) and len({str(row.get(key)) for row in flat}) > (len(flat) > 1)
    ]
    head = "".join(f"<th>{escape(heading(key))}</th>" for key in keys)
    body = "".join("<tr>" + "".join(cell(row, key) for key in keys) + "</tr>" for row in flat)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def tidy(row: Row) -> Row:
    """One name for a method, its label of today, and one text for its reducer."""
    left_out = {"label", "reducer_full"} if "method" in row else set()
    named = {"method": current(row)["label"]} if "method" in row else {}
    whole = {"reducer": row["reducer_full"]} if row.get("reducer_full") else {}
    return {key: value for key, value in {**row, **named, **whole}.items() if key not in left_out}


def flattened(row: Row, before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in row.items():
        found += flattened(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", value)]
    return found
