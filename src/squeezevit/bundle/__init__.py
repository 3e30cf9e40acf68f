"""A bundle: a folder with a model's weights and all that belongs to them, so that nothing of it need ever be typed again.

`model.safetensors` holds the weights, learned heads included, or another file the exported model; `squeezevit.json` the card: how
the model is built, its reducer, preprocessing, classes, versions and what was measured; `SHA256SUMS` a sum of each. No pickle.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from squeezevit import sums
from squeezevit.bench.machine import versions
from squeezevit.bundle import hosts
from squeezevit.bundle.whole import write_whole
from squeezevit.checkpoint import load_checkpoint_, read_checkpoint, save_checkpoint
from squeezevit.core.attach import reduce_
from squeezevit.core.cut import description_of, require_model
from squeezevit.core.running import evaluation_mode, forward, images
from squeezevit.data.classifier import class_names, is_name, name_classes_
from squeezevit.data.pixels import Preprocessing
from squeezevit.errors import CheckpointError, ConfigError, UnsupportedError
from squeezevit.reducers import to_dict
from squeezevit.reducers.catalog import from_dict

FORMAT = 1
CARD, WEIGHTS, CLASSES = "squeezevit.json", "model.safetensors", "classes.txt"
_LOADED = "squeezevit_card"  # where a model that was loaded keeps its card, and which size it was then set up for
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_KINDS = {"host": dict, "reducer": dict | None, "grid": bool, "dtype": str, "engine": str, "exported": dict, "measured": dict}
ENGINES = {"torch": WEIGHTS, "onnx": "model.onnx", "openvino": "model.xml", "program": "model.pt2", "aoti": "model.aoti.pt2"}


@dataclass(frozen=True)
class Card:
    """What `squeezevit.json` says.

    host: library and how it builds the model; dtype: of its weights, by torch's name; reducer: as `to_dict`, None where there
    is none; engine: a key of `ENGINES`, whose file holds the model; exported: of an exported model its batch size (None: any),
    precision and outputs; measured: figures.
    """

    host: dict[str, Any]
    reducer: dict[str, Any] | None
    grid: bool
    dtype: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    engine: str = "torch"
    exported: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def save(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Any = None,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, reduced or not, with all that belongs to it, as a folder that `load` reads; an old bundle is replaced whole.

    Before anything is written the model is built anew from what the card says, and must give the same numbers to the last bit.

    options: how its library built it, as {"name": "ViT-B-32"} of open_clip, or what timm.create_model was called with beside the
    name; what the model itself tells, or the bundle that it was loaded from, need not be given. image_size: pixels a side, or
    height and width; None: its own.
    classes: a name for each output, in their order. preprocessing: a `Preprocessing`, a dictionary of its fields, transformers'
    image processor, or torchvision's `weights.transforms()`; None: what the bundle says that the model was loaded from, or timm,
    or open_clip's model. measured: figures kept.

    Raises UnsupportedError for models of other libraries, and ConfigError where what is known does not build this model, where
    preprocessing is needed and where the classes do not fit; nothing is then written.

    >>> save(reduce_(model, ETPS(keep=0.5)), "my-vit", classes=["cat", "dog"])  # doctest: +SKIP
    """
    card = card_of(model, options=options, image_size=image_size, classes=classes, preprocessing=preprocessing)
    card = replace(card, measured=dict(measured or {}))
    write(Path(folder), card, lambda new: save_checkpoint(model, new / WEIGHTS))


def load(folder: str | PathLike[str]) -> nn.Module:
    """The model of a bundle that `save` wrote, in evaluation mode, reduced as it was; it knows its preprocessing and classes.

    Raises CheckpointError where the folder is no bundle, a file of it is missing or is not what was written, or it holds an
    exported model, and ConfigError for a reducer of another version.

    >>> load("my-vit")(images)  # doctest: +SKIP
    """
    return open_bundle(folder)[0]


def open_bundle(folder: str | PathLike[str]) -> tuple[nn.Module, Card]:
    """`load`, and the card beside it."""
    path = bundle_in(folder)
    card = read_card(path)
    if card.engine != "torch":
        raise CheckpointError(
            f"{path} holds a model exported to {card.engine}, which runs without torch; run it by "
            f"`squeezevit predict --from {path}`, or load the bundle that it was exported from"
        )
    return model_of(path, card), card


