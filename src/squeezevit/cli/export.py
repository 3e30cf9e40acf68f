"""`squeezevit export`: a model out of torch, verified, as a folder that runs by itself."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squeezevit.cli import inputs, options, screen
from squeezevit.errors import ConfigError

if TYPE_CHECKING:
    from squeezevit.bundle import Card
    from squeezevit.export.job import Wanted

OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write; an old bundle is replaced whole.", file_okay=False)]
Format = Annotated[str, typer.Option("--to", metavar="onnx|openvino|program|aoti", help="Format: what will run the model.")]
Int8 = Annotated[bool, typer.Option("--int8", help="Linear layers and attention in int8, calibrated on --calibrate.")]
Photographs = Annotated[
    Path | None,
    typer.Option("--calibrate", help="Folder of photographs for --int8, of the kind the model will see.", file_okay=False),
]
HowMany = Annotated[int, typer.Option("--images", help="Photographs of that folder: half calibrate, half verify.", min=4)]
FixedBatch = Annotated[
    int, typer.Option("--batch-size", help="Images at once, the last batch being padded; 0: any number, slower.", min=0, max=4096)
]
NoScatter = Annotated[bool, typer.Option("--no-scatter", help="No node that scatters, for runtimes that get those wrong.")]
WithGroups = Annotated[bool, typer.Option("--with-groups", help="One more output a stage: the token each patch ended in.")]
Floor = Annotated[float, typer.Option("--floor", help="Lowest mean cosine to torch that int8 and bf16 may have.", min=-1, max=1)]
ExportedMethod = Annotated[str | None, options.field_option("method", show_default="the bundle's, or none; for --model etps")]
Features = Annotated[
    bool, typer.Option("--features", help="Put out what goes into the classifier, for `squeezevit embed`, in place of classes.")
]
Exporter = Annotated[
    str,
    typer.Option("--exporter", metavar="dynamo|torchscript", help="torch's exporter to ONNX; the second is the older, and traces."),
]
Bits = Annotated[str, typer.Option("--precision", metavar="fp32|bf16", help="What OpenVINO computes in where it is not int8.")]


def export(
    out: OutFolder,
    source: options.Source = None,
    model: options.OneModel = None,
    pretrained: options.Pretrained = False,
    checkpoint: options.Checkpoint = None,
    method: ExportedMethod = None,
    keep: options.Keep = None,
    macs: options.Macs = None,
    latency: options.Latency = None,
    at: options.At = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    classes: options.Classes = None,
    to: Format = "openvino",
    int8: Int8 = False,
    calibrate: Photographs = None,
    images: HowMany = 256,
    batch_size: FixedBatch = 16,
    no_scatter: NoScatter = False,
    with_groups: WithGroups = False,
    floor: Floor = 0.9,
    precision: Bits = "fp32",
    exporter: Exporter = "dynamo",
    features: Features = False,
    json_file: options.Json = None,
) -> None:
    """Write a model for another runtime, with a script that needs neither SqueezeViT nor torch; verified before it appears.

    Its outputs are compared with torch's, int8 on photographs that were held out, and its speed is measured beside torch's.
    """
    from squeezevit.export import job

    inputs.check_json(json_file)
    if model is None and source is None:
        raise ConfigError("nothing says which model: give --from BUNDLE, or --model NAME")
    _check_calibration(int8, calibrate)
    unread = job.UNREAD if int8 else None
    asked = job.Wanted(to, unread, batch_size or None, precision, not no_scatter, with_groups, floor, exporter, features)
    job.require(asked, out)
    wanted = inputs.Wanted(source, model, pretrained, checkpoint, method, keep, at, macs, latency, num_classes, image_size)
    ready = inputs.ready(replace(wanted, as_it_is=True))
    inputs.note_untrained(ready)
    written = export_model(
        ready.net, out, asked, card=ready.card, options=ready.options, preprocessing=ready.preprocessing, image_size=image_size,
        classes=classes, names=ready.classes, calibrate=calibrate, images=images,
    )  # fmt: skip
    inputs.write_json(
        json_file, {"model": ready.name, "reducer": repr(ready.reducer), "exported": written.exported, **written.measured}
    )


def export_model(
    net: Any,
    out: Path,
    asked: "Wanted",
    *,
    card: "Card | None" = None,
    options: dict[str, Any] | None = None,
    preprocessing: Any = None,
    image_size: int | None = None,
    classes: Path | None = None,
    names: Sequence[str] | None = None,
    calibrate: Path | None = None,
    images: int = 256,
) -> "Card":
    """Export a model that is ready, and say what came of it; returns the card that was written.

    asked: with calibration images still to be read, if any. card: that of the bundle it comes from, None to ask the model; options,
    preprocessing and names of the classes: what the model cannot tell. classes: a file with names that somebody gave. calibrate:
    the folder for int8, None for float.
    """
    from squeezevit.bundle import card_of, named
    from squeezevit.data.classifier import classes_in
    from squeezevit.data.folder import given_classes
    from squeezevit.export.job import export_as

    if card is not None and classes is not None and card.classes is not None:
        raise ConfigError(f"--classes {classes}: the bundle brings its classes; leave --classes out")
    if asked.features and classes is not None:
        raise ConfigError(f"--classes {classes}: with --features no classes are put out; leave one of them out")
    names = names if classes is None else given_classes(classes)
    if card is None:
        card = card_of(net, options=options, image_size=image_size, classes=names, preprocessing=preprocessing)
    elif classes is not None and names is not None:
        card = named(card, names, classes_in(net))
    with screen.steps() as report:
        int8 = None if calibrate is None else _calibration(calibrate, images, card.preprocessing, report)
        written = export_as(net, out, card, replace(asked, int8=int8), report)
    _tell(out, written)
    return written


def _check_calibration(int8: bool, calibrate: Path | None) -> None:
    """Raises ConfigError where one of the two options lacks the other."""
    if int8 and calibrate is None:
        raise ConfigError("--int8 is calibrated on photographs: give --calibrate FOLDER, with 100 or more like those it will see")
    if calibrate is not None and not calibrate.is_dir():
        raise ConfigError(f"--calibrate {calibrate}: there is no such folder; name one with 100 or more photographs")
    if calibrate is not None and not int8:
        raise ConfigError(f"--calibrate {calibrate} is for --int8; give that, too, or leave both out")


def _calibration(folder: Path, most: int, how: Any, report: screen.Report) -> Any:
    import torch

    from squeezevit.data.folder import sample_images

    transform = inputs.counted(lambda image: torch.from_numpy(how(image)), most, report)
    return tuple(sample_images(folder, most, transform, how.upright))


def _tell(out: Path, card: "Card") -> None:
    from squeezevit.reducers.catalog import from_dict

    measured, speed = card.measured, card.measured["speed"]
    rows = [(name, f"{1000 * s['min']:.1f}", f"{1000 * s['median']:.1f}") for name, s in speed["seconds"].items()]
    screen.table(rows, ("", "best ms", "median ms"), title=f"a batch of {speed['batch']}, {speed['threads']} threads")
    lines = [f"{'unreduced' if card.reducer is None else from_dict(card.reducer)}, {card.exported['precision']}"]
    lines += [f"largest difference from torch in float: {measured['compared']['error']:.1e} of the largest output"]
    if "cosine" in measured:
        lines += [
            f"on {measured['images']} images: mean cosine {measured['cosine']:.4f}, lowest {measured['lowest_cosine']:.4f}, the "
            f"largest output the same for {measured['agreement']:.1%}"
        ]
    if "groups" in measured:
        lines += [f"{measured['groups']:.1%} of the patches end in the token that torch puts them in"]
    lines += [f"{speed['speedup_best']:.2f} times as fast as torch fp32 unreduced (median {speed['speedup']:.2f})"]
    screen.say("\n".join([*lines, f"\nWritten: {out}   try it: python {out / 'run.py'} photo.jpg"]))
