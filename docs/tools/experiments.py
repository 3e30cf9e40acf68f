"""What each results file is about: its place, its title, what it asks, and how it is drawn."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dotplots
from squeezevit.report import charts
from squeezevit.report.rows import current
from values import Row, deep, heading, named


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
        full = [
            {"accuracy": None, "accuracy_se": None, "cosine": None, "cosine_se": None, "speedup": None, **current(row)}
            for row in rows
        ]
        full = [
            {**row, "macs_share": row.get("macs_share", row.get("macs")), "target": row.get("share", row.get("target"))}
            for row in full
        ]
        dense = next((row for row in full if row["method"] == "identity"), {"macs_share": 1.0, "cosine": 1.0, "speedup": 1.0})
        counted = dense.get("macs", 0) > 1e6
        dense = {"accuracy": None, "accuracy_se": None, **dense, "macs": dense["macs"] if counted else 1e9}
        results = {"dense": dense, "rows": [row for row in full if row["method"] != "identity"]}
        drawn = [kinds[name](results) for name in which if name != "accuracy" or dense["accuracy"] is not None]
        if not counted:  # then the axis has shares alone
            drawn = [re.sub(r"(?<=>)[\d.]+ G(?=<)", "", svg) for svg in drawn]
        return side_by_side(drawn)

    return draw


def side_by_side(drawn: list[str]) -> str:
    figures = "".join(f'<figure class="chart">{svg}</figure>' for svg in drawn)
    return f'<div class="charts">{figures}</div>'


def against_time(*batches: int) -> Callable[[list[Row]], str]:
    """Accuracy, or cosine where there are no labels, over the measured time of an image; a chart for each batch size."""

    def draw(rows: list[Row]) -> str:
        if "times" not in rows[-1]:  # methods that were left out
            return ""
        dense, *rest = (current(row) for row in rows)
        measure = "accuracy" if "accuracy" in dense else "cosine"
        return side_by_side([charts.time_chart({"dense": dense, "rows": rest}, measure, batch) for batch in batches])

    return draw


def dots(
    label: str, value: str, series: str = "", *, unit: str = "", line: float | None = None, only: Mapping[str, Any] | None = None
) -> Callable[[list[Row]], str]:
    """A dot for each row on a line for each label, a colour for each series."""

    def draw(rows: list[Row]) -> str:
        chosen = [row for row in rows if all(row.get(key) == wanted for key, wanted in (only or {}).items())]
        points = [(named(row, label), named(row, series), deep(row, value)) for row in chosen]
        return dotplots.dots([point for point in points if point[2] is not None], unit or heading(value), line)

    return draw


_OVER = "speed-up over torch fp32, unreduced"
OVER_TORCH = dots("format", "batch_16.speedup", "share", unit=_OVER, line=1)  # of exported models
CHAINED = dots("format", "speedup", "method", unit=_OVER, line=1)
FINE_TUNED = dots("name", "accuracy", unit="accuracy, %")
EXPERIMENTS = {
    "demo": Experiment(
        "Accuracy",
        "The demo",
        "How much accuracy and time does each method leave at equal multiply-adds?",
        against_macs("accuracy", "cosine", "speed"),
    ),
    "leaderboard": Experiment(
        "Accuracy",
        "Leaderboard",
        "Every method that needs no training, at several budgets, on every task: who is first, and in what time? A rank is 1 and "
        "the number of methods told to be better at that budget, by paired tests of all pairs, corrected for their number.",
        against_time(1, 16),
    ),
    "finetune": Experiment(
        "Accuracy",
        "Fine-tuned",
        "What is left after fine-tuning every method by one recipe?",
        dots("name", "accuracy", "macs_share", unit="accuracy, %"),
    ),
    "finetune_cpu35": Experiment(
        "Accuracy",
        "Fine-tuned, 35 % in 4 epochs",
        "The same in a shorter recipe, for which the rivals were run, too.",
        FINE_TUNED,
    ),
    "finetune_warm35": Experiment(
        "Accuracy",
        "Fine-tuned, 35 % with warmed heads",
        "How far do today's preset, ToMe and dTPS with warmed heads come in 4 epochs?",
        FINE_TUNED,
    ),
    "finetune_half50": Experiment(
        "Accuracy",
        "Fine-tuned, 50 % in 4 epochs",
        "The same at half: class-token, eTPS, and the rivals that merge in every block.",
        FINE_TUNED,
    ),
    "finetune_detach35": Experiment(
        "Accuracy",
        "Fine-tuned, 35 %, heads that leave the backbone alone",
        "What does it cost a backbone that the gradient of warmed heads goes into it?",
        FINE_TUNED,
    ),
    "chain_vnni": Experiment(
        "Elsewhere",
        "From training to int8",
        "What do training, reduction, export and int8 cost and gain together, on solar cells?",
        CHAINED,
    ),
    "chain": Experiment(
        "Elsewhere",
        "From training to int8 on an older processor",
        "The same where int8 has no products of its own.",
        CHAINED,
    ),
    "dense": Experiment(
        "Accuracy", "Dense tasks", "How near are patch tokens and saliency maps on the full grid?", against_macs("cosine")
    ),
    "pca": Experiment(
        "Accuracy", "Dense features at 518 pixels", "The same with 1,369 patches, and how fast.", against_macs("cosine", "speed")
    ),
    "pooling": Experiment(
        "Accuracy",
        "Pooling",
        "What does a plain mean of reduced tokens cost?",
        dots("label", "by_size", "share", unit="cosine, by sv.pool"),
    ),
    "why": Experiment(
        "Accuracy", "Why it works", "Which choices of the preset matter?", dots("variant", "cosine", unit="mean cosine")
    ),
    "search": Experiment(
        "Accuracy",
        "How the preset was chosen",
        "Which schedule and which parts stay nearest?",
        dots("candidate", "cosine", "share", unit="cosine, photographs", only={"task": "photographs"}),
    ),
    "calibrate": Experiment("Accuracy", "A searched schedule", "What does a search on your images gain?"),
    "adaptive": Experiment("Accuracy", "A budget for each image", "Does it help to give images budgets of their own?"),
    "bench": Experiment(
        "Speed",
        "DeiT-S",
        "How fast are the methods, and how far over the limit?",
        dots("reducer", "speedup_best", unit="speed-up, best round", line=1),
    ),
    "bench_bf16": Experiment(
        "Speed",
        "DeiT-S in bfloat16",
        "The same under autocast.",
        dots("reducer", "speedup_best", unit="speed-up, best round", line=1),
    ),
    "methods_cpu": Experiment(
        "Speed",
        "All methods at half",
        "Speed, latency and memory of every method.",
        dots("label", "speedup_best", unit="speed-up, best round", line=1),
    ),
    "rivals_cpu": Experiment(
        "Speed",
        "What the rivals cost",
        "How far over the limit is every method that needs no training, with one image and with 16?",
        dots("label", "overhead_best", "batch_size", unit="time over that of the limit", line=1),
    ),
    "overhead_cpu": Experiment(
        "Speed",
        "Over the limit",
        "How close is each method to merely sliced tokens?",
        dots(
            "reducer",
            "overhead_best",
            "batch_size",
            unit="time over that of the limit, DeiT-S, 224 pixels",
            line=1,
            only={"model": "deit_small_patch16_224", "image_size": 224, "compiled": None},
        ),
    ),
    "families": Experiment(
        "Speed",
        "Libraries",
        "Is every library's model as close to the limit?",
        dots("model", "overhead_best", "reducer", unit="time over that of the limit", line=1),
    ),
    "families_relative": Experiment(
        "Speed",
        "Relative positions",
        "The same for models with relative positions.",
        dots("model", "overhead_best", "reducer", unit="time over that of the limit", line=1),
    ),
    "resolution_cpu": Experiment(
        "Speed",
        "More pixels",
        "How does the speed-up grow with the image?",
        dots("image_size", "speedup_best", "name", unit="speed-up, best round", line=1),
    ),
    "steps_cpu": Experiment(
        "Speed",
        "What a stage costs",
        "Which step of a stage takes how much of a block?",
        dots("step", "share_of_block", "batch_size", unit="share of a block's time", only={}),
    ),
    "planner": Experiment("Speed", "Plans", "Does a plan for a time meet it?"),
    "train_step_cpu": Experiment(
        "Speed", "A training step", "What does a training step cost?", dots("name", "of_dense", unit="time, of dense", line=1)
    ),
    "memory": Experiment(
        "Speed",
        "Memory",
        "What does a forward add to the peak?",
        dots("reducer", "of_unreduced", "model", unit="memory, of unreduced", line=1),
    ),
    "memory_long": Experiment(
        "Speed",
        "Memory with many tokens",
        "The same for 9,216 and 16,384 patches.",
        dots("reducer", "of_unreduced", "patch_tokens", unit="memory, of unreduced", line=1),
    ),
    "deploy_vnni": Experiment(
        "Elsewhere",
        "Exported models",
        "How fast and how true is a model in other runtimes, on a processor with int8 products and bfloat16?",
        OVER_TORCH,
    ),
    "deploy": Experiment(
        "Elsewhere",
        "Exported models on an older processor",
        "The same on a processor that has neither.",
        OVER_TORCH,
    ),
    "deploy_168": Experiment(
        "Elsewhere",
        "Exported models at 168 pixels",
        "The same at four budgets, compiled, and one image at a time.",
        OVER_TORCH,
    ),
    "deploy_deit": Experiment(
        "Elsewhere",
        "Exported DeiT-S",
        "How fast is eTPS in other runtimes, compiled, and one image at a time?",
        OVER_TORCH,
    ),
    "deploy_at_once": Experiment(
        "Elsewhere",
        "Exported models, two batches at once",
        "How much more does a processor do where each thread has a batch of its own, and what does int8 do in ONNX Runtime?",
        dots("format", "batch_16_by_2.speedup", "share", unit=f"{_OVER}; two batches at once", line=1),
    ),
    "deploy_one": Experiment(
        "Elsewhere",
        "Exported models, one image at a time",
        "The same for images that come one by one.",
        dots("format", "batch_1_by_2.speedup", "share", unit=f"{_OVER}; two images at once", line=1),
    ),
    "recall": Experiment(
        "Accuracy",
        "Retrieval",
        "How many of the ten nearest photographs does a reduced model find?",
        dots("label", "recall_apart", "share", unit="recall@10, queries and table by the reduced model"),
    ),
    "scale": Experiment("Elsewhere", "Photographs on Ray", "What do speed, starting and memory cost beside the plain command?"),
    "elastic": Experiment("Elsewhere", "A training that loses a machine", "Does it go on, and is it the same?"),
    "overlap": Experiment("Elsewhere", "Reading beside the model", "How much of reading photographs hides behind the model?"),
    "browser": Experiment(
        "Elsewhere",
        "In the browser",
        "How fast is a model in the visitor's browser, int8 and float?",
        dots("method", "speedup", "precision", unit="speed-up over the unreduced model of that precision", line=1),
    ),
    "vlm": Experiment(
        "Elsewhere",
        "Vision-language: cost",
        "What do fewer image tokens save?",
        dots("keep", "prefill_share_best", "what", unit="prefill, share of dense", line=1),
    ),
    "vlm_both": Experiment(
        "Elsewhere",
        "Vision-language: both ends",
        "What does a reduced tower save beside a squeezed prompt?",
        dots("ends", "of_dense_best", "keep", unit="time to the first token, share of dense", line=1),
    ),
    "vlm_quality": Experiment(
        "Elsewhere",
        "Vision-language: answers",
        "How far do answers move?",
        dots("what", "kl", "tokens", unit="KL at the positions of the whole prompt", only={"places": "original"}),
    ),
    "registry": Experiment("Elsewhere", "Every model by name", "Which models of timm and transformers can be reduced?"),
    "threads": Experiment("Elsewhere", "Threads", "Do threads that share a model disturb each other?"),
    "fuzz": Experiment("Elsewhere", "Odd calls", "Do odd command lines and calls end in an error that says what to do?"),
}
