"""The terminal: what people see. The only place that writes; whatever comes from outside is cleaned and bounded here."""

import io
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from squeezevit.errors import without_middle

if TYPE_CHECKING:
    from squeezevit.train.loop import Update

Report = Callable[[str, int, int], None]  # what is done, steps done, steps in all
MOST_LINES = 14  # of a message: one screen of 80 x 24
LIBRARY = logging.getLogger("squeezevit")
EVERY = 20.0  # seconds between lines of progress where no terminal is there to redraw
# a file has no width to squeeze tables into; brackets and colons mean themselves
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
console = Console(width=None if sys.stdout.isatty() else 160, **_PLAIN)
errors = Console(width=None if sys.stderr.isatty() else 160, stderr=True, **_PLAIN)


def clean(text: str) -> str:
    r"""Text that cannot steer a terminal: what has no shape of its own is written as Python would.

    >>> clean("caf\udce9 \x1b[2J")
    'caf\\udce9 \\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_screen(text: str) -> str:
    """Clean text of a bounded length: what is too long loses its middle."""
    text = without_middle(clean(without_middle(text)))
    lines = text.split("\n")
    if len(lines) <= MOST_LINES:
        return text
    half = MOST_LINES // 2
    return "\n".join([*lines[:half], f"... {len(lines) - 2 * half} more lines ...", *lines[-half:]])


def say(text: str) -> None:
    """A line of results, on standard output."""
    console.print(clean(text))


def verbatim(text: str) -> None:
    """Text that another program may read: not wrapped."""
    console.print(clean(text), end="", soft_wrap=True)


def note(text: str) -> None:
    """What people should know, on standard error."""
    errors.print(Text.assemble(("note: ", "yellow"), one_screen(text)))


def error(text: str) -> None:
    """Why the command ended, whatever was asked of `loudness`."""
    errors.quiet = False
    errors.print(Text.assemble(("error: ", "bold red"), one_screen(text)))


def trace_of(exception: BaseException) -> None:
    """The traceback, for those who asked for it."""
    errors.quiet = False
    errors.print(clean("".join(traceback.format_exception(exception))), soft_wrap=True)


class _Notes(logging.Handler):
    """What is logged, as notes: warnings, and below them what the library says of itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] == LIBRARY.name

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def opened() -> Iterator[None]:
    """Meanwhile logs and warnings are notes, and a character that the terminal lacks is written by its number.

    What `loudness` sets holds until then.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler, root, level = _Notes(), logging.getLogger(), LIBRARY.level
    root.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        try:
            yield
        finally:
            root.removeHandler(handler)
            LIBRARY.setLevel(level)
            errors.quiet = False


def loudness(quiet: bool, verbose: bool) -> None:
    """How much is said besides results and errors. quiet: neither notes nor progress; verbose: also what the library logs."""
    errors.quiet = quiet
    if verbose:
        LIBRARY.setLevel(logging.INFO)


def table(
    rows: Iterable[Sequence[str] | None],
    left: Sequence[str],
    right: Sequence[str] = (),
    title: str | None = None,
    caption: str | None = None,
    ruled: bool = False,
) -> None:
    """A table of texts: first the columns that begin at the left, then those of numbers. A row that is None is a line."""
    drawn = Table(title=title and _text(title), caption=caption and _text(caption), show_lines=ruled)
    for heading in left:
        drawn.add_column(_text(heading), overflow="fold")
    for heading in right:
        drawn.add_column(_text(heading), justify="right")
    for row in rows:
        if row is None:
            drawn.add_section()
        else:
            drawn.add_row(*map(_text, row))
    console.print(drawn)


def _text(text: str) -> Text:
    return Text(clean(text))


@contextmanager
def steps() -> Iterator[Report]:
    """One bar that is renamed as the work goes on; without a terminal a line now and then, and one after each part."""
    said = time.monotonic()
    with _bar() as bar:
        task = bar.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            nonlocal said
            if bar.tasks[0].description != what:
                bar.reset(task, description=what, total=total)
            bar.update(task, completed=done, total=total)
            if not errors.is_terminal and (done == total or time.monotonic() - said > EVERY):
                said = time.monotonic()
                errors.print(clean(f"{what}: {'done' if done == total else f'{done} of {total}'}"))

        yield report


@contextmanager
def training() -> Iterator[Callable[["Update"], None]]:
    """A bar over the whole run with the epoch's means so far, and one line after each epoch."""
    with _bar() as bar:
        task = bar.add_task("starting", total=None)

        def report(p: "Update") -> None:
            parts = " ".join(f"{name} {value:.3g}" for name, value in p.losses.items())
            kept = f"  kept {' '.join(f'{share:.3f}' for share in p.kept)}" if p.kept else ""
            text = clean(f"epoch {p.epoch + 1}/{p.epochs}  {parts}{kept}  {p.images_per_second:.1f} images/s")
            bar.update(task, description=text, total=p.epochs * p.updates, completed=p.epoch * p.updates + p.update)
            if p.row is not None:
                top1, dense = p.row["top1"], p.row["dense_top1"]
                errors.print(f"{text}  top-1 {100 * top1:.2f} %, dense {100 * dense:.2f} %")

        yield report


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=errors, transient=True, disable=not errors.is_terminal,
    )  # fmt: skip


