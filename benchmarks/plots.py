"""The pictures of docs/speed.md, docs/training-free.md and docs/deploy.md, drawn from the committed results files and nothing else.

python benchmarks/plots.py        # docs/overhead.svg, steps.svg, methods.svg, resolution.svg, wall-clock.svg, deploy.svg
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from squeezevit.report.charts import looks
from squeezevit.report.rows import current
from workshop import RESULTS, arguments

DOCS = Path(__file__).parents[1] / "docs"
INK, PALE, ORANGE, BLUE = "#1c2127", "#9fb7cf", "#cf3f12", "#0a5fb4"
COMPARED = ("class-token", "training-free", "etps+mass", "tome", "atc", "evit", "topk", "random")


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def save(figure: Any, name: str) -> None:
    """The same file from the same numbers."""
    figure.savefig(DOCS / name, metadata={"Date": None})


def short(reducer: str) -> str:
    """Of a reducer's repr, what tells it from the others."""
    if reducer.startswith("Squeeze"):
        return "Squeeze in every block" if "'every'" in reducer else "training-free 50 %"
    keep = reducer.split("keep=")[1].split(",")[0]
    return f"{reducer[:4]} {keep}" + (", (2,4,6,8)" if "(2, 4" in reducer else "") + (", mass" if "mass=True" in reducer else "")


def overhead() -> None:
    """Overhead over the limit, DeiT-S at 224 pixels in eager mode, best round and median."""
    rows = [r for r in read("overhead_cpu")["rows"] if r["model"] == "deit_small_patch16_224" and not r["compiled"]]
    rows = [r for r in rows if r["image_size"] == 224]
    batches = sorted({r["batch_size"] for r in rows})
    figure, axes = plt.subplots(1, len(batches), figsize=(8.4, 3.4), sharey=True, layout="constrained")
    for axis, batch in zip(axes, batches, strict=True):
        own = [r for r in rows if r["batch_size"] == batch][::-1]
        places = range(len(own))
        axis.barh(places, [100 * (r["overhead_best"] - 1) for r in own], color=PALE, label="best round")
        axis.plot([100 * (r["overhead"] - 1) for r in own], places, "|", color=ORANGE, markersize=9, mew=2, label="median")
        axis.set_yticks(places, [short(r["reducer"]) for r in own], fontsize=8)
        axis.set_title(f"batch {batch}", fontsize=9)
        axis.set_xlabel("% over the limit")
        axis.grid(axis="x", alpha=0.3)
    axes[-1].legend(frameon=False, fontsize=8)
    save(figure, "overhead.svg")


def steps() -> None:
    """What the steps of a first stage cost, as a share of a whole block."""
    rows = [r for r in read("steps_cpu")["rows"] if r["step"] not in ("whole block", "MLP half")]
    names = list(dict.fromkeys(r["step"] for r in rows))[::-1]
    figure, axis = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    for batch, offset, colour in ((1, 0.2, PALE), (16, -0.2, BLUE)):
        share = {r["step"]: 100 * r["share_of_block"] for r in rows if r["batch_size"] == batch}
        axis.barh([i + offset for i in range(len(names))], [share[n] for n in names], 0.38, color=colour, label=f"batch {batch}")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("% of the time of a whole block (DeiT-S, 197 tokens)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False)
    save(figure, "steps.svg")


def methods() -> None:
    """All methods at half of the multiply-adds: speed in batches, and latency of single images."""
    rows = [current(r) for r in read("methods_cpu")["rows"]]
    dense = next(r for r in rows if r["method"] == "identity")
    own = sorted((r for r in rows if r["method"] != "identity"), key=lambda r: r["speedup_best"])
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True, layout="constrained")
    look = looks([r["method"] for r in own])
    colours = [look[r["method"]].light for r in own]
    axes[0].barh([r["label"] for r in own], [r["speedup_best"] for r in own], color=colours)
    axes[0].set_xlabel("speed-up at batch 16, best round")
    axes[1].barh([r["label"] for r in own], [r["latency_median_ms"] for r in own], color=colours)
    axes[1].plot([r["latency_p95_ms"] for r in own], range(len(own)), "|", color=INK, markersize=9, mew=2, label="95th percentile")
    axes[1].axvline(dense["latency_median_ms"], color=INK, linestyle=":", label="unreduced")
    axes[1].set_xlabel("milliseconds for one image, median")
    axes[1].set_xlim(0, 1.5 * dense["latency_median_ms"])
    axes[1].legend(frameon=False, fontsize=8, loc="center right")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    save(figure, "methods.svg")


