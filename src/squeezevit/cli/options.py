"""The options of all commands, each described once: what a field of the training configuration says is said there."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand

from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import methods
from squeezevit.train.config import Config

METHODS = "{methods}"  # in a help text: the names there are when it is read, those of --import too
MOST_IMAGES = 1_000_000  # in a batch: a slip of the keyboard is refused before memory is
FIELDS = {  # options of train: the field of the configuration that each sets
    "data": "data.folder",
    "model": "model.name",
    "pretrained": "model.pretrained",
    "checkpoint": "model.checkpoint",
    "method": "reducer.method",
    "keep": "reducer.keep",
    "macs": "reducer.macs",
    "at": "reducer.at",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "image_size": "model.image_size",
    "device": "device",
    "precision": "precision",
    "out": "out",
}


class Command(TyperCommand):
    """A command whose help texts are plain: brackets are brackets, and the names of methods are filled in when it is asked for."""

    def __init__(self, *args: Any, help: str | None = None, **kwargs: Any) -> None:
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        super().__init__(*args, help=escape("\n\n".join(" ".join(text.split()) for text in paragraphs)), **kwargs)
        for parameter in self.params:
            described: Any = parameter
            described.help = escape(described.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            parameter.help = parameter.help.replace(METHODS, escape(", ".join(methods())))
        return parameters


@cache
def _field(name: str) -> tuple[Field[Any], Any]:
    """A field of the configuration by its dotted name, and its type."""
    section: Any = Config
    for part in name.split("."):
        found = next(f for f in fields(section) if f.name == part)
        section = get_type_hints(section, include_extras=True)[part]
    return found, section


def field_option(option: str, *names: str, **more: Any) -> Any:
    """An option described as the field that it sets in train."""
    field, _ = _field(FIELDS[option])
    help_ = field.metadata["help"] + (f" One of {METHODS}." if option == "method" else "")
    return typer.Option(*names, **{"help": help_, "show_default": field.metadata.get("unset", True), **more})


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for each of `FIELDS`; it is called with those that were given, by the dotted names of the fields."""

    def run(**given: Any) -> None:
        values = {name: given.pop(option) for option, name in FIELDS.items()}
        command({name: value for name, value in values.items() if value is not None}, **given)

    own = list(inspect.signature(command).parameters.values())[1:]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *map(_parameter, FIELDS)])  # type: ignore[attr-defined]
    return run


def _parameter(option: str) -> inspect.Parameter:
    """Text, for the configuration to read: what is allowed stands there alone."""
    field, hint = _field(FIELDS[option])
    kind, metavar = (bool, None) if hint is bool else (str, _metavar(hint))
    default = "" if field.default is None else str(field.default)
    info = field_option(
        option, metavar=metavar, rich_help_panel="Fields of the configuration, without a recipe's values",
        show_default=field.metadata.get("unset", default) or False,
    )  # fmt: skip
    return inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _metavar(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(args)
    if origin is Annotated:
        return _metavar(args[0])
    if origin is tuple:
        return f"{_metavar(args[0])},..."
    if args:
        return _metavar([a for a in args if a is not NoneType][-1])
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}[hint]


def share(text: str) -> float:
    """A share of 1 from a number or a percentage. Raises ConfigError on what is neither.

    >>> share("50%"), share("0.5")
    (0.5, 0.5)
    """
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a share; give a number, as 0.5, or a percentage, as 50%") from error


def listed(text: str, option: str) -> list[str]:
    """What is separated by commas. Raises ConfigError where there is nothing."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"{option} {text!r} is empty; give one value or several separated by commas")
    return parts


def ratios(text: str, option: str) -> list[float]:
    """Keep ratios separated by commas."""
    try:
        return [share(part) for part in listed(text, option)]
    except ConfigError as error:
        raise ConfigError(f"{option} {text!r} is not a number or several separated by commas, as 0.7,0.5") from error


def one_or_each(text: str) -> float | tuple[float, ...]:
    """--keep as a reducer takes it."""
    values = ratios(text, "--keep")
    return values[0] if len(values) == 1 else tuple(values)


def blocks(text: str | None) -> tuple[int, ...] | None:
    """--at as a reducer takes it."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in listed(text, "--at"))
    except ValueError as error:
        raise ConfigError(f"--at {text!r} is not a list of 0-based block indices, as 3,6,9") from error


