"""What commands are given, made ready: models with weights, methods, photographs, files; refused here where it cannot be used."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeezevit.cli import options, screen
from squeezevit.errors import ConfigError, DataError, SqueezeViTError

if TYPE_CHECKING:
    from squeezevit.bundle import Card
    from squeezevit.core.reducer import Reducer
    from squeezevit.data.libraries import Found
    from squeezevit.data.pixels import Preprocessing
    from squeezevit.reducers.catalog import Method

MEASURED = "deit_small_patch16_224"  # where a command that only measures is told no model
DEMO = "dinov2-demo"  # the demo's DINOv2, whose weights a package brings


def methods_named(text: str) -> "list[Method]":
    """Rows of the catalogue. Raises ConfigError where a name is not known."""
    return [method_named(name) for name in options.listed(text, "--methods")]


def method_named(name: str) -> "Method":
    from squeezevit.reducers.catalog import method

    return method(name)


def import_methods(module: str) -> None:
    """Import a module that registers methods; whatever it raises is about that module."""
    from squeezevit.reducers.catalog import import_methods

    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # where people keep it, and where an installed command does not look
    try:
        import_methods(module)
    except SqueezeViTError:
        raise
    except Exception as error:
        raise ConfigError(f"--import {module}: it raised {type(error).__name__} ({error}); mend that module") from error


def create(name: str, pretrained: bool, num_classes: int | None, image_size: int | None) -> Any:
    return found(name, pretrained, num_classes, image_size).model


def found(name: str, pretrained: bool, num_classes: int | None, image_size: int | None) -> "Found":
    """A model by name, of timm, of another library by its prefix, or the demo's, and how photographs are made ready for it."""
    from squeezevit.data import libraries
    from squeezevit.data.models import create_model

    if name == DEMO:
        from squeezevit.data.dinov2 import dinov2_vit_small

        if num_classes is not None:
            raise ConfigError(f"--num-classes {num_classes}: {DEMO} has no classifier; leave it out")
        return libraries.Found(dinov2_vit_small(224 if image_size is None else image_size), None)
    chosen = {key: value for key, value in (("num_classes", num_classes), ("img_size", image_size)) if value is not None}
    if libraries.prefix_of(name) is not None:
        return libraries.create(name, pretrained, chosen)
    return libraries.Found(create_model(name, pretrained, chosen).eval(), None)


def to_measure(wanted: "Wanted", device: str, threads: int | None, batch_size: int) -> tuple[Any, list[Any], Any]:
    """A model to measure, unreduced, on its device: a bundle's, with the bundle's reducer, or one whose weights are random, which
    changes nothing; and for which size of images, None for what the model is set up for."""
    import torch

    from squeezevit import restore_
    from squeezevit.core.cut import description_of
    from squeezevit.data.models import to_device

    if threads is not None:
        torch.set_num_threads(threads)
    size: Any = wanted.image_size
    if wanted.source is None:
        net = create(wanted.model or MEASURED, False, None, wanted.image_size)
    else:
        net, card = opened(wanted.source, wanted)
        size = card.preprocessing.crop if card.preprocessing.crop != description_of(net).image_size else None
    state = vars(net).get("squeezevit_state")
    own = [] if state is None else [state.reducer]
    restore_(net)
    require_room(net, batch_size, size)
    return to_device(net, device), own, size


def require_room(net: Any, batch_size: int, size: Any = None) -> None:
    """Raises ConfigError where not even the images fit: a system that is out of memory kills without a word."""
    from squeezevit.core.cut import description_of

    about = description_of(net)
    height, width = about.image_size if size is None else (size, size) if isinstance(size, int) else size
    needed = 4 * batch_size * about.channels * height * width
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise ConfigError(
            f"--batch-size {batch_size}: the images alone need {needed / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f}; "
            "choose a smaller one"
        )


@dataclass(frozen=True)
class Wanted:
    """What a command line says of a model and its reducer; None where it says nothing."""

    source: Path | None = None
    model: str | None = None
    pretrained: bool = False
    checkpoint: Path | None = None
    method: str | None = None
    keep: str | None = None
    at: str | None = None
    macs: float | None = None
    latency: float | None = None
    num_classes: int | None = None
    image_size: int | None = None
    usual: tuple[str, str] = ("etps", "0.7")  # method and keep ratio where nothing is said
    device: str = "cpu"  # where times are planned, for batches of this size
    batch_size: int = 1
    precision: str = "fp32"
    as_it_is: bool = False  # a bundle of an unreduced model stays one where nothing is said