def print_demo(results: dict[str, Any]) -> None:
    from squeezevit.report.findings import coarse, headline

    s, dense = results["settings"], results["dense"]
    rough = coarse(results)
    rows: list[Sequence[str] | None] = []
    target = 1.0
    for row in [dense, *results["rows"]]:
        if row["target"] != target:
            rows.append(None)
            target = row["target"]
        against = "" if row is dense else f"{100 * row['paired_difference']:+.1f} ± {100 * row['paired_difference_se']:.1f}"
        accuracy = (f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}", against)
        judged = (f"{row['cosine']:.3f}", *accuracy) if rough else (*accuracy, f"{row['cosine']:.3f}")
        speed = (f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}x")
        rows.append((row["label"], row["reducer"], *_cost(row), *speed, *judged))
    headings = ("accuracy %", "vs dense, points")
    table(
        rows,
        ("method", "setting"),
        ("GMACs", "% dense", "images/s", "speed-up", *(("feature cosine", *headings) if rough else (*headings, "feature cosine"))),
        f"DINOv2 ViT-S/14, {s['image_size']} px, solar cells: {s['n_train']} to fit the probe, {s['n_test']} to test",
        f"no training after the reduction; ± one standard error; batch {s['batch_size']}, median of {s['rounds']} rounds",
    )
    say(headline(results))


def print_eval(rows: Sequence[dict[str, Any]], reducer: str) -> None:
    table(
        [
            (
                row["method"], *_cost(row), f"{row['compute_images_per_second']:.1f}", f"{row['speedup']:.2f}x",
                *(f"{100 * row[top]:.2f} ± {100 * row[f'{top}_error']:.2f}" for top in ("top1", "top5")),
                str(row["images"]), str(len(row["unreadable"])),
            )
            for row in rows
        ],
        ("model",),
        ("GMACs", "% dense", "images/s", "speed-up", "top-1 %", f"top-{rows[0]['k']} %", "images", "unreadable"),
        reducer,
        "± one standard error; images/s of the model alone",
    )  # fmt: skip
    list_unreadable([f"{image['path']}: {image['reason']}" for image in rows[0]["unreadable"]])


def list_unreadable(images: Sequence[str]) -> None:
    """The first few images that could not be used, each with its reason, and how many more there are."""
    for image in images[:5]:
        note(f"unreadable: {image}")
    if len(images) > 5:
        note(f"and {len(images) - 5} more unreadable images; --json lists them all")


def print_bench(rows: Sequence[dict[str, Any]], setting: dict[str, Any]) -> None:
    machine, versions = setting["machine"], setting["versions"]
    table(
        [_speed(row) for row in rows],
        ("method",),
        ("keep", "GMACs", "% dense", "images/s", "speed-up", "overhead over the limit", "patch tokens"),
        f"{setting['model']}, batch {setting['batch_size']}, {setting['precision']}, {setting['rounds']} rounds",
        f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads; torch {versions['torch']}, "
        f"timm {versions.get('timm', '-')}; each cell: median of rounds (best against best)",
    )


def print_comparison(results: dict[str, Any]) -> None:
    """What `squeezevit.compare` returned: best first within each share."""
    machine, versions, labelled = results["machine"], results["versions"], "accuracy" in results["dense"]
    measure, sizes = "accuracy" if labelled else "cosine", results["batch_sizes"]
    rows: list[Sequence[str] | None] = [_compared(results["dense"], labelled)]
    for share in dict.fromkeys(row["share"] for row in results["rows"]):
        of_share = [row for row in results["rows"] if row["share"] == share]
        rows += [None, *(_compared(row, labelled) for row in sorted(of_share, key=lambda row: -row[measure]))]
    judged = ("accuracy, %", "lost, points", "rank", "cosine", "rank") if labelled else ("cosine", "rank")
    table(
        rows,
        ("method",),
        ("% dense", *judged, *(f"speed-up, batch {size}" for size in sizes)),
        f"{results['model']}, {results['images']} images of {results['data']}, {results['rounds']} rounds",
        f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads; torch {versions['torch']}; ± one standard error; "
        "rank: 1 and the number of methods told to be better (Holm, 5 %); speed-up: median of rounds (best against best)",
    )


def _compared(row: dict[str, Any], labelled: bool) -> tuple[str, ...]:
    dense = row["method"] == "identity"
    right = (
        f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}",
        "" if dense else f"{100 * row['loss']:+.1f} ± {100 * row['loss_se']:.1f}",
        str(row.get("accuracy_rank", "")),
    ) if labelled else ()  # fmt: skip
    near = ("" if dense else f"{row['cosine']:.4f} ± {row['cosine_se']:.4f}", str(row.get("cosine_rank", "")))
    times = (f"{at['speedup']:.2f}x ({at['speedup_best']:.2f}x)" for at in row["times"].values())
    return (row["label"], f"{100 * row['macs_share']:.1f}", *right, *near, *times)


def _speed(row: dict[str, Any]) -> tuple[str, ...]:
    tokens = [str(n) for n in row["tokens"]]
    return (
        row["label"],
        "" if row["method"] == "identity" or row["keep"] is None else f"{row['keep']:g}",
        *_cost(row),
        f"{row['images_per_second']:.1f} ({row['images_per_second_best']:.1f})",
        f"{row['speedup']:.2f}x ({row['speedup_best']:.2f}x)",
        "" if row["overhead"] is None else f"{row['overhead']:.3f} ({row['overhead_best']:.3f})",
        " ".join(tokens) if len(tokens) < 6 else f"{tokens[0]} ... {tokens[-1]}",
    )


def _cost(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['macs'] / 1e9:.2f}", f"{100 * row['macs_share']:.1f}"