ModelName = Annotated[str, field_option("model", "--model")]
Pretrained = Annotated[bool, field_option("pretrained", "--pretrained")]
Checkpoint = Annotated[Path | None, field_option("checkpoint")]
Method = Annotated[str, field_option("method")]
Source = Annotated[
    Path | None,
    typer.Option(
        "--from", help="A bundle, which train or sv.save wrote: its model, size, classes and reducer.", show_default=False
    ),
]
OwnMethod = Annotated[str | None, field_option("method", show_default="the bundle's, or etps")]
Keep = Annotated[str | None, field_option("keep", metavar="NUMBER,...", show_default="the bundle's, or of no budget the method's")]
At = Annotated[str | None, field_option("at", metavar="INTEGER,...")]
ImageSize = Annotated[int | None, field_option("image_size", min=1, max=8192)]
Precision = Annotated[str, field_option("precision", metavar="fp32|bf16|fp16")]
MethodList = Annotated[str, typer.Option(metavar="NAME,...", help=f"Methods, separated by commas. One or more of {METHODS}.")]
KeepList = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER,...", help="Keep ratios, separated by commas; each is used at every stage.", show_default="0.7,0.5"
    ),
]
MacsList = Annotated[
    str | None,
    typer.Option(
        "--macs", metavar="SHARE,...", help="Or budgets: shares of the unreduced model's multiply-adds, separated by commas."
    ),
]
TimeList = Annotated[
    str | None,
    typer.Option(
        "--time", metavar="SHARE,...", help="Or: shares of the unreduced model's time in such batches, separated by commas."
    ),
]
_LIBRARIES = "Model: a name of timm's, hf:NAME, torchvision:NAME, open_clip:NAME/WEIGHTS, or dinov2-demo, which needs no hub."
NamedModel = Annotated[str | None, field_option("model", "--model", help=_LIBRARIES, show_default="deit_small_patch16_224")]
OneModel = Annotated[str | None, field_option("model", "--model", help=_LIBRARIES, show_default=False)]
OptionalModel = Annotated[str | None, field_option("model", "--model", show_default="DINOv2 ViT-S/14 of the demo")]
NumClasses = Annotated[
    int | None,
    typer.Option(help="Outputs of the classifier; 0: none, features.", min=0, max=1_000_000, show_default="the model's own"),
]
BatchSize = Annotated[int, typer.Option(help="Images a batch.", min=1, max=MOST_IMAGES)]
Workers = Annotated[int | None, typer.Option(help="Reading processes.", min=0, max=512, show_default="half the cores, at most 8")]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="File with a class name a line, in the order of the model's outputs, as train leaves in classes.txt.",
        show_default="the folders in natural order",
    ),
]
Upright = Annotated[
    bool, typer.Option("--upright/--as-stored", help="Turn photographs as their EXIF data say, or leave them as they are stored.")
]
Rounds = Annotated[int, typer.Option(help="Timing rounds; in each, every method runs once.", min=1, max=100_000)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", min=1, max=1024, show_default="torch's own choice")]
Compiled = Annotated[
    str | None, typer.Option("--compile", help="Compile every variant: a mode of torch.compile, default or reduce-overhead.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.", dir_okay=False)]
Images = Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.", show_default=False)]
Data = Annotated[Path, typer.Option(help="ImageFolder tree: FOLDER/val/<class>/*.jpg, or FOLDER/<class>/*.jpg.")]
ShorterSide = Annotated[
    int | None,
    typer.Option(
        help="Pixels of the shorter side, rounded to whole patches.", min=1, max=2048, show_default="224, or the bundle's"
    ),
]
DrawingStyle = Annotated[
    str, typer.Option("--style", metavar="mean|outlines", help="Groups in their mean colours, or outlined with their hosts.")
]
Question = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="For --model hf:NAME, a vision-language model: draw the image tokens of this prompt; with --method its tower's, too.",
    ),
]
Animation = Annotated[
    Path | None,
    typer.Option(
        "--animate",
        metavar="FILE",
        help="Also an animation over the stages, FILE.gif or FILE.webp; of several photographs each has its name added.",
        dir_okay=False,
    ),
]
Drawings = Annotated[Path, typer.Option(help="Folder for the PNG files.", file_okay=False)]
ReportFolder = Annotated[Path, typer.Option(help="Folder for report.html and results.json.", file_okay=False)]
Quick = Annotated[bool, typer.Option("--quick", help="Smaller images and fewer of them: about a minute, for a first look.")]
Compared = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help=f"Methods to compare, separated by commas, of {METHODS}.", show_default="most of them"),
]
Macs = Annotated[
    float | None,
    typer.Option(parser=share, metavar="SHARE", help="Budget: share of the unreduced model's multiply-adds, as 0.5 or 50%."),
]
Latency = Annotated[
    float | None,
    typer.Option(
        "--latency",
        "--time",
        parser=share,
        metavar="SHARE",
        help="Budget: share of the unreduced model's time on this device, as 0.6 or 60%.",
    ),
]
ImagesPerSecond = Annotated[float | None, typer.Option(help="Budget: images a second on this device.")]
Stages = Annotated[
    str | None,
    typer.Option("--at", help="Stages, as 3,6,9, or auto: the latest that reach the budget.", show_default="the method's"),
]
Curve = Annotated[
    str | None,
    typer.Option(
        help="How tokens fall: geometric, linear, cosine or lorentzian; at --at, the method's stages, or in every block.",
        show_default="the method's",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure the device again, whatever the cache file says.")]
Calibrate = Annotated[
    Path | None, typer.Option(help="Search the stages and ratios on this folder of images, for --macs.", file_okay=False)
]
Sampled = Annotated[int, typer.Option("--images", help="Images of the folder: half to search on, half to report on.", min=4)]
Recipe = Annotated[str | None, typer.Option(help="A shipped recipe, such as finetune-small or dtps-deit-small, or a YAML file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from --out, where there is a checkpoint.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any other field, as optimizer.lr=1e-4; may be repeated.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the whole configuration as YAML and exit.")]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import a module that registers methods of your own; may be repeated."),
]
Version = Annotated[
    bool, typer.Option("--version", help="Print the version, and those of torch and of the libraries with models, and exit.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Neither notes nor progress: results and errors alone.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also what the library logs of its work.")]