def resolution() -> None:
    """How the time of an image grows with its patches."""
    rows = read("resolution_cpu")["rows"]
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, marker in zip(dict.fromkeys(r["name"] for r in rows), "os^D", strict=True):
        own = [r for r in rows if r["name"] == name]
        label = name.replace("preset", "training-free")
        axis.plot([r["patches"] for r in own], [1e3 / r["images_per_second_best"] for r in own], marker=marker, label=label)
    axis.set(xscale="log", yscale="log", xlabel="patch tokens coming in", ylabel="milliseconds an image, best round")
    ticks = sorted({r["patches"] for r in rows})
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save(figure, "resolution.svg")


def wall_clock() -> None:
    """Accuracy and cosine on emoji against the speed measured at the same reducers, so that methods can be read at equal time."""
    emoji = read("leaderboard")["emoji"]
    dense, *rows = [current(r) for r in (emoji["dense"], *emoji["rows"])]
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.6), layout="constrained")
    drawings: tuple[tuple[Any, str, Callable[[dict[str, Any]], float]], ...] = (
        (axes[0], "accuracy, %", lambda r: 100 * r["accuracy"]), (axes[1], "cosine with unreduced", lambda r: r["cosine"]),
    )  # fmt: skip
    for axis, label, value in drawings:
        for method, look in looks(COMPARED).items():
            own = [r for r in rows if r["method"] == method]
            points = sorted((r["times"]["16"]["speedup_best"], value(r)) for r in own)
            axis.plot(*zip(*points, strict=True), color=look.light, marker=look.marker, label=own[0]["label"])
        axis.set(xlabel="speed-up at batch 16", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].axhline(100 * dense["accuracy"], color=INK, linestyle=":", label="unreduced")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    save(figure, "wall-clock.svg")


def ladder() -> None:
    """Formats by budget: the speed-up over torch in fp32, unreduced, and the points of accuracy that it costs."""
    rows = read("deploy_vnni")["rows"]
    formats, shares = (list(dict.fromkeys(r[key] for r in rows)) for key in ("format", "share"))
    figure, axis = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
    width = 0.8 / len(shares)
    for k, (share, colour) in enumerate(zip(shares, (PALE, BLUE, ORANGE, INK), strict=False)):
        own = {r["format"]: r for r in rows if r["share"] == share}
        places = [i + (k - (len(shares) - 1) / 2) * width for i in range(len(formats))]
        heights = [own[name]["batch_16"]["speedup_best"] for name in formats]
        axis.bar(
            places, heights, 0.92 * width, color=colour, label="unreduced" if share == 1 else f"{share:.0%} of the multiply-adds"
        )
        for place, height, name in zip(places, heights, formats, strict=True):
            won = f"\n{0.0 - own[name]['loss']:+.1f}" if "loss" in own[name] else ""
            axis.text(place, height, f"{height:.1f}x{won}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(formats)), [name.replace(" ", "\n", 1) for name in formats])
    axis.set_ylabel("speed-up, batch 16, best round")
    axis.set_title("above each bar: speed-up, and where it was measured points of accuracy won or lost, same probe", fontsize=8)
    axis.margins(y=0.28)
    axis.legend(frameon=False, fontsize=8, loc="upper center", ncols=len(shares))
    save(figure, "deploy.svg")


def main() -> None:
    arguments(__doc__).parse_args()
    plt.rcParams["svg.hashsalt"] = "squeezevit"
    for draw in (overhead, steps, methods, resolution, wall_clock, ladder):
        draw()


if __name__ == "__main__":
    main()
