"""`squeezevit search`: the photographs of a table that are nearest to one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squeezevit.cli import inputs, screen
from squeezevit.errors import SqueezeViTError

if TYPE_CHECKING:
    from PIL import Image

TableName = Annotated[
    str, typer.Argument(metavar="TABLE", help="Table of features that embed wrote: a folder of shards, a .parquet or an .npy.")
]
Asked = Annotated[list[str], typer.Option("--image", help="Photograph to search for; may be repeated.", show_default=False)]
Bundle = Annotated[
    Path | None,
    typer.Option("--from", help="Bundle that the table was made with.", file_okay=False, show_default="where the table says"),
]
Count = Annotated[int, typer.Option("--top-k", help="Nearest photographs.", min=1, max=10_000)]
Page = Annotated[Path, typer.Option("--out", help="Page to write, with the pictures.", dir_okay=False)]


def search(table: TableName, image: Asked, bundle: Bundle = None, top_k: Count = 12, out: Page = Path("search.html")) -> None:
    """The photographs of a table that are nearest to one, by the cosine of their features, with a page of pictures.

    Every row is compared, shard by shard, so that the answer is exact and memory is that of one shard.
    """
    from squeezevit.report.neighbours import write_neighbours
    from squeezevit.scale import search as job

    inputs.make_folder(out.parent, "--out")
    told = job.about(table)
    engine = job.questioner(told, bundle)
    hits = job.nearest(table, job.features(image, engine, told), top_k)
    for asked, found in zip(image, hits, strict=True):
        rows = [(str(i), hit.file, f"{hit.similarity:.4f}") for i, hit in enumerate(found, 1)]
        screen.table([(f, n, s) for n, f, s in rows], ("photograph",), ("rank", "cosine"), f"nearest to {asked}")
    answers = [(asked, [(hit.file, hit.similarity) for hit in found]) for asked, found in zip(image, hits, strict=True)]
    about = f"{table}: model {engine.id[:12]} by {engine.name}; the numbers are cosines of features."
    write_neighbours(f"The nearest of {table}", about, answers, _asked, partial(_look, told), out)
    screen.say(f"Page: {out}")


def _look(told: dict[str, Any], name: str) -> "Image.Image | str":
    """A photograph by the name that it has in the table."""
    from squeezevit.scale.reading import content_of
    from squeezevit.scale.sources import Source

    return _shown(lambda: content_of(name, Source(**told["source"]) if "source" in told else Source("files")))


def _asked(address: str) -> "Image.Image | str":
    """A photograph that is asked about, read as its features were: from here."""
    from squeezevit.scale import stores

    return _shown(lambda: (address, stores.read(address) if "://" in address else None))


def _shown(read: Callable[[], tuple[str, bytes | None]]) -> "Image.Image | str":
    from squeezevit.data.folder import decoding, image_or_reason

    try:
        path, content = read()
    except (OSError, SqueezeViTError) as error:
        return f"cannot be shown: {error}"
    with decoding():
        return image_or_reason(path, True, 280, content)
