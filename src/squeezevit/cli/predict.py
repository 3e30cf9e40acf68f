"""`squeezevit predict` and `squeezevit embed`: folders of photographs through a bundle."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from squeezevit.cli import options, screen
from squeezevit.errors import ConfigError

if TYPE_CHECKING:
    from squeezevit.embed import Done, Settings
    from squeezevit.scale import Cluster, Outcome

BundleFolder = Annotated[
    Path, typer.Option("--from", help="Bundle: a folder that train, export or sv.save wrote.", file_okay=False, show_default=False)
]
Sources = Annotated[
    list[str],
    typer.Argument(
        help="Photographs, or folders of them. On Ray also patterns, lists (.txt), Parquet files and WebDataset shards (.tar), "
        "of this machine or of a store, as s3://bucket/folder.",
        show_default=False,
    ),
]
Predictions = Annotated[str, typer.Option(help="Table to write; it ends in .csv, .json or .parquet. On Ray: a folder, for shards.")]
Features = Annotated[
    str,
    typer.Option(
        "--out",
        help="Table to write; it ends in .parquet, or in .npy, beside which stand .names.txt and .about.json. On Ray: a folder, "
        "for shards.",
        show_default=False,
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="torch or compiled for a bundle of torch; onnx, openvino, program or aoti as it was exported.",
        show_default="what the bundle holds",
    ),
]
Size = Annotated[
    int | None,
    typer.Option("--batch-size", help="Images a batch.", min=1, max=options.MOST_IMAGES, show_default="the model's own, or 16"),
]
Readers = Annotated[
    int | None,
    typer.Option("--workers", help="Threads that read, decode and resize.", min=0, max=512, show_default="the cores, at most 16"),
]
Turned = Annotated[
    bool | None,
    typer.Option(
        "--upright/--as-stored",
        help="Turn photographs as their EXIF data say, or leave them as they are stored.",
        show_default="as the bundle says",
    ),
]
Draft = Annotated[
    bool, typer.Option("--draft", help="Decode large JPEGs at a half, quarter or eighth: faster, with slightly other numbers.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="CPU threads of the model.", min=1, max=1024, show_default="the engine's own choice"),
]
Streams = Annotated[
    int | None,
    typer.Option(
        "--streams", help="Batches that OpenVINO computes side by side.", min=1, max=256, show_default="the threads, at most 8"
    ),
]
TopK = Annotated[int, typer.Option("--top-k", help="Likeliest classes a photograph.", min=1, max=1_000_000)]
_RAY = "On Ray"
EngineOn = Annotated[str, typer.Option("--engine-on", metavar="here|ray", help="Where it runs: in this process, or on Ray.")]
Address = Annotated[
    str | None,
    typer.Option("--ray", help="Address of a Ray that runs, or auto.", show_default="one for this run", rich_help_panel=_RAY),
]
Actors = Annotated[
    int | None,
    typer.Option(help="Processes that hold the model.", min=1, show_default="one a GPU, or one a machine", rich_help_panel=_RAY),
]
Device = Annotated[str, typer.Option(help="cpu, or cuda for a bundle of torch.", rich_help_panel=_RAY)]
Shard = Annotated[
    int, typer.Option("--shard", help="Photographs of a shard, where the source is not cut already.", min=1, rich_help_panel=_RAY)
]
Patience = Annotated[
    float, typer.Option(help="Seconds for one photograph to arrive; then it is unreadable.", min=0.001, rich_help_panel=_RAY)
]
Column = Annotated[
    str | None,
    typer.Option(
        help="Column of Parquet files with bytes or paths.", show_default="the only one that can be", rich_help_panel=_RAY
    ),
]
Names = Annotated[
    str | None,
    typer.Option(help="Column of Parquet files with names for the rows.", show_default="file and row", rich_help_panel=_RAY),
]
Append = Annotated[bool, typer.Option("--append", help="Add to the table that is there, of the same model, what is not yet in it.")]


def predict(
    images: Sources,
    bundle: BundleFolder,
    out: Predictions = "predictions.csv",
    top_k: TopK = 5,
    engine: EngineName = None,
    batch_size: Size = None,
    workers: Readers = None,
    threads: Threads = None,
    streams: Streams = None,
    upright: Turned = None,
    draft: Draft = False,
    engine_on: EngineOn = "here",
    ray: Address = None,
    actors: Actors = None,
    device: Device = "cpu",
    shard: Shard = 2048,
    patience: Patience = 120.0,
    column: Column = None,
    names: Names = None,
) -> None:
    """The classes of photographs, by the model of a bundle: a table of the likeliest ones and their probabilities.

    Files that cannot be read are listed in the table with the reason, and never end the run. A run that was interrupted goes on by
    the same command, and gives the same table.
    """
    from squeezevit import embed as job

    settings = _settings(batch_size, workers, upright, draft)
    cluster = _cluster(engine_on, ray, actors, device, threads, shard, patience, column, names, streams)
    if cluster is not None:
        from squeezevit import scale

        with _going_on(), _counted() as report:
            outcome = scale.predict(images, bundle, out, settings, engine, top_k, cluster, report)
        _tell_outcome(outcome)
        return
    with _going_on(), _counted() as report:
        opened = job.open_engine(bundle, engine, threads, streams=streams)
        done = job.predict(images, opened, out, settings, top_k, report)
    screen.table(
        [(row["file"], *_named(row)) for row in done.rows],
        ("photograph", "class"),
        ("probability",),
        f"{bundle}, {opened.name}",
        f"the first {len(done.rows)} of {done.files}" if done.files > len(done.rows) else None,
    )
    _tell(done)


def embed(
    images: Sources,
    bundle: BundleFolder,
    out: Features,
    append: Append = False,
    engine: EngineName = None,
    batch_size: Size = None,
    workers: Readers = None,
    threads: Threads = None,
    streams: Streams = None,
    upright: Turned = None,
    draft: Draft = False,
    engine_on: EngineOn = "here",
    ray: Address = None,
    actors: Actors = None,
    device: Device = "cpu",
    shard: Shard = 2048,
    patience: Patience = 120.0,
    column: Column = None,
    names: Names = None,
) -> None:
    """The features of photographs, by the model of a bundle: what goes into its classifier, or what a model without one puts out.

    The table keeps the model's id, as features of two models, or of two exports of one, do not compare. A run that was interrupted
    goes on by the same command, and gives the same table.
    """
    from squeezevit import embed as job

    settings = _settings(batch_size, workers, upright, draft)
    cluster = _cluster(engine_on, ray, actors, device, threads, shard, patience, column, names, streams)
    if cluster is not None:
        from squeezevit import scale

        if append:
            raise ConfigError(
                "--append adds to one file, and Ray writes a folder of shards; leave it out, and choose another --out"
            )
        with _going_on(), _counted() as report:
            outcome = scale.embed(images, bundle, out, settings, engine, cluster, report)
        _tell_outcome(outcome)
        return
    with _going_on(), _counted() as report:
        opened = job.open_engine(bundle, engine, threads, features=True, streams=streams)
        done = job.embed(images, opened, out, settings, append, report)
    if not done.files:
        screen.say(
            f"Nothing to add: {out} has all these files already, those among them that could not be read, too; to try those again, "
            "embed everything anew, without --append."
        )
        return
    screen.say(f"{done.read} features of {done.width} numbers, by {opened.name}, model {opened.id[:12]}")
    _tell(done)


def _settings(batch_size: int | None, workers: int | None, upright: bool | None, draft: bool) -> "Settings":
    from squeezevit.embed import Settings

    return Settings(batch_size, workers, upright, draft)


def _cluster(
    where: str, ray: str | None, actors: int | None, device: str, threads: int | None, shard: int, patience: float,
    column: str | None, names: str | None, streams: int | None,
) -> "Cluster | None":  # fmt: skip
    """Ray as asked for; None where the job runs in this process, which knows none of these options."""
    from squeezevit.scale import Cluster

    if where not in ("here", "ray"):
        raise ConfigError(f"--engine-on {where!r} is not known; choose here or ray")
    asked = Cluster(ray, actors, device, threads, shard, patience, column, names)
    if where == "ray":
        if streams is not None:
            raise ConfigError(f"--streams {streams} is of runs in this process; leave it out, or --engine-on ray")
        return asked
    usual = Cluster(threads=threads)
    for name in ("address", "actors", "device", "shard", "patience", "column", "names"):
        if getattr(asked, name) != getattr(usual, name):
            option = "ray" if name == "address" else name
            raise ConfigError(f"--{option} {getattr(asked, name)} is of runs on Ray; add --engine-on ray, or leave it out")
    return None


def _tell_outcome(done: "Outcome") -> None:
    for row in done.failed[:5]:
        screen.note(f"{row['status']}: {row['file']}: {row['reason']}")
    failed = done.rows - done.ok
    if failed > 5:
        screen.note(f"{failed} photographs have no answer; the column reason of {done.out} tells of each")
    before = f", {done.rows - done.new_rows} of them before" if done.rows > done.new_rows else ""
    spent = f"; {done.seconds:.1f} s, of which {done.starting:.1f} s until the first answers" if done.new_rows else ""
    screen.say(
        f"{done.rows} photographs{before}, {failed} without an answer, by {done.engine}, model {done.model[:12]}{spent}\n"
        f"Table: {done.out}, {done.shards} shards"
    )


def _named(row: dict) -> tuple[str, str]:
    return (row["top"][0][0], f"{100 * row['top'][0][1]:.1f} %") if row.get("top") else (f"({row['status']})", "")


def _tell(done: "Done") -> None:
    for row in done.failed[:5]:
        screen.note(f"{row['status']}: {row['file']}: {row['reason']}")
    failed = done.files - done.read
    if failed > 5:
        screen.note(f"and {failed - 5} more such files; {done.out[-1]} lists them all")
    resumed = f", {done.resumed} of them before it was interrupted" if done.resumed else ""
    screen.say(
        f"{done.files} files{resumed}, {failed} without an answer; {done.images_per_second:.1f} images/s\n"
        f"Table: {'   '.join(map(str, done.out))}"
    )


@contextmanager
def _going_on() -> Iterator[None]:
    """What is done stays, and people are told."""
    try:
        yield
    except KeyboardInterrupt:
        screen.note("interrupted; what is done is kept, and the same command goes on from there")
        raise


@contextmanager
def _counted() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar with images a second and the time left; without a terminal a line now and then."""
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        console=screen.errors, transient=True, disable=not screen.errors.is_terminal,
    )  # fmt: skip
    began, first, said = time.monotonic(), None, time.monotonic()
    with bar:
        task = bar.add_task("opening the model", total=None, rate="")

        def report(what: str, done: int, total: int | None) -> None:
            nonlocal began, first, said
            if first is None:
                began, first = time.monotonic(), done
            rate = (done - first) / max(time.monotonic() - began, 1e-9)
            left = f", {timedelta(seconds=round((total - done) / rate))} left" if rate and total is not None else ""
            speed = f"{rate:.1f} images/s{left}" if rate else ""
            bar.update(task, description=what, completed=done, total=total, rate=speed)
            if not screen.errors.is_terminal and (done == total or time.monotonic() - said > screen.EVERY):
                said = time.monotonic()
                counted = f"{done}, {speed}" if total is None else f"{done} of {total}, {speed}"
                screen.errors.print(screen.clean(f"{what}: {'done' if done == total else counted}"))

        yield report