@dataclass(frozen=True)
class Ready:
    """A reduced model in evaluation mode, its reducer, and what came with it."""

    net: Any
    reducer: "Reducer"
    name: str  # of the model, for results files
    method: str  # the reducer's name in tables
    trained: bool  # whether weights brought learned heads
    card: "Card | None" = None
    preprocessing: "Preprocessing | None" = None  # where the model cannot tell it
    options: dict[str, Any] | None = None  # what built it, where the model cannot tell that
    classes: tuple[str, ...] | None = None  # what its library calls them, where the model cannot tell that


def ready(wanted: Wanted) -> Ready:
    """The model with its weights, reduced. A model without a name is the demo's.

    Whatever can be refused is refused before weights are read or fetched; so is what contradicts a bundle.
    """
    if wanted.method is not None:
        method_named(wanted.method)
    if wanted.keep is not None and (wanted.macs is not None or wanted.latency is not None):
        raise ConfigError("--keep and a budget both say how much is kept; give one of them")
    return _from_names(wanted) if wanted.source is None else _from_bundle(wanted, wanted.source)


def vision_language(wanted: Wanted) -> tuple[Any, Any]:
    """A vision-language model with fewer image tokens, and its processor; its tower is reduced, too, where a method is named."""
    from squeezevit import VLM, reduce_vlm_
    from squeezevit.data import libraries

    given = {"--from": wanted.source, "--checkpoint": wanted.checkpoint, "--at": wanted.at, "--macs": wanted.macs}
    given |= {"--time": wanted.latency}
    if wrong := [option for option, value in given.items() if value is not None]:
        raise ConfigError(
            f"--question asks a vision-language model, which takes --model, --keep and --method; leave {', '.join(wrong)} out"
        )
    if wanted.model is None or libraries.prefix_of(wanted.model) != "hf":
        raise ConfigError(
            f"--question asks a vision-language model of transformers: name it, as --model hf:NAME, not {wanted.model}"
        )
    keep = options.one_or_each(wanted.keep or wanted.usual[1])
    if isinstance(keep, tuple):
        raise ConfigError(f"--keep {wanted.keep}: a prompt has one share of its image tokens; give one number")
    if not wanted.pretrained:
        screen.note(f"without --pretrained the weights of {wanted.model} are random")
    net, processor = libraries.vision_language(wanted.model, wanted.pretrained)
    return (VLM(net, keep) if wanted.method is None else reduce_vlm_(net, keep, method=method_named(wanted.method).name)), processor


def _from_bundle(wanted: Wanted, source: Path) -> Ready:
    from squeezevit.bundle import with_reducer_of
    from squeezevit.core.attach import reduce_as_needed_

    net, card = opened(source, wanted)
    state = vars(net).get("squeezevit_state")
    own = None if state is None else state.reducer
    names = {"method": "method", "keep": "keep", "at": "at", "macs": "macs", "latency": "time"}
    chosen = [f"--{option}" for name, option in names.items() if getattr(wanted, name) is not None]
    if own is not None and chosen:
        raise ConfigError(
            f"--from {source} brings its reducer, {own}; leave {', '.join(chosen)} out, or give a bundle of the unreduced model"
        )
    if own is None and not chosen and wanted.as_it_is:
        wanted = replace(wanted, usual=("identity", "1"))
    reducer = own or _reducer(net, wanted, card.preprocessing.crop)
    if own is None:
        reduce_as_needed_(net, reducer)
        card = with_reducer_of(net, card)
    method = type(reducer).__name__ if own is not None else wanted.method or wanted.usual[0]
    return Ready(net.eval(), reducer, str(source), method, reducer.learned and own is not None, card, card.preprocessing)


def opened(source: Path, wanted: Wanted) -> "tuple[Any, Card]":
    """The model of a bundle, and its card. Raises ConfigError for options that contradict it."""
    from squeezevit.bundle import open_bundle

    named: dict[str, Any] = {"--model": wanted.model, "--pretrained": wanted.pretrained or None}
    named |= {"--checkpoint": wanted.checkpoint, "--num-classes": wanted.num_classes}
    given = [option for option, value in named.items() if value is not None]
    if given:
        raise ConfigError(f"--from {source} brings the model and its weights; leave {', '.join(given)} out")
    net, card = open_bundle(source)
    height, width = card.preprocessing.crop
    if wanted.image_size is not None and (wanted.image_size, wanted.image_size) != (height, width):
        raise ConfigError(
            f"--image-size {wanted.image_size}: the model of {source} is for {height} x {width} pixels; leave --image-size out"
        )
    return net, card


def with_weights(wanted: Wanted, device: str) -> tuple[Any, Any, bool]:
    """An unreduced model with its weights, on its device; what makes its images, and whether they are turned upright."""
    from squeezevit import restore_
    from squeezevit.data.models import to_device

    if wanted.source is None:
        found = ready(wanted)
        net, how, name = found.net, found.preprocessing, found.name
    else:
        net, card = opened(wanted.source, wanted)
        how, name = card.preprocessing, str(wanted.source)
    net = to_device(restore_(net), device)
    return net, *_images_of(net, how, name, wanted.image_size, True)


