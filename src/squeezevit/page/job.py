"""A page from beginning to end: what is compared, a graph for each, one file of weights, runtime, photographs, and the files."""

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squeezevit.bench.machine import now, versions
from squeezevit.budget.meter import Meter, Setting
from squeezevit.bundle import Card
from squeezevit.bundle.whole import require_free, write_whole
from squeezevit.core.block import state_of
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import Progress
from squeezevit.core.running import images as noise
from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.export import engines, verified
from squeezevit.page import cases, graphs, photographs, runtime
from squeezevit.page.weights import SharedWeights
from squeezevit.reducers import Identity

MANIFEST, WEIGHTS = "model/manifest.json", "weights.bin"
_VERSION = '<meta name="version" content="{}">'
FORMAT = 1
_COMPARED = 5  # images on which a graph must equal torch


@dataclass(frozen=True)
class Wanted:
    """What is asked for of a page. Raises ConfigError on what cannot be meant.

    methods: names of the catalogue; shares: of the multiply-adds, None for the usual ones; precision: "int8" or "fp32".
    photographs: files that visitors may choose, None for scikit-image's. archive: onnxruntime-web as npm packs it, None to fetch.
    """

    methods: tuple[str, ...] = cases.METHODS
    shares: tuple[float, ...] | None = None
    precision: str = "int8"
    photographs: tuple[Path, ...] | None = None
    archive: Path | None = None

    def __post_init__(self) -> None:
        if self.precision not in graphs.PRECISIONS:
            raise ConfigError(f"precision={self.precision!r}: choose one of {', '.join(graphs.PRECISIONS)}")
        if "identity" in self.methods or not self.methods or len({*self.methods}) < len(self.methods):
            raise ConfigError(
                f"methods={', '.join(self.methods)!r}: the unreduced model is always there; give each method that reduces once"
            )
        if self.shares is not None and not all(0 < share < 1 for share in self.shares):
            raise ConfigError(f"shares={self.shares!r}: the unreduced model is always there; give numbers between 0 and 1")


@dataclass
class _Page:
    """A page while it is written."""

    net: nn.Module
    card: Card
    wanted: Wanted
    folder: Path
    progress: Progress
    images: Tensor
    weights: SharedWeights

    def graph(self, reducer: Reducer, name: str) -> dict[str, Any]:
        """Write one graph, and return what the manifest says of it."""
        import onnx

        with tempfile.TemporaryDirectory() as scratch:
            made = graphs.exported(self.net, reducer, self.images, Path(scratch))
            file = Path(scratch) / engines.ENGINES["onnx"]
            if self.wanted.precision == "int8":
                graphs.quantised(file)
                made["nearness"] = graphs.nearness(self.net, reducer, self.images, Path(scratch))
            model = onnx.load(file)
        self.weights.take(model)
        onnx.save(model, self.folder / "model" / name)
        return {"file": name, **made}


def build(net: nn.Module, card: Card, out: Path, wanted: Wanted, title: str, progress: Progress) -> dict[str, Any]:
    """Write a page for a model, reduced or not, as a folder that any static server serves; returns its manifest.

    A model that is reduced is shown with its own reducer beside the methods at the same cost; one that is not, with the methods at
    every share. title: what the page calls the model. Raises ConfigError for what cannot be meant or written, UnsupportedError
    for a model that cannot be captured, MissingExtraError where a package is missing. The folder is then as it was.
    """
    require_free(out, MANIFEST, "page")
    engines.require("onnx", False)
    _require_fit(net)
    manifest: dict[str, Any] = {}
    write_whole(out, lambda folder: manifest.update(_fill(net, card, folder, wanted, title, progress)), MANIFEST, "page")
    return manifest


def _fill(net: nn.Module, card: Card, folder: Path, wanted: Wanted, title: str, progress: Progress) -> dict[str, Any]:
    runtime.write_runtime(folder / "ort", wanted.archive)
    shown, pictures = photographs.write_photographs(folder / "photographs", wanted.photographs)
    size = card.preprocessing.crop
    own = state_of(net).reducer if card.reducer is not None else None
    if own is None:
        planned = cases.planned(net, wanted.methods, wanted.shares, size, progress)
    else:
        planned = cases.beside(net, own, wanted.methods, size, progress)
    (folder / "model").mkdir()
    prepared = [torch.from_numpy(card.preprocessing(picture)) for picture in pictures] or noise(net, _COMPARED, size).unbind()
    page = _Page(
        net, card, wanted, folder, progress, verified.spread(prepared, _COMPARED), SharedWeights(folder / "model" / WEIGHTS)
    )
    written = []
    progress("graphs", 0, len(planned) + 1)
    dense = page.graph(Identity(), "unreduced.onnx")
    for i, case in enumerate(planned):
        progress("graphs", i + 1, len(planned) + 1)
        told = {"method": case.method, "share": case.told, "macs": case.share, "reducer": str(case.reducer), "python": case.python}
        written.append({**told, **page.graph(case.reducer, case.file)})
    progress("graphs", len(planned) + 1, len(planned) + 1)
    names = tuple(dict.fromkeys(case.method for case in planned))
    with Meter(net, Setting(image_size=size)) as meter:
        unreduced = meter.dense
    manifest = {
        "format": FORMAT, "title": title, "depth": len(description_of(net).blocks), "grid": _grid(dense["patches"], size),
        "preprocessing": card.preprocessing.to_dict(), "classes": card.classes, "precision": wanted.precision,
        "macs": unreduced, "dense": dense,
        "methods": [cases.described(name, own, i) for i, name in enumerate(names)], "graphs": written, "photographs": shown,
        "weights": {"file": WEIGHTS, "bytes": page.weights.file.stat().st_size}, "created": now(),
        "versions": {**versions(), runtime.PACKAGE: runtime.VERSION},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _copy_web(folder)
    return manifest


def _copy_web(folder: Path) -> None:
    """The files of the page; the service worker is told what there is, and both it and the page by a sum which version that is."""
    with as_file(files("squeezevit.page") / "web") as web:
        shutil.copytree(web, folder, dirs_exist_ok=True)
    worker, page = folder / "sw.js", folder / "index.html"
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() and file != worker)
    total = hashlib.sha256(worker.read_bytes())
    for name in names:
        total.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    version = total.hexdigest()[:16]
    told = json.dumps({"version": version, "files": names})
    worker.write_text(f"const PAGE = {told};\n{worker.read_text(encoding='utf-8')}", encoding="utf-8")
    page.write_text(page.read_text(encoding="utf-8").replace(_VERSION.format(""), _VERSION.format(version), 1), encoding="utf-8")


def _grid(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns. Raises UnsupportedError where the patches are no grid of the image's proportions."""
    rows = round(math.sqrt(patches * size[0] / size[1]))
    if rows < 1 or patches % rows or patches // rows * size[0] != rows * size[1]:
        raise UnsupportedError(
            f"{patches} patches of an image of {size[0]} x {size[1]} pixels are no grid of square patches, which the page draws"
        )
    return rows, patches // rows


def _require_fit(net: nn.Module) -> None:
    """Raises ConfigError, before any work, for a model that is not float32 on the CPU, or does not take colours."""
    like, channels = next(net.parameters()), description_of(net).channels
    if like.device.type != "cpu" or like.dtype != torch.float32:
        raise ConfigError(f"the model is {like.dtype} on {like.device}; give one of float32 on the CPU: model.float().cpu()")
    if channels != 3:
        raise ConfigError(f"the model takes {channels} channels, and photographs have 3; a page is for models of photographs")
