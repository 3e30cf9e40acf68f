"""`squeezevit predict` and `squeezevit embed`: folders of photographs through a bundle."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from squeezevit.cli import options, screen

if TYPE_CHECKING:
    from squeezevit.embed import Done, Settings

BundleFolder = Annotated[
    Path, typer.Option("--from", help="Bundle: a folder that train, export or sv.save wrote.", file_okay=False, show_default=False)
]
Predictions = Annotated[Path, typer.Option(help="Table to write; it ends in .csv, .json or .parquet.", dir_okay=False)]
Features = Annotated[
    Path,
    typer.Option(
        "--out",
        help="Table to write; it ends in .parquet, or in .npy, beside which stand .names.txt and .about.json.",
        dir_okay=False,
        show_default=False,
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", help="torch or compiled for a bundle of torch.", show_default="what the bundle was exported to"),
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
TopK = Annotated[int, typer.Option("--top-k", help="Likeliest classes a photograph.", min=1, max=1_000_000)]
Append = Annotated[bool, typer.Option("--append", help="Add to the table that is there, of the same model, what is not yet in it.")]


def predict(
    images: options.Images,
    bundle: BundleFolder,
    out: Predictions = Path("predictions.csv"),
    top_k: TopK = 5,
    engine: EngineName = None,
    batch_size: Size = None,
    workers: Readers = None,
    threads: Threads = None,
    upright: Turned = None,
    draft: Draft = False,
) -> None:
    """The classes of photographs, by the model of a bundle: a table of the likeliest ones and their probabilities.

    Files that cannot be read are listed in the table with the reason, and never end the run. A run that was interrupted goes on by
    the same command, and gives the same table.
    """
    from squeezevit import embed as job

    settings = _settings(batch_size, workers, upright, draft)
    with _going_on(), _counted() as report:
        opened = job.open_engine(bundle, engine, threads)
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
    images: options.Images,
    bundle: BundleFolder,
    out: Features,
    append: Append = False,
    engine: EngineName = None,
    batch_size: Size = None,
    workers: Readers = None,
    threads: Threads = None,
    upright: Turned = None,
    draft: Draft = False,
) -> None:
    """The features of photographs, by the model of a bundle: what goes into its classifier, or what a model without one puts out.

    The table keeps the model's id, as features of two models, or of two exports of one, do not compare. A run that was interrupted
    goes on by the same command, and gives the same table.
    """
    from squeezevit import embed as job

    settings = _settings(batch_size, workers, upright, draft)
    with _going_on(), _counted() as report:
        opened = job.open_engine(bundle, engine, threads, features=True)
        done = job.embed(images, opened, out, settings, append, report)
    if not done.files:
        screen.say(f"Nothing to add: {out} has all these files already.")
        return
    screen.say(f"{done.read} features of {done.width} numbers, by {opened.name}, model {opened.id[:12]}")
    _tell(done)


def _settings(batch_size: int | None, workers: int | None, upright: bool | None, draft: bool) -> "Settings":
    from squeezevit.embed import Settings

    return Settings(batch_size, workers, upright, draft)


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
def _counted() -> Iterator[screen.Report]:
    """A bar with images a second and the time left; without a terminal a line now and then."""
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        console=screen.errors, transient=True, disable=not screen.errors.is_terminal,
    )  # fmt: skip
    began, first, said = time.monotonic(), None, time.monotonic()
    with bar:
        task = bar.add_task("opening the model", total=None, rate="")

        def report(what: str, done: int, total: int) -> None:
            nonlocal began, first, said
            if first is None:
                began, first = time.monotonic(), done
            rate = (done - first) / max(time.monotonic() - began, 1e-9)
            left = f"{rate:.1f} images/s, {timedelta(seconds=round((total - done) / rate))} left" if rate else ""
            bar.update(task, description=what, completed=done, total=total, rate=left)
            if not screen.errors.is_terminal and (done == total or time.monotonic() - said > screen.EVERY):
                said = time.monotonic()
                screen.errors.print(screen.clean(f"{what}: {'done' if done == total else f'{done} of {total}, {left}'}"))

        yield report