def _images_of(net: Any, how: "Preprocessing | None", name: str, image_size: int | None, upright: bool) -> tuple[Any, bool]:
    """What makes images of photographs as a model wants them, and whether photographs are turned upright before.

    Raises ConfigError for a size that is not the model's.
    """
    from squeezevit.data.folder import eval_transform

    if how is None:
        return eval_transform(net, image_size), upright
    if image_size is not None and (image_size, image_size) != how.crop:
        raise ConfigError(f"--image-size {image_size}: {name} is for {how.crop[0]} x {how.crop[1]} pixels; leave it out")
    return partial(_tensor, how), upright and how.upright


def batches(
    ready: Ready, data: Path, image_size: int | None, batch_size: int, workers: int | None, classes: Path | None, upright: bool
) -> Any:
    """The batches of a folder, as the model, or its bundle, wants them."""
    from squeezevit.data import folder

    card, how = ready.card, ready.preprocessing
    if how is None:
        return folder.load(
            data, ready.net, image_size=image_size, batch_size=batch_size, num_workers=workers, classes=classes, upright=upright
        )
    own = None if card is None else card.classes
    if own is not None and classes is not None:
        raise ConfigError(f"--classes {classes}: the bundle brings its classes; leave --classes out")
    transform, turned = _images_of(ready.net, how, ready.name, image_size, upright)
    images = folder.ImageFolder(data, transform, "val", own or classes, turned)
    images.check_classes(ready.net)
    images.warn()
    return folder.Batches(images, batch_size, workers)


@dataclass(frozen=True)
class Pictures:
    """Photographs in memory, [n, 3, H, W], their labels [n] where the model knows their classes, and why others are not there."""

    images: Any
    labels: Any
    answers: bool  # whether the model is a classifier
    unreadable: list[str]


def pictures(
    ready: Ready, data: Path, image_size: int | None, most: int, classes: Path | None, upright: bool, report: screen.Report
) -> Pictures:
    """At most so many photographs of a folder, spread over it, as the model, or its bundle, wants them.

    Labels are those of class folders, where there are as many as the model has classes. Raises DataError where fewer than two
    photographs can be read.
    """
    import numpy as np
    import torch

    from squeezevit.data import folder
    from squeezevit.data.classifier import classes_in

    card, outputs = ready.card, classes_in(ready.net)
    transform, turned = _images_of(ready.net, ready.preprocessing, ready.name, image_size, upright)
    found, labelled = _listed(data, transform, (card.classes if card is not None else None) or classes, turned, outputs)
    chosen = folder.evenly(len(found), most)
    kept, labels, unreadable = [], [], []
    for done, index in enumerate(chosen, start=1):
        sample = found[index]
        if sample.image is None:
            unreadable.append(f"{found.samples[index][0]}: {sample.reason}")
        else:
            kept.append(sample.image)
            labels.append(sample.label)
        report("reading photographs", done, len(chosen))
    if len(kept) < 2:
        raise DataError(f"{data} holds {len(found)} images, {len(kept)} of them readable; give a folder of some tens")
    return Pictures(torch.stack(kept), np.array(labels) if labelled else None, bool(outputs), unreadable)


def _listed(data: Path, transform: Any, classes: Any, upright: bool, outputs: int) -> tuple[Any, bool]:
    """The photographs of a folder, and whether their labels are of the model's classes; what is left unused is said."""
    from squeezevit.data import folder

    try:
        found = folder.ImageFolder(data, transform, "val", classes, upright)
    except DataError as error:
        plain = folder.PlainFolder(data, transform, upright)
        if outputs and classes is not None:
            screen.note(f"photographs are compared without labels: {error}")
        return plain, False
    if outputs and len(found.classes) != outputs:
        screen.note(f"{data} has {len(found.classes)} class folders and the model {outputs} classes: labels are not used")
    found.warn()
    return found, outputs > 0 and len(found.classes) == outputs


def _tensor(how: "Preprocessing", image: Any) -> Any:
    import torch

    return torch.from_numpy(how(image))