def model_of(path: Path, card: Card) -> nn.Module:
    """The model of the very bundle that `read_card` has just read, whose files are not summed up again."""
    file = path / WEIGHTS
    model = load_checkpoint_(rebuilt(card), read_checkpoint(file, checked=True), str(file)).eval()
    hosts.prepare_(model, card.preprocessing)
    if card.classes is not None:
        name_classes_(model, card.classes)
    vars(model)[_LOADED] = replace(card, measured={}), description_of(model).image_size
    return model


def card_of(
    model: nn.Module,
    *,
    options: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Any = None,
) -> Card:
    """The card of a model, which is proved to build it; as `save`."""
    require_model(model)
    known, size = vars(model).get(_LOADED, (None, None))
    if known is not None and options is None:
        options = hosts.options_of(known.host)
    if known is not None and preprocessing is None and size == description_of(model).image_size:
        preprocessing = known.preprocessing if hosts.height_and_width(image_size) in (None, known.preprocessing.crop) else None
    host = hosts.record(model, options)
    for_images = hosts.preprocessing(model, preprocessing, image_size)
    if (kind := str(next(model.parameters()).dtype).removeprefix("torch.")) not in _DTYPES:
        raise ConfigError(f"weights of {kind} are not saved as a bundle; save the model before it is quantised")
    names = class_names(model) if classes is None else _checked(classes)
    card = with_reducer_of(model, Card(host, None, False, kind, for_images, names, versions=versions()))
    _prove(model, card)
    return card


def with_reducer_of(model: nn.Module, card: Card) -> Card:
    """The card with the reducer that is in the model now."""
    state = vars(model).get("squeezevit_state")
    if state is None or not state.stages:
        return replace(card, reducer=None, grid=False)
    return replace(card, reducer=to_dict(state.reducer), grid=state.grid)


def named(card: Card, classes: Sequence[str], outputs: int) -> Card:
    """The card with names for the classes, of which there are `outputs`. Raises ConfigError for another number of names."""
    names = _checked(classes)
    if outputs and len(names) != outputs:
        raise ConfigError(f"classes gives {len(names)} names, and the model has {outputs} outputs; give one for each")
    return replace(card, classes=names)


def _checked(classes: Sequence[str]) -> tuple[str, ...]:
    """Names that can stand in a file, a line each. Raises ConfigError where one is none."""
    if isinstance(classes, str):
        raise ConfigError(f"classes={classes!r} is one text; give a list with a name for each output")
    names = tuple(map(str, classes))
    if wrong := [name for name in names or ("",) if not is_name(name)]:
        raise ConfigError(
            f"classes names {wrong[0]!r}, which does not go into a line of a file; give each class a name of one line"
        )
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"classes names {twice!r} twice; give each class once, in the order of the model's outputs")
    return names


def rebuilt(card: Card) -> nn.Module:
    """A model as the card describes it, with weights that are still to be loaded."""
    model = hosts.build(card.host).to(_DTYPES[card.dtype])
    return reduce_(model, from_dict(card.reducer), grid=card.grid) if card.reducer is not None else model


def write(folder: Path, card: Card, fill: Callable[[Path], None]) -> None:
    """A folder with what `fill` writes into an empty one, the card, the classes, and sums; it appears whole or not at all.

    Raises ConfigError where it cannot be written, or where another folder than a bundle is in its place.
    """

    def fill_and_describe(new: Path) -> None:
        fill(new)
        describe_(new, card)
        sums.write(new)
        _carry_over(folder, new)

    write_whole(folder, fill_and_describe, CARD, "bundle")


def _carry_over(old: Path, new: Path) -> None:
    """What others left in an older bundle stays in the folder."""
    listed = {sums.NAME, *sums.listed(old)}
    for part in old.iterdir() if len(listed) > 1 else ():
        if part.name not in listed and not (new / part.name).exists():
            (shutil.copytree if part.is_dir() else shutil.copy2)(part, new / part.name)


def describe_(folder: Path, card: Card) -> None:
    """Write the card and the classes beside a model's files; sums, which make a bundle of it, are the caller's to write."""
    text = json.dumps({**asdict(card), "preprocessing": card.preprocessing.to_dict()}, indent=1, ensure_ascii=False)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")
    if card.classes is not None:
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in card.classes), encoding="utf-8")


def bundle_in(folder: str | PathLike[str]) -> Path:
    """The folder, or the bundle `best` in it where it is one that `squeezevit train` wrote."""
    path = Path(folder)
    return path / "best" if not (path / CARD).is_file() and (path / "best" / CARD).is_file() else path


def holds_weights(folder: Path) -> bool:
    """Whether a folder is a bundle of torch's, from which others are made."""
    return (folder / CARD).is_file() and (folder / WEIGHTS).is_file()


