"""One export from beginning to end: what is asked, the program, the format, int8, the proof, and the folder that holds all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squeezevit.bench.machine import command, machine, now
from squeezevit.bundle import CARD, ENGINES, Card, card_of, holds_weights, with_reducer_of
from squeezevit.bundle import write as write_bundle
from squeezevit.bundle.whole import require_free
from squeezevit.core.block import state_of
from squeezevit.core.running import Progress, images
from squeezevit.data.classifier import classes_in
from squeezevit.errors import ConfigError
from squeezevit.export import engines, quantised, verified
from squeezevit.export.beside import write_beside
from squeezevit.export.graph import Exportable, capture, write_traced

FLOOR = 0.9  # of the mean cosine to torch, where bits are left out
EXPORTERS = ("dynamo", "torchscript")  # of torch, to ONNX
FEWEST = 4  # images to calibrate on, of which half are held out
_TIMED = 16  # images a batch where any number fits
UNREAD = (torch.empty(0),) * FEWEST  # in place of calibration images, while what is asked for is looked at without them


@dataclass(frozen=True)
class Wanted:
    """What is asked for; see `export`. Raises ConfigError on what cannot be meant."""

    to: str = "openvino"
    int8: tuple[Tensor, ...] | None = None
    batch: int | None = 16
    precision: str = "fp32"
    scatter: bool = True
    groups: bool = False
    floor: float = FLOOR
    exporter: str = "dynamo"
    features: bool = False

    def __post_init__(self) -> None:
        b = self.batch
        if b is not None and (isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= 4096):
            raise ConfigError(f"batch_size={b!r}: give a number of images from 1 to 4096, or None for any number")
        if self.precision not in engines.HINTS:
            raise ConfigError(f"precision={self.precision!r}: choose one of {', '.join(engines.HINTS)}")
        if self.precision != "fp32" and self.to != "openvino":
            raise ConfigError(f"precision={self.precision!r} is OpenVINO's, and to={self.to!r}; leave it out, or to='openvino'")
        if self.exporter not in EXPORTERS:
            raise ConfigError(f"exporter={self.exporter!r}: choose one of {', '.join(EXPORTERS)}")
        if self.exporter != "dynamo" and (self.to != "onnx" or self.int8 is not None or not self.scatter):
            raise ConfigError(
                f"exporter={self.exporter!r} writes to='onnx' in float and with nodes that scatter; for anything else leave it out"
            )
        if self.int8 is not None and self.to not in ("onnx", "openvino"):
            raise ConfigError(f"int8 is there for onnx and openvino, and to={self.to!r}; choose one of those")
        if self.int8 is not None and len(self.int8) < FEWEST:
            raise ConfigError(
                f"int8 has {len(self.int8)} calibration images, and half of them are held out to see what it costs; give {FEWEST} "
                "or more, better 128 photographs of the kind the model will see"
            )
        if isinstance(self.floor, bool) or not isinstance(self.floor, int | float) or not -1 <= self.floor <= 1:
            raise ConfigError(f"floor={self.floor!r} is no cosine; give a number from -1 to 1, as 0.9")


def export(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    to: str = "openvino",
    int8: Sequence[Tensor] | Tensor | None = None,
    batch_size: int | None = 16,
    precision: str = "fp32",
    scatter: bool = True,
    groups: bool = False,
    floor: float | None = None,
    exporter: str = "dynamo",
    features: bool = False,
    options: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Any = None,
    progress: Progress | None = None,
) -> Card:
    """Write a model, reduced or not, as a bundle that runs without SqueezeViT, verified before it appears; returns its card.

    to: "onnx", "openvino", "program" (torch.export) or "aoti" (AOTInductor, compiled here for this machine). int8: calibration
    images [3, H, W] as the model takes them, or one tensor [n, 3, H, W]; half of them calibrate, the others tell what it costs.
    batch_size: images at once, of which the last batch is padded; None: any number, which costs a reduced model 16 to 30 % in
    OpenVINO. precision: "bf16" for OpenVINO to compute in what is not int8. scatter=False: no node that scatters, for runtimes
    that get those wrong. groups: one more output a stage, "groups_1" ..., [B, N0] int64: the token each patch ended in, -1 for
    none. floor: the lowest mean cosine to torch that int8 and bf16 may have, 0.9 unless given. exporter: "torchscript" for ONNX
    by torch's older exporter, which traces, where a runtime stumbles over what the newer one writes. features: put out what goes
    into the classifier, for `squeezevit embed`. options, image_size, classes, preprocessing: as `squeezevit.bundle.save`.

    The folder holds the model, its card, SHA256SUMS, README.md, run.py and, where there are classes, classes.txt. Float outputs
    must equal torch's to 1e-4 of the largest. Raises UnsupportedError where the model cannot be captured or written, or its
    numbers or cosine fail; CheckpointError where its runtime cannot open it; MissingExtraError where a package is missing;
    ConfigError for what cannot be meant. The folder is then as it was.

    >>> export(reduce_(model, ETPS(keep=0.5)), "my-vit-int8", int8=photographs)  # doctest: +SKIP
    """
    given = None if int8 is None else tuple(int8)
    wanted = Wanted(to, given, batch_size, precision, scatter, groups, FLOOR if floor is None else floor, exporter, features)
    engines.require(to, int8 is not None)
    if features and classes is not None:
        raise ConfigError("features=True puts out no classes, and classes= names some; leave one of them out")
    card = card_of(model, options=options, image_size=image_size, classes=classes, preprocessing=preprocessing)
    return export_as(model, Path(folder), card, wanted, progress)


def export_as(model: nn.Module, folder: Path, card: Card, wanted: Wanted, progress: Progress | None = None) -> Card:
    """`export` of a model whose card is known already; returns the card that was written."""
    require(wanted, folder)
    card = with_reducer_of(model, card)
    _require_fit(model, card, wanted)
    new = replace(card, classes=None if wanted.features else card.classes, engine=wanted.to, exported={}, measured={})
    write_bundle(folder, new, partial(_fill, model, new, wanted, progress or _silent))
    return new


def require(wanted: Wanted, folder: Path) -> None:
    """Raise, before there is a model, what `export` raises whatever the model is."""
    engines.require(wanted.to, wanted.int8 is not None)
    if holds_weights(folder):
        raise ConfigError(f"{folder} holds a bundle with weights, which an export would replace; choose another folder")
    require_free(folder, CARD, "bundle")


def _require_fit(model: nn.Module, card: Card, wanted: Wanted) -> None:
    """Raises ConfigError, before any work, where model, images and wishes do not fit each other."""
    like, size = next(model.parameters()), card.preprocessing.crop
    if like.device.type != "cpu" or like.dtype != torch.float32:
        raise ConfigError(f"the model is {like.dtype} on {like.device}; export it from float32 on the CPU: model.float().cpu()")
    if wanted.precision == "bf16" and not engines.computes_bf16():
        raise ConfigError(
            "precision='bf16': this processor has no bfloat16, so OpenVINO would compute in float32 and nothing would be verified; "
            "export on one that has, or leave precision out"
        )
    if wanted.groups and not (card.reducer and state_of(model).stages):
        raise ConfigError("groups say which token each patch ended in, and this model is not reduced; leave groups out")
    for number, image in enumerate(wanted.int8 or ()):
        if not isinstance(image, Tensor) or tuple(image.shape) != (3, *size):
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ConfigError(
                f"calibration image {number} is {found}, the model takes {[3, *size]}; prepare them as for the model, or export at "
                "their size by image_size"
            )


def _fill(model: nn.Module, card: Card, wanted: Wanted, progress: Progress, folder: Path) -> None:
    """Write all files but the card and the sums into the new folder, and the figures into the card."""
    module = Exportable(model, wanted.groups, features=wanted.features)
    size, threads = card.preprocessing.crop, torch.get_num_threads()
    noise = images(module.model, max(verified.fillings(wanted.batch)), size)
    outputs = module.names(len(verified.expected(module, noise[:1])))
    if wanted.exporter == "dynamo":
        progress("capturing", 0, 1)
        program = capture(module, wanted.batch, size, wanted.scatter, folds=wanted.to == "openvino")
        progress("converting", 0, 1)
        engines.write(program, wanted.to, folder, outputs)
    else:
        progress("converting", 0, 1)
        write_traced(module, wanted.batch, size, folder / ENGINES[wanted.to], outputs)
    x = noise if wanted.int8 is None else verified.spread(wanted.int8, len(noise))
    progress("comparing with torch", 0, 1)
    figures = verified.agree(module, engines.opened(wanted.to, folder, threads=threads), x, wanted.batch)
    card.measured.update(compared=figures)
    if wanted.int8 is not None:
        progress("calibrating", 0, 1)
        quantised.quantise(wanted.to, folder, list(wanted.int8[::2]), wanted.batch)
    engines.tidy(wanted.to, folder)
    run = engines.opened(wanted.to, folder, wanted.precision, threads)
    if wanted.int8 is not None or wanted.precision != "fp32":
        held_out = x if wanted.int8 is None else torch.stack(wanted.int8[1::2])
        card.measured.update(verified.close(module, run, held_out, wanted.batch, wanted.floor))
    card.measured["speed"] = verified.speed(module, run, verified.spread(x, wanted.batch or _TIMED), progress)
    card.measured.update(created=now(), command=command(), machine=machine())
    bits = None if wanted.int8 is None else quantised.weight_bits()
    puts_out = "classes" if classes_in(model) and not wanted.features else "features"
    card.exported.update(
        batch=wanted.batch, precision="int8" if wanted.int8 is not None else wanted.precision, hint=wanted.precision,
        scatter=wanted.scatter, weight_bits=bits, input="images", outputs=outputs, puts_out=puts_out,
        id=engines.identity(wanted.to, folder),
    )  # fmt: skip
    write_beside(folder, card)


def _silent(what: str, done: int, steps: int) -> None:
    return None