def _from_names(wanted: Wanted) -> Ready:
    from squeezevit.bundle.hosts import preprocessing
    from squeezevit.checkpoint import has_heads, read_checkpoint, reduce_with_weights_
    from squeezevit.data.libraries import prefix_of

    name, checkpoint = wanted.model, wanted.checkpoint
    if wanted.pretrained and checkpoint is not None:
        raise ConfigError(f"--pretrained and --checkpoint {checkpoint} both bring weights; give one of them")
    if name == DEMO and (wanted.pretrained or checkpoint is not None):
        raise ConfigError(f"--model {DEMO} brings its weights; leave --pretrained and --checkpoint out")
    if name is None and (wanted.pretrained or checkpoint is not None):
        raise ConfigError("--pretrained and --checkpoint bring weights of a model; name it, by --model")
    options.one_or_each(wanted.keep or wanted.usual[1]), options.blocks(wanted.at)  # refused before anything is built
    if name not in (None, DEMO) and not wanted.pretrained and checkpoint is None:
        screen.note(f"neither --pretrained nor --checkpoint: the weights of {name} are random, and so will the answers be")
    weights = None if checkpoint is None else read_checkpoint(checkpoint)
    net, preparing, classes = found(name or DEMO, wanted.pretrained, wanted.num_classes, wanted.image_size)
    how, built = None, None
    if (library := prefix_of(name or DEMO)) is not None:
        how = preprocessing(net, preparing, None)
        built = {"name": (name or "").split(":")[1].split("/")[0]} if library == "open_clip" else None
    reducer = _reducer(net, wanted, wanted.image_size)
    reduce_with_weights_(net, reducer, weights, str(checkpoint))
    method = wanted.method or wanted.usual[0]
    trained = weights is not None and has_heads(weights)
    return Ready(net.eval(), reducer, name or DEMO, method, trained, preprocessing=how, options=built, classes=classes)


def _reducer(net: Any, wanted: Wanted, image_size: Any) -> "Reducer":
    """By keep ratio or by budget."""
    from squeezevit.budget.plan import like, plan, plan_macs
    from squeezevit.data.models import to_device

    method, at = method_named(wanted.method or wanted.usual[0]).name, options.blocks(wanted.at)
    if wanted.macs is not None and wanted.latency is not None:
        raise ConfigError("--macs and --time are two budgets; give one of them")
    if at is not None and (wanted.macs or wanted.latency) and not takes_stages(method):
        raise ConfigError(f"--at {wanted.at}: {method} reduces in every block and has no stages to place; leave --at out")
    with screen.steps() as report:
        if wanted.macs is not None:
            return plan_macs(net, method, wanted.macs, at, image_size, report)
        if wanted.latency is not None:
            to_device(net, wanted.device)
            return plan(
                net, method, latency=wanted.latency, at=at, image_size=image_size, batch_size=wanted.batch_size,
                precision=wanted.precision, progress=report,
            )  # fmt: skip
    return like(net, method, options.one_or_each(wanted.keep or wanted.usual[1]), at, image_size)


def note_untrained(ready: Ready) -> None:
    """Say so where nobody trained the heads that decide."""
    if ready.reducer.learned and not ready.trained:
        screen.note(f"the score heads of {ready.method} are untrained (no weights brought any): they rank tokens at random")


def takes_stages(method: str) -> bool:
    """Whether blocks can be named for a method; others reduce in every one."""
    from squeezevit.core.reducer import Staged
    from squeezevit.reducers.catalog import method as row_of

    return isinstance(row_of(method).template(), Staged)


def require_a_choice(config: Any, given: list[str]) -> None:
    """Raises ConfigError where a long training would start from random weights of a model that nobody named."""
    if not {"model", "model.name", "model.pretrained", "model.checkpoint"} & {*given}:
        raise ConfigError(
            f"without a recipe {config.model.name} would be trained for {config.epochs} epochs from random weights; give "
            "--recipe finetune-small, --pretrained, or --checkpoint FILE, or mean it: --set model.pretrained=false"
        )


def photographs(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as the images in them at any depth. Raises DataError for a folder without images."""
    from squeezevit.data.folder import SUFFIXES, images_in

    found: list[Path] = []
    for path in paths:
        inside = list(map(Path, images_in(path))) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path} holds no image: expected files ending in {' '.join(SUFFIXES)}")
        found += inside
    return found


def make_folder(out: Path, option: str = "--out") -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {out} cannot be made ({error.strerror}); choose a folder of your own") from error


def counted(transform: Callable[[Any], Any], most: int, report: screen.Report) -> Callable[[Any], Any]:
    """The transform, each of whose calls is told."""
    done = 0

    def told(image: Any) -> Any:
        nonlocal done
        done = min(done + 1, most)
        report("reading images", done, most)
        return transform(image)

    return told


def check_json(path: Path | None) -> None:
    """Raises ConfigError, before any work, where the result could not be written."""
    if path is None:
        return
    there = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written ({error.strerror}); choose a file in a folder that exists") from error
    if not there:
        path.unlink()


def write_json(path: Path | None, content: Any) -> None:
    from squeezevit.bench.machine import write_json

    if path is not None:
        write_json(path, content)
