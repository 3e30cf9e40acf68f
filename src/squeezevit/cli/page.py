"""`squeezevit page`: a static page on which visitors watch a model's tokens being reduced, in their own browsers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squeezevit.cli import inputs, options, screen
from squeezevit.errors import ConfigError

if TYPE_CHECKING:
    from squeezevit.bundle import Card

Out = Annotated[Path, typer.Option("--out", help="Folder to write; an older page is replaced whole.", file_okay=False)]
Shares = Annotated[
    str | None,
    typer.Option(
        "--macs",
        metavar="SHARE,...",
        help="Stops of the slider: shares of the unreduced model's multiply-adds, separated by commas.",
        show_default="80%,65%,50%,35%,25%",
    ),
]
Bits = Annotated[str, typer.Option("--precision", metavar="int8|fp32", help="What linear layers compute in, in the browser.")]
Pictures = Annotated[
    Path | None,
    typer.Option(help="Folder of photographs to offer; the first 8 are taken.", file_okay=False, show_default="scikit-image's"),
]
Archive = Annotated[
    Path | None,
    typer.Option(
        "--runtime", help="The npm package onnxruntime-web as npm pack writes it.", dir_okay=False, show_default="fetched by npm"
    ),
]
_MOST = 8  # photographs to choose from


def page(
    source: options.Source = None,
    out: Out = Path("site"),
    methods: options.MethodList = "training-free,topk,tome",
    macs: Shares = None,
    image_size: options.ImageSize = None,
    precision: Bits = "int8",
    photographs: Pictures = None,
    runtime: Archive = None,
    json_file: options.Json = None,
) -> None:
    """Write a static page on which visitors watch the tokens of their photographs being reduced, in their own browsers.

    The model is that of a bundle, or the demo's DINOv2 ViT-S/14. An unreduced one is shown under each method at each share; one
    with a reducer under its own, beside the others at the same cost. Any static server serves the folder.
    """
    from squeezevit.page.job import Wanted, build

    inputs.check_json(json_file)
    rows = inputs.methods_named(methods)
    shares = None if macs is None else tuple(options.ratios(macs, "--macs"))
    pictures = None if photographs is None else tuple(inputs.photographs([photographs])[:_MOST])
    wanted = Wanted(tuple(row.name for row in rows), shares, precision, pictures, runtime)
    net, card, title = _model(source, image_size)
    if card.reducer is not None and macs is not None:
        raise ConfigError(f"--macs {macs}: the bundle brings its reducer, and the others cost what it costs; leave --macs out")
    with screen.steps() as report:
        manifest = build(net, card, out, wanted, title, report)
    _tell(out, manifest)
    inputs.write_json(json_file, manifest)


def _model(source: Path | None, image_size: int | None) -> "tuple[Any, Card, str]":
    """A model, its card, and what the page calls it."""
    from squeezevit.bundle import card_of

    if source is None:
        net = inputs.create(inputs.DEMO, False, None, image_size)
        return net, card_of(net, image_size=image_size), "DINOv2 ViT-S/14"
    net, card = inputs.opened(source, inputs.Wanted(source, image_size=image_size))
    return net, card, str(card.host.get("name", card.host["library"]))


def _tell(out: Path, manifest: dict[str, Any]) -> None:
    rows = [(g["method"], f"{100 * g['macs']:.1f}", _counts(g), f"{g['error']:.0e}") for g in manifest["graphs"]]
    screen.table(
        rows,
        ("method",),
        ("% of the multiply-adds", "patch tokens", "largest difference from torch"),
        title=f"{manifest['title']}, {manifest['precision']}, {manifest['weights']['bytes'] / 1e6:.0f} MB of weights for all",
    )
    if manifest["precision"] == "int8":
        screen.say(f"int8, unreduced: mean cosine to torch on the photographs {manifest['dense']['nearness']:.4f}")
    screen.say(f"\nWritten: {out}   look at it: python -m http.server --directory {out}, then http://localhost:8000")


def _counts(graph: dict[str, Any]) -> str:
    """Patch tokens at first and after each stage, without those in the middle where there are many."""
    counts = [graph["patches"], *graph["counts"]]
    return " ".join(map(str, counts)) if len(counts) < 7 else f"{counts[0]} {counts[1]} ... {counts[-1]}"
