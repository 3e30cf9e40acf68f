"""One typed configuration of a training run: YAML in and out, every field checked, errors that name the nearest field."""

import difflib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from squeezevit.data.folder import printable
from squeezevit.errors import ConfigError, MissingExtraError
from squeezevit.train.objective import LossWeights

LARGEST = 2**63  # whole numbers stay below it
SHORT = 60  # characters of a value that an error quotes
_DEEPEST, _MOST = 16, 10_000  # levels and values of a recipe
_POWER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_IN_EPOCHS = ("schedule.warmup_epochs", "reducer.anneal_epochs")
logger = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What a number must hold to."""

    least: float = 0
    most: float = math.inf
    above: bool = False  # `least` itself is out

    def hold(self, value: float) -> bool:
        return (value > self.least if self.above else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"from {self.least:g} to {self.most:g}"
        return f"above {self.least:g}" if self.above else f"of {self.least:g} or more"


Positive = Annotated[float, Limits(above=True)]
Amount = Annotated[float, Limits()]
Share = Annotated[float, Limits(most=1)]
Count = Annotated[int, Limits(1)]
Index = Annotated[int, Limits()]


@dataclass(frozen=True)
class ModelConfig:
    """A timm model and its starting weights."""

    name: str = field(default="deit_small_patch16_224", metadata={"help": "A model of timm, such as deit_small_patch16_224."})
    pretrained: bool = field(default=False, metadata={"help": "timm's weights, fetched from the hub."})
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "Weights from a file: timm's, our own (.safetensors), or the authors' of TPS and DynamicViT."},
    )
    new_head: bool = False  # leave that file's classifier out
    num_classes: Count | None = None  # None: as many as the data have
    image_size: Annotated[int, Limits(1, 8192)] | None = field(
        default=None, metadata={"help": "Pixels a side.", "unset": "the model's own"}
    )
    drop_path: Share = 0.0
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model


@dataclass(frozen=True)
class ReducerConfig:
    """How tokens are reduced. ToMe gets the r that costs what eTPS costs at this keep ratio, unless options say r."""

    method: str = field(default="etps", metadata={"help": "How tokens are reduced."})
    keep: float | tuple[float, ...] = field(
        default=0.7,
        metadata={
            "help": "Ratio of tokens kept at each stage, 0.7, or one per stage, 0.7,0.6,0.5. ToMe gets the r that costs the same."
        },
    )
    macs: Annotated[float, Limits(above=True, most=1)] | None = field(
        default=None,
        metadata={"help": "Budget in place of --keep: share of the unreduced model's multiply-adds, as 0.5.", "unset": "by --keep"},
    )
    at: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "Stages: 0-based block indices, as 3,6,9.", "unset": "one quarter, half and three quarters of the depth"},
    )
    anneal_epochs: Amount = 0.0  # over which the keep ratio falls from 1
    warm_steps: Annotated[int, Limits(0, 1_000_000)] = 0  # batches on which learned heads alone learn to rank, before the training
    options: dict[str, Any] = field(default_factory=dict)  # further fields of the reducer, as train: topk


@dataclass(frozen=True)
class DataConfig:
    """FOLDER/train/<class>/* and FOLDER/val/<class>/*, or FOLDER/train.csv and FOLDER/val.csv with columns path,label."""

    folder: str | None = field(
        default=None, metadata={"help": "FOLDER with train/<class>/* and val/<class>/*, or train.csv and val.csv (path,label)."}
    )
    classes: str | None = None  # a file with one class name a line, in the order of the outputs; None: natural order
    upright: bool = True  # photographs are turned as their EXIF data say
    workers: Annotated[int, Limits(0, 256)] | None = None  # reading processes; None: half the cores, at most 8
    max_unreadable: Share = 0.01  # of all images; more of them end the run


@dataclass(frozen=True)
class AugmentConfig:
    """timm's augmentations by timm's names."""

    auto_augment: str | None = None
    color_jitter: Amount = 0.4  # without effect beside auto_augment
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    hflip: Share = 0.5
    vflip: Share = 0.0
    erase: Share = 0.0
    mixup: Amount = 0.0
    cutmix: Amount = 0.0
    smoothing: Share = 0.1
    repeats: Annotated[int, Limits(1, 100)] = 1  # repeated augmentation: versions of an image in one epoch, of as many fewer images


@dataclass(frozen=True)
class OptimizerConfig:
    """A timm optimiser. lr belongs to the whole batch_size; groups learn at lr times their scale throughout the schedule."""

    name: str = "adamw"
    lr: Positive = 1e-4
    weight_decay: Amount = 0.05
    clip: Positive | None = None  # norm of the gradient
    backbone_lr_scale: Positive = 1.0
    heads_lr_scale: Positive = 1.0  # of the score heads, token_reducer.*
    layer_decay: Annotated[float, Limits(most=1, above=True)] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """A timm schedule, stepped at every update."""

    name: Literal["cosine", "poly", "constant"] = "cosine"
    warmup_epochs: Amount = 0.0
    warmup_lr: Amount = 1e-6
    min_lr: Amount = 1e-6


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the weights, of timm; None: none."""

    decay: Share | None = None
    warmup: bool = False


@dataclass(frozen=True)
class Config:
    """A training run. Raises ConfigError, naming field, value and what is allowed, on values that cannot be meant.

    >>> Config(epochs=3).optimizer.name
    'adamw'
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    reducer: ReducerConfig = field(default_factory=ReducerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    loss: LossWeights = field(default_factory=lambda: LossWeights(logits=0.0, tokens=0.0))  # both above 0: distillation
    teacher: ModelConfig | None = None  # None: the starting weights, unreduced
    epochs: Count = field(default=30, metadata={"help": "Passes over the training images."})
    batch_size: Count = field(default=64, metadata={"help": "Images an update, over all processes and accumulated parts."})
    accumulate: Count = 1  # parts a process computes its share of the batch in
    freeze: Index = 0  # the embeddings and this many blocks, where above 0
    checkpoint_activations: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = field(default="fp32", metadata={"help": "fp32 as the weights are, or autocast."})
    device: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata={"help": "Where to compute."})
    seed: Index = 0
    out: str = field(default="train-out", metadata={"help": "Folder for checkpoints and logs."})
    save_every: Count | None = None  # updates between checkpoints inside an epoch; there is always one after each
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, hint in _hints(Config).items():
            _checked(hint, getattr(self, name), name)
        self._check_together()

    def _check_together(self) -> None:
        for name, epochs in (
            ("schedule.warmup_epochs", self.schedule.warmup_epochs),
            ("reducer.anneal_epochs", self.anneal_epochs),
        ):
            if epochs > self.epochs:
                raise ConfigError(f"{name}={epochs:g} is longer than epochs={self.epochs}; give at most as many")
        if min(asdict(self.loss).values()) < 0:
            raise ConfigError(f"loss={self.loss} has a negative weight; give 0 to leave a part out")
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError("precision='fp16' does not train on device='cpu'; choose bf16 or fp32")
        scale = self.augment.crop_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"augment.crop_scale={scale} is no range of areas; give two shares, as 0.08,1")

    @property
    def anneal_epochs(self) -> float:
        return self.reducer.anneal_epochs

    @property
    def distills(self) -> bool:
        return self.loss.logits > 0 or self.loss.tokens > 0


def load_config(source: str | Path | None = None, values: Mapping[str, Any] | None = None, settings: Sequence[str] = ()) -> Config:
    """A configuration from a shipped recipe's name or a YAML file, then values by dotted name (None: not given), then
    settings such as "optimizer.lr=1e-4". Where fewer epochs are asked for than the recipe's warm-up or annealing take, these are
    shortened in proportion, which is logged. Raises ConfigError on an unknown recipe, field or value.

    >>> load_config("dtps-deit-small", {"epochs": 10}, ["optimizer.lr=1e-4"]).optimizer.lr
    0.0001
    """
    tree = {} if source is None else _read(source)
    asked = [(name, value) for name, value in (values or {}).items() if value is not None] + [setting(text) for text in settings]
    for name, value in [*_shortened(tree, dict(asked)), *asked]:
        _assign(tree, name, value)
    return cast(Config, _section(Config, tree, ""))


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(f.name.removesuffix(".yaml") for f in _shipped().iterdir() if f.name.endswith(".yaml"))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dictionaries, lists and scalars."""
    return cast(dict[str, Any], _plain(asdict(config)))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads."""
    yaml, (_, dumper) = _yaml()
    return str(yaml.dump(to_dict(config), Dumper=dumper, sort_keys=False))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted names of what differs, with both values."""
    out = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{path}{key}.")
        elif a != b:
            out.append(f"{path}{key} ({a!r}, now {b!r})")
    return out


@cache
def _yaml() -> tuple[Any, tuple[Any, Any]]:
    """PyYAML, and its safe loader and dumper, to which 1e-8 is a number, as it is not in YAML 1.1."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError('configurations need PyYAML: run `pip install "squeezevit[train]"`') from error
    loader, dumper = (cast(Any, type(kind.__name__, (kind,), {})) for kind in (yaml.SafeLoader, yaml.SafeDumper))
    for kind in (loader, dumper):
        kind.add_implicit_resolver("tag:yaml.org,2002:float", _POWER, list("-+0123456789."))
    return yaml, (loader, dumper)


def _shipped() -> Any:
    return resources.files("squeezevit.train") / "recipes"


def _read(source: str | Path) -> dict[str, Any]:
    shown = printable(str(source))
    try:
        shipped = _shipped() / f"{source}.yaml"
        file = shipped if shipped.is_file() else Path(source)
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown} cannot be read ({getattr(error, 'strerror', None) or error}); name a readable file") from error
    if text is None:
        raise ConfigError(f"{shown} is neither a YAML file nor a recipe; recipes are {', '.join(recipes())}")
    tree = _parse(text, shown)
    if not isinstance(tree, dict):
        raise ConfigError(f"{shown} holds a {type(tree).__name__}, not names and values, as `epochs: 30`")
    return tree


def setting(text: str) -> tuple[str, Any]:
    """The dotted name and the value of `--set NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {quoted(text)} has no value; write it as optimizer.lr=1e-4")
    return name.strip(), _parse(value, f"--set {quoted(text)}")


def _parse(text: str, what: str) -> Any:
    """Plain values from YAML. Raises ConfigError where it is none, or where it would grow without end."""
    yaml, (loader, _) = _yaml()
    try:
        tree = yaml.load(text, loader)
    except RecursionError as error:
        raise ConfigError(f"{what} is nested too deep; {_DEEPEST} levels are enough for any configuration") from error
    except Exception as error:  # PyYAML lets numbers, dates and tags that it cannot convert escape as whatever they caused
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{what} is not YAML ({reason}); quote what is meant as text") from error
    for count, (value, depth) in enumerate(_everything(tree)):
        if depth > _DEEPEST or count > _MOST:
            raise ConfigError(f"{what} is nested deeper than {_DEEPEST} levels, or has more than {_MOST:,} values; make it smaller")
        if not isinstance(value, str | int | float | bool | list | dict | NoneType):
            raise ConfigError(f"{what} holds a {type(value).__name__}, {quoted(value)}; quote it if it is meant as text")
    return tree


def _everything(tree: Any) -> Iterator[tuple[Any, int]]:
    """All values in a tree with their depth, without recursion, as references may make it endless."""
    left = [(tree, 0)]
    while left:
        value, depth = left.pop()
        yield value, depth
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        left.extend((item, depth + 1) for item in inner)


def _shortened(tree: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, float]]:
    """A recipe's warm-up and annealing in proportion to the epochs asked for, where they do not fit into these."""
    before, now = tree.get("epochs", Config.epochs), asked.get("epochs")
    own = {
        name: tree[section][last]
        for name, (section, last) in ((name, name.split(".")) for name in _IN_EPOCHS)
        if isinstance(tree.get(section), dict) and last in tree[section] and not {name, section} & asked.keys()
    }
    numbers = [value for value in (before, now, *own.values()) if type(value) in (int, float)]
    if now is None or len(numbers) < 2 + len(own) or min(numbers[:2]) <= 0 or now >= max(own.values(), default=0):
        return []
    shorter = [(name, round(value * now / before, 4)) for name, value in own.items() if value]
    changes = ", ".join(f"{name}={value:g} (of {own[name]:g})" for name, value in shorter)
    logger.warning("epochs=%s instead of the recipe's %s: shortened in proportion to %s", now, before, changes)
    return shorter


def quoted(value: Any) -> str:
    """A value as an error shows it: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


def _assign(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def _section(cls: Any, value: Any, path: str) -> Any:
    """A dataclass from a mapping, its fields checked and converted."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path.rstrip('.')}={quoted(value)} is a section; give its fields, {', '.join(_hints(cls))}")
    hints = _hints(cls)
    for name in value:
        if name not in hints:
            shown = f"{path}{quoted(str(name)).strip(chr(39))}"
            raise ConfigError(f"{shown} is no field of a configuration; {_near(shown, path, list(hints))}")
    return cls(**{name: _checked(hints[name], v, f"{path}{name}") for name, v in value.items()})


def _near(name: str, path: str, siblings: list[str]) -> str:
    everything = _names(Config)
    last = name.rpartition(".")[2]
    near = [n for n in everything if n.rpartition(".")[2] == last] or difflib.get_close_matches(name, everything, 3, 0.7)
    known = f"the fields here are {', '.join(path + s for s in siblings)}"
    return f"did you mean {' or '.join(near)}? Otherwise {known}" if near else known


def _names(cls: Any, path: str = "") -> list[str]:
    out = []
    for name, hint in _hints(cls).items():
        inner = next((h for h in (hint, *get_args(hint)) if is_dataclass(h)), None)
        out += [f"{path}{name}"] if inner is None else _names(inner, f"{path}{name}.")
    return out


def _checked(hint: Any, value: Any, path: str) -> Any:
    """The value as `hint` wants it; raises ConfigError naming the field, the value and what is allowed."""
    if is_dataclass(hint):
        return _section(hint, vars(value) if isinstance(value, cast(type, hint)) else value, f"{path}.")
    sections = [h for h in get_args(hint) if is_dataclass(h)] if value is not None else []
    if sections:
        return _checked(sections[0], value, path)
    try:
        return _convert(hint, value)
    except (ValueError, TypeError, OverflowError) as error:
        most = f", below {LARGEST:,}" if isinstance(value, int) and abs(value) >= LARGEST else ""
        raise ConfigError(f"{path}={quoted(value)} cannot be used; give {_allowed(hint)}{most}") from error


def _convert(hint: Any, value: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = _convert(args[0], value)
        return _require(args[1].hold(number), number)
    if origin in (Union, UnionType):
        return _first(args, value)
    if origin is Literal:
        return _require(value in args, value)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(args[0], item) for item in items)
    if origin is dict:
        return dict(_require(isinstance(value, Mapping), value))
    if hint is float:
        number = float(_require(not isinstance(value, bool), value))
        return _require(math.isfinite(number), number)
    if hint is int:
        number = int(value) if isinstance(value, str) else value
        return _require(isinstance(number, int) and not isinstance(number, bool) and abs(number) < LARGEST, number)
    return _require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), value)


def _first(hints: Sequence[Any], value: Any) -> Any:
    """By the first hint that takes it."""
    for hint in hints[:-1]:
        try:
            return _convert(hint, value)
        except (ValueError, TypeError, OverflowError):
            continue
    return _convert(hints[-1], value)


def _require(good: bool, value: Any) -> Any:
    if not good:
        raise ValueError(value)
    return value


def _allowed(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_allowed(args[0])} {args[1]}"
    if origin in (Union, UnionType):
        return " or ".join(_allowed(a) for a in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"several, each {_allowed(args[0])}, separated by commas"
    if origin is dict:
        return "names and values"
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}[hint]
