"""What commands are given, made ready: models with weights, methods, photographs, files; refused here where it cannot be used."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeezevit.cli import options, screen
from squeezevit.errors import ConfigError, DataError, SqueezeViTError

if TYPE_CHECKING:
    from squeezevit.reducers.catalog import Method


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
    from squeezevit.data.models import create_model

    chosen = {key: value for key, value in (("num_classes", num_classes), ("img_size", image_size)) if value is not None}
    return create_model(name, pretrained, chosen).eval()


def untrained(name: str, image_size: int | None, device: str, threads: int | None, batch_size: int) -> Any:
    """A model to measure, on its device. Its weights are random, which changes nothing."""
    import torch

    from squeezevit.data.models import to_device

    if threads is not None:
        torch.set_num_threads(threads)
    net = create(name, False, None, image_size)
    require_room(net, batch_size)
    return to_device(net, device)


def require_room(net: Any, batch_size: int) -> None:
    """Raises ConfigError where not even the images fit: a system that is out of memory kills without a word."""
    from squeezevit.core.cut import description_of

    about = description_of(net)
    needed = 4 * batch_size * about.channels * about.image_size[0] * about.image_size[1]
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise ConfigError(
            f"--batch-size {batch_size}: the images alone need {needed / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f}; "
            "choose a smaller one"
        )


def with_weights(name: str, pretrained: bool, checkpoint: Path | None, image_size: int | None, device: str) -> Any:
    """An unreduced model with its weights, on its device."""
    from squeezevit import restore_
    from squeezevit.data.models import to_device

    return to_device(restore_(reduced_model(name, pretrained, checkpoint, "identity", "1", None, None, image_size)[0]), device)


def reduced_model(
    name: str | None,
    pretrained: bool,
    checkpoint: Path | None,
    method: str,
    keep: str,
    at: str | None,
    num_classes: int | None,
    image_size: int | None,
) -> tuple[Any, Any, bool]:
    """The model with its weights, the reducer, and whether a checkpoint brought learned heads; the model is left reduced.

    A model without a name is the demo's. Whatever can be refused is refused before weights are read or fetched.
    """
    from squeezevit.budget.plan import like
    from squeezevit.checkpoint import has_heads, read_checkpoint, reduce_with_weights_

    asked = method_named(method).name, options.one_or_each(keep), options.blocks(at)
    if pretrained and checkpoint is not None:
        raise ConfigError(f"--pretrained and --checkpoint {checkpoint} both bring weights; give one of them")
    if name is None and (pretrained or checkpoint is not None):
        raise ConfigError("--pretrained and --checkpoint bring weights of a model; name it, by --model")
    if name is not None and not pretrained and checkpoint is None:
        screen.note(f"neither --pretrained nor --checkpoint: the weights of {name} are random, and so will the answers be")
    weights = None if checkpoint is None else read_checkpoint(checkpoint)
    net = demo_model() if name is None else create(name, pretrained, num_classes, image_size)
    reducer = like(net, *asked, image_size)
    reduce_with_weights_(net, reducer, weights, str(checkpoint))
    return net.eval(), reducer, weights is not None and has_heads(weights)


def demo_model() -> Any:
    from squeezevit.data.dinov2 import dinov2_vit_small

    return dinov2_vit_small()


def require_a_choice(config: Any, given: list[str]) -> None:
    """Raises ConfigError where a long training would start from random weights of a model that nobody named."""
    if not {"model", "model.name", "model.pretrained", "model.checkpoint"} & {*given}:
        raise ConfigError(
            f"without a recipe {config.model.name} would be trained for {config.epochs} epochs from random weights; give "
            "--recipe finetune-small, --pretrained, or --checkpoint FILE, or mean it: --set model.pretrained=false"
        )


def photographs(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as the images in them at any depth. Raises DataError for a folder without images."""
    from squeezevit.data.folder import SUFFIXES, _images

    found: list[Path] = []
    for path in paths:
        inside = list(map(Path, _images(path))) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path} holds no image: expected files ending in {' '.join(SUFFIXES)}")
        found += inside
    return found


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}); choose a folder of your own") from error


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
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written ({error.strerror}); choose a file in a folder that exists") from error


def write_json(path: Path | None, content: Any) -> None:
    from squeezevit.bench.machine import write_json

    if path is not None:
        write_json(path, content)
