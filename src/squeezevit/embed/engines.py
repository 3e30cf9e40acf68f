"""What runs a bundle: torch, torch compiled, onnxruntime or OpenVINO, all called alike, with arrays of NumPy."""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from squeezevit.bundle import ENGINES, Card, bundle_in, model_of, read_card
from squeezevit.core.cut import description_of
from squeezevit.core.running import OUTPUTS, embedded
from squeezevit.data.classifier import without_classifier_
from squeezevit.data.models import to_device
from squeezevit.embed.reading import usable_cores
from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.export.engines import identity, opened
from squeezevit.export.verified import padded

Run = Callable[[np.ndarray], np.ndarray]  # [b, 3, H, W] -> [b, K or C]


@dataclass(frozen=True)
class Engine:
    """A bundle's model, ready to run.

    name: "torch", "compiled", "onnx", "openvino", "program" or "aoti". card: what the bundle says of itself. id: SHA-256 of the
    model's files, so that features of two models are never mixed. folder: where the bundle lies. call: the model itself. streams:
    how many threads may run it side by side.
    """

    name: str
    card: Card
    id: str
    folder: Path
    call: Run
    streams: int = 1

    @property
    def batch(self) -> int | None:
        """Images that the model takes at once, None where it takes any number."""
        return self.card.exported.get("batch")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.card.preprocessing.crop

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [b, 3, H, W] -> float32 [b, K or C], of any b; a model of a fixed batch gets the last one padded.

        Raises ConfigError for images of another shape, UnsupportedError where the model does not put out one row an image.
        """
        if images.shape[1:] != (3, *self.image_size) or not len(images):
            raise ConfigError(f"images of shape {images.shape}: the model of {self.folder} takes [b, 3, {self.image_size}]")
        size = self.batch or len(images)
        out = [self.call(padded(images[i : i + size], size))[: len(images) - i] for i in range(0, len(images), size)]
        if out[0].ndim != 2:
            raise UnsupportedError(
                f"the model of {self.folder} puts out {out[0].shape} for {size} images, and not a row for each; save or export one "
                "that pools its tokens"
            )
        return np.concatenate(out).astype(np.float32, copy=False)


def choose(
    folder: str | PathLike[str], engine: str | None = None, features: bool = False, device: str = "cpu"
) -> tuple[Path, Card, str]:
    """Where a bundle lies, what it says of itself, and the engine that would run it; raises as `open_engine`, and opens none."""
    path = bundle_in(folder)
    card = read_card(path)
    name = _chosen(path, card, engine)
    if features and card.engine != "torch" and (card.classes is not None or card.exported.get("puts_out") == "classes"):
        raise ConfigError(
            f"{path} was exported with its classifier, and puts out classes, not features; export its model by "
            "`squeezevit export --features`, or use `squeezevit predict`"
        )
    if device != "cpu" and card.engine != "torch":
        raise ConfigError(f"device={device}: {path} holds a model for {card.engine}, which runs on the CPU here; choose device=cpu")
    return path, card, name


def open_engine(
    folder: str | PathLike[str],
    engine: str | None = None,
    threads: int | None = None,
    features: bool = False,
    device: str = "cpu",
    streams: int | None = 1,
) -> Engine:
    """The engine that runs a bundle; None: the one that it was exported to, and torch for one that was not.

    threads: of the CPU, None: the engine's own choice. features: what goes into the classifier is put out, in place of what comes
    from it; an exported model must have been exported without one. device: of torch, for a bundle of torch; exported models run on
    the CPU. streams: batches that OpenVINO computes side by side, each on its share of the threads; `predict` and `embed` then give
    it as many. None: one a thread, at most 8. Other engines take one after another.

    Raises what `squeezevit.bundle.read_card` raises, ConfigError for an engine that the bundle does not hold, a device that is not
    there, streams of another engine or a classifier that cannot be left out, MissingExtraError where the runtime is not installed,
    and CheckpointError where it cannot open the model.

    >>> open_engine("my-vit").run(images).shape  # doctest: +SKIP
    (16, 1000)
    """
    path, card, name = choose(folder, engine, features, device)
    side = streams or (min(threads or usable_cores(), 8) if name == "openvino" else 1)
    if side > 1 and name != "openvino":
        raise ConfigError(f"streams={side}: {path} is run by {name}, which takes one batch after another; leave streams out")
    if card.engine == "torch":
        call = _of_torch(path, card, threads, features, name == "compiled", device)
    else:
        run = opened(name, path, card.exported.get("hint", "fp32"), threads, side)
        call = lambda images: run(images)[0]  # noqa: E731
    return Engine(name, card, identity(card.engine, path), path, call, side)


def _chosen(folder: Path, card: Card, engine: str | None) -> str:
    held = ("torch", "compiled") if card.engine == "torch" else (card.engine,)
    engine = {"onnxruntime": "onnx"}.get(engine or "", engine)
    known = (*dict.fromkeys(("torch", "compiled", *ENGINES)),)
    if engine is not None and engine not in known:
        raise ConfigError(f"--engine {engine!r} is not known; choose one of {', '.join(held)} for {folder}")
    if engine is not None and engine not in held:
        raise ConfigError(
            f"--engine {engine}: {folder} holds a model for {' or '.join(held)}; leave --engine out, or give a bundle exported to "
            f"{'torch' if engine == 'compiled' else engine}"
        )
    return engine or held[0]


def _of_torch(folder: Path, card: Card, threads: int | None, features: bool, compiled: bool, device: str) -> Run:
    if threads is not None:
        torch.set_num_threads(threads)
    model = to_device(model_of(folder, card), device)
    if features:
        without_classifier_(model)
    about, kind = description_of(model), next(model.parameters()).dtype
    runs: Any = about.tower or model
    if compiled:
        runs = torch.compile(runs, fullgraph=True)

    def run(images: np.ndarray) -> np.ndarray:
        x = torch.tensor(images, device=device, dtype=kind)  # a copy where torch wants it: the same numbers wherever the array lies
        with torch.inference_mode():
            return _first(model, runs(*about.given(x), **about.named(x)), folder).float().cpu().numpy()

    return run


def _first(model: Any, out: Any, folder: Path) -> Tensor:
    """What stands for a photograph among what a model puts out."""
    found = embedded(model, out)
    if not isinstance(found, Tensor) and isinstance(out, tuple | list) and out:
        found = out[0]
    if isinstance(found, Tensor):
        return found
    raise UnsupportedError(
        f"the model of {folder} puts out a {type(out).__name__} without {', '.join(OUTPUTS)}; save another class"
    )