def read_card(folder: str | PathLike[str]) -> Card:
    """What a bundle says of itself, all its files being as they were written. Raises CheckpointError where they are not."""
    path = bundle_in(folder)
    file = path / CARD
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} is no bundle: there is no {CARD} in it; give a folder that sv.save or a command wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}); {sums.REMEDY}") from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{file} is of format {version!r}, this version reads {FORMAT}; use the version that wrote it")
    if not sums.check_folder(path, exact=False):
        raise CheckpointError(f"{path} lacks {sums.NAME}, so that nobody can say whether its files are whole; {sums.REMEDY}")
    card = _card(values, file)
    model = path / ENGINES[card.engine]
    if not model.is_file():
        raise CheckpointError(f"{path} lacks {ENGINES[card.engine]}; {sums.REMEDY}")
    needed = [file, model, *(part for part in companions(model) if part.is_file())]
    if loose := {part.name for part in needed} - {*sums.listed(path)}:
        raise CheckpointError(f"{path / sums.NAME} has no sum of {', '.join(sorted(loose))}; {sums.REMEDY}")
    return card


def companions(model: Path) -> tuple[Path, ...]:
    """Where the weights of an exported model may lie beside it."""
    return model.with_suffix(".bin"), model.with_name(f"{model.name}.data")


def _card(values: dict[str, Any], file: Path) -> Card:
    try:
        given = {**values, "preprocessing": Preprocessing.from_dict(values["preprocessing"])}
        given["classes"] = None if given["classes"] is None else tuple(given["classes"])
        card = Card(**given)
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(card, name), kinds):
                raise TypeError(f"{name} is a {type(getattr(card, name)).__name__}")
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} describes no model of this version ({error}); use the version that wrote it") from error
    if card.dtype not in _DTYPES:
        raise CheckpointError(f"{file}: weights of {card.dtype!r} are not known to this version; use the version that wrote it")
    if card.engine not in ENGINES:
        raise CheckpointError(f"{file}: engine {card.engine!r} is not known to this version; use the version that wrote it")
    return card


def _prove(model: nn.Module, card: Card) -> None:
    """Raise ConfigError where the card does not give this very model."""
    remedy = hosts.REMEDIES[card.host["library"]]
    with _same_draws(model):
        told, found = _both(model, card, remedy)
    if told.shape == found.shape and not torch.equal(told, found):
        # weights that lie in memory as their file did are summed in another order: a copy lies as those that are loaded
        with _same_draws(model), torch.no_grad():
            told = _run(copy.deepcopy(model).eval(), images(model, 1, card.preprocessing.crop))
    if told.shape != found.shape or not torch.equal(told, found):
        raise ConfigError(f"what is known of this {type(model).__name__} builds another model, whose numbers differ; {remedy}")
    if card.classes is not None and len(card.classes) != told.shape[-1]:
        raise ConfigError(f"classes gives {len(card.classes)} names, and the model has {told.shape[-1]} outputs; give one for each")


@contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Nobody's later random numbers depend on whether a model was saved, on the CPU and on the model's device."""
    device = next(model.parameters()).device
    others = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        yield


def _both(model: nn.Module, card: Card, remedy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model puts out, and what the one that the card describes does with its weights."""
    try:
        again, weights = rebuilt(card).to(next(model.parameters()).device), model.state_dict()
        load_checkpoint_(again, weights, "the model's weights")
        if other := [key for key, value in again.state_dict().items() if value.dtype != weights[key].dtype]:
            raise ConfigError(f"its weights are of several dtypes, as {other[0]} is {weights[other[0]].dtype}; convert it to one")
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        raise ConfigError(f"what is known of this {type(model).__name__} does not build it again ({error}); {remedy}") from error
    x = images(model, 1, card.preprocessing.crop)
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(again):
        told = _run(model, x)
        try:
            return told, _run(again, x)
        except Exception as error:  # whatever another model than this one stumbles over
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"what is known of this {type(model).__name__} builds a model that fails on its images ({reason}); {remedy}"
            ) from error


def _run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The first tensor that a model, or the part of it that takes images, puts out."""
    torch.default_generator.manual_seed(0)  # Random's own; torch.manual_seed would seed every device, used or not
    if x.device.type not in ("cpu", "meta"):
        kind = torch.get_device_module(x.device)
        with kind.device(x.device) if hasattr(kind, "device") else nullcontext():
            kind.manual_seed(0)
    out = forward(model, x, "fp32")()
    while not isinstance(out, torch.Tensor):
        out = next(v for v in (out.values() if isinstance(out, dict) else out) if v is not None)
    return out
