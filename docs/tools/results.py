"""A page for each results file: what was asked, how it was run, a plot, and a table to sort. Nothing on them is typed by hand."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import plots
from squeezevit.report import charts
from squeezevit.report.rows import current

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
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
PERCENT = ("macs_share", "share", "target", "accuracy", "asked", "predicted", "measured", "again", "top_tenth", "counts_right", "cells_right")
TEXTS = ("reducer", "reducer_full", "default")
LEFT_OUT = ("created", "machine", "versions", "command", "also", "seconds")


class Experiment(NamedTuple):
    """A results file: where it stands, what it asks, and how it is drawn."""

    group: str
    title: str
    asks: str
    draw: Callable[[list[Row]], str] = lambda rows: ""


def against_macs(*which: str) -> Callable[[list[Row]], str]:
    """Lines over the share of multiply-adds, one for each method: accuracy, cosine, speed."""
    kinds = {"accuracy": charts.accuracy_chart, "cosine": charts.cosine_chart, "speed": charts.speed_chart}

    def draw(rows: list[Row]) -> str:
        full = [{"accuracy": None, "accuracy_se": None, "cosine": None, "cosine_se": None, "speedup": None, **current(row)} for row in rows]
        full = [{**row, "macs_share": row.get("macs_share", row.get("macs")), "target": row.get("share", row.get("target"))} for row in full]
        dense = next((row for row in full if row["method"] == "identity"), {"macs_share": 1.0, "cosine": 1.0, "speedup": 1.0})
        dense = {"macs": 1e9, "accuracy": None, "accuracy_se": None, **dense}
        results = {"dense": dense, "rows": [row for row in full if row["method"] != "identity"]}
        drawn = [kinds[name](results) for name in which if name != "accuracy" or dense["accuracy"] is not None]
        return "".join(f'<figure class="chart">{svg}</figure>' for svg in drawn)

    return draw


def dots(label: str, value: str, series: str = "", *, unit: str = "", line: float | None = None, only: Mapping[str, Any] | None = None) -> Callable[[list[Row]], str]:
    """A dot for each row on a line for each label, a colour for each series."""

    def draw(rows: list[Row]) -> str:
        chosen = [row for row in rows if all(row.get(key) == wanted for key, wanted in (only or {}).items())]
        points = [(named(row, label), named(row, series), deep(row, value)) for row in chosen]
        return plots.dots([point for point in points if point[2] is not None], unit or heading(value), line)

    return draw


EXPERIMENTS = {
    "demo": Experiment("Accuracy", "The demo", "How much accuracy and time does each method leave at equal multiply-adds?", against_macs("accuracy", "cosine", "speed")),
    "training_free": Experiment("Accuracy", "Without training", "How near does each method stay to a model that nobody fine-tunes?", against_macs("accuracy", "cosine")),
    "finetune": Experiment("Accuracy", "Fine-tuned", "What is left after fine-tuning every method by one recipe?", dots("name", "accuracy", "macs_share", unit="accuracy, %")),
    "dense": Experiment("Accuracy", "Dense tasks", "How near are patch tokens and saliency maps on the full grid?", against_macs("cosine")),
    "pca": Experiment("Accuracy", "Dense features at 518 pixels", "The same with 1,369 patches, and how fast.", against_macs("cosine", "speed")),
    "pooling": Experiment("Accuracy", "Pooling", "What does a plain mean of reduced tokens cost?", dots("label", "by_size", "share", unit="cosine, by sv.pool")),
    "why": Experiment("Accuracy", "Why it works", "Which choices of the preset matter?", dots("variant", "cosine", unit="mean cosine")),
    "search": Experiment("Accuracy", "How the preset was chosen", "Which schedule and which parts stay nearest?", dots("candidate", "cosine", "share", unit="cosine, photographs", only={"task": "photographs"})),
    "calibrate": Experiment("Accuracy", "A searched schedule", "What does a search on your images gain?"),
    "adaptive": Experiment("Accuracy", "A budget for each image", "Does it help to give images budgets of their own?"),
    "bench": Experiment("Speed", "DeiT-S", "How fast are the methods, and how far over the limit?", dots("reducer", "speedup_best", unit="speed-up, best round", line=1)),
    "bench_bf16": Experiment("Speed", "DeiT-S in bfloat16", "The same under autocast.", dots("reducer", "speedup_best", unit="speed-up, best round", line=1)),
    "methods_cpu": Experiment("Speed", "All methods at half", "Speed, latency and memory of every method.", dots("label", "speedup_best", unit="speed-up, best round", line=1)),
    "methods_dinov2_112": Experiment("Speed", "DINOv2 at 112 pixels", "Speed at four budgets.", against_macs("speed")),
    "overhead_cpu": Experiment("Speed", "Over the limit", "How close is each method to merely sliced tokens?", dots("reducer", "overhead_best", "batch_size", unit="time over that of the limit, DeiT-S, 224 pixels", line=1, only={"model": "deit_small_patch16_224", "image_size": 224, "compiled": None})),
    "families": Experiment("Speed", "Libraries", "Is every library's model as close to the limit?", dots("model", "overhead_best", "reducer", unit="time over that of the limit", line=1)),
    "families_relative": Experiment("Speed", "Relative positions", "The same for models with relative positions.", dots("model", "overhead_best", "reducer", unit="time over that of the limit", line=1)),
    "resolution_cpu": Experiment("Speed", "More pixels", "How does the speed-up grow with the image?", dots("image_size", "speedup_best", "name", unit="speed-up, best round", line=1)),
    "steps_cpu": Experiment("Speed", "What a stage costs", "Which step of a stage takes how much of a block?", dots("step", "share_of_block", "batch_size", unit="share of a block's time", only={})),
    "planner": Experiment("Speed", "Plans", "Does a plan for a time meet it?"),
    "train_step_cpu": Experiment("Speed", "A training step", "What does a training step cost?", dots("name", "of_dense", unit="time, of dense", line=1)),
    "memory": Experiment("Speed", "Memory", "What does a forward add to the peak?", dots("reducer", "of_unreduced", "model", unit="memory, of unreduced", line=1)),
    "memory_long": Experiment("Speed", "Memory with many tokens", "The same for 9,216 and 16,384 patches.", dots("reducer", "of_unreduced", "patch_tokens", unit="memory, of unreduced", line=1)),
    "deploy": Experiment("Elsewhere", "Exported models", "How fast and how true is a model in other runtimes?", dots("format", "batch_16.speedup", "share", unit="speed-up over torch fp32, unreduced", line=1)),
    "vlm": Experiment("Elsewhere", "Vision-language: cost", "What do fewer image tokens save?", dots("keep", "prefill_share_best", "what", unit="prefill, share of dense", line=1)),
    "vlm_quality": Experiment("Elsewhere", "Vision-language: answers", "How far do answers move?", dots("what", "kl", "tokens", unit="KL at the positions of the whole prompt", only={"places": "original"})),
    "registry": Experiment("Elsewhere", "Every model by name", "Which models of timm and transformers can be reduced?"),
    "threads": Experiment("Elsewhere", "Threads", "Do threads that share a model disturb each other?"),
    "fuzz": Experiment("Elsewhere", "Odd calls", "Do odd command lines and calls end in an error that says what to do?"),
}  # fmt: skip


def files() -> dict[str, Path]:
    """The results files by the name of their page; one that no experiment is known for gets a page as well."""
    found = {path.stem: path for path in sorted(RESULTS.glob("*.json"))}
    return found | {"finetune": RESULTS / "finetune" / "finetune.json"}


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
    return {"benchmarks/index.md": overview(read)} | {f"benchmarks/{name}.md": page(name, content) for name, content in read.items()}


def overview(read: Mapping[str, Any]) -> str:
    known = [name for name in EXPERIMENTS if name in read] + [name for name in read if name not in EXPERIMENTS]
    rows = []
    for name in known:
        head = headers(read[name])[0]
        link = f'<a href="{name}.html">{escape(experiment(name).title)}</a>'
        rows.append([link, escape(experiment(name).asks), escape(head.get("created", "")[:10]), escape(processor(head))])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        "# Benchmarks\n\nEach page here is made from one file in `benchmarks/results`, when the site is built: no number is typed. Click a "
        "column's head to sort by it. [Results](../results.md), [speed](../speed.md) and [without training](../training-free.md) say what "
        "the numbers mean. Everything was measured on processors that others share.\n\n"
        f"<table><thead><tr><th>experiment</th><th>what it asks</th><th>date</th><th>machine</th></tr></thead><tbody>{body}</tbody></table>\n"
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
            found += [(key if title == "rows" else f"{key}, {title}", rows) for title, rows in sections(value)]
    return found


def headers(content: Any) -> list[Row]:
    """The parts of a file that say when and how it was run."""
    if isinstance(content, dict) and "created" in content:
        return [content]
    return [value for value in content.values() if isinstance(value, dict) and "created" in value][:1] if isinstance(content, dict) else [{}]


def processor(head: Row) -> str:
    machine = head.get("machine", {})
    return ", ".join(str(part) for part in (machine.get("cpu"), machine.get("gpu"), machine.get("device")) if part)


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
    flat = [dict(flattened(row)) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    keys = [key for key in keys if not (key.endswith("_se") and key[:-3] in keys) and len({str(row.get(key)) for row in flat}) > (len(flat) > 1)]
    head = "".join(f"<th>{escape(heading(key))}</th>" for key in keys)
    body = "".join("<tr>" + "".join(cell(row, key) for key in keys) + "</tr>" for row in flat)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def flattened(row: Row, before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in row.items():
        found += flattened(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", value)]
    return found


def heading(key: str) -> str:
    """A column's name as people say it.

    >>> heading("macs_share"), heading("latency_best_ms"), heading("batch_16.speedup")
    ('MACs, %', 'latency best, ms', 'batch 16: speedup')
    """
    if key in NAMES:
        return NAMES[key]
    for ending, unit in UNITS.items():
        if key.endswith(ending):
            key = key.removesuffix(ending) + unit
    return key.replace(".", ": ").replace("_", " ") + (", %" if key in PERCENT else "")


def cell(row: Row, key: str) -> str:
    value = row.get(key)
    shown = text(key, value)
    if isinstance(row.get(f"{key}_se"), float):
        shown += f" ± {text(key, row[f'{key}_se'])}"
    if key in TEXTS and isinstance(value, str):
        return f'<td><code title="{escape(value)}">{escape(plots.short(value))}</code></td>'
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f'<td class="number" data-sort="{value!r}">{shown}</td>' if number else f"<td>{shown}</td>"


def text(key: str, value: Any) -> str:
    """A value to the digits that matter.

    >>> text("accuracy", 0.8125), text("macs", 4598882304), text("p", 3e-9), text("tokens", [196, 98])
    ('81.2', '4.60', '3e-09', '196, 98')
    """
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        return ", ".join(text(key, part) for part in value)
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
        return plots.short(str(value))
    return f"{re.sub('_', ' ', key)} {value}" if isinstance(value, int | float) else str(value)


def deep(row: Row, path: str) -> float | None:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return 100 * value if path in PERCENT and value is not None else value
