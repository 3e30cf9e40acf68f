"""`squeezevit compare`: every method on the user's own model and images."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from squeezevit.cli import inputs, options, screen
from squeezevit.errors import ConfigError

Pictures = Annotated[
    Path, typer.Option("--data", help="Photographs at any depth; VAL/<class>/* are labelled where the model has these classes.")
]
Shares = Annotated[str, typer.Option("--macs", metavar="SHARE,...", help="Budgets: shares of the unreduced model's multiply-adds.")]
Batches = Annotated[str, typer.Option("--batch-sizes", metavar="INTEGER,...", help="Batch sizes that are timed.")]
Chosen = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="Methods, separated by commas.", show_default="all that need no training"),
]
Most = Annotated[int, typer.Option("--images", help="At most so many images, spread over the folder.", min=2, max=1_000_000)]
Folder = Annotated[Path, typer.Option("--out", help="Folder for compare.html and compare.json.", file_okay=False)]


def compare(
    data: Pictures,
    source: options.Source = None,
    model: options.OptionalModel = None,
    pretrained: options.Pretrained = False,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    macs: Shares = "0.65,0.5,0.35",
    methods: Chosen = None,
    images: Most = 400,
    batch_sizes: Batches = "1,16",
    rounds: options.Rounds = 7,
    classes: options.Classes = None,
    upright: options.Upright = True,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    out: Folder = Path("compare-out"),
) -> None:
    """Every method at equal multiply-adds on your own model and photographs: what stays near, what is right, what is fast.

    Writes a page with a table that sorts and charts against measured time, and all numbers beside it. Nothing is trained.
    """
    import torch

    from squeezevit.bench.machine import write_json
    from squeezevit.compare import Asked, largest, write_page
    from squeezevit.compare import compare as job
    from squeezevit.data.models import to_device

    named = () if methods is None else tuple(options.listed(methods, "--methods"))
    asked = Asked(named, tuple(options.ratios(macs, "--macs")), _numbers(batch_sizes), rounds)
    inputs.make_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = inputs.Wanted(source, model, pretrained, checkpoint, None, None, num_classes=num_classes, image_size=image_size)
    ready = inputs.ready(replace(wanted, usual=("identity", "1")))
    size = image_size if ready.card is None else ready.card.preprocessing.crop
    with screen.steps() as report:
        found = inputs.pictures(ready, data, image_size, images, classes, upright, report)
        net = to_device(ready.net, device)
        batches = [batch.to(device) for batch in found.images.split(16)]
        own = ready.reducer if source is not None and ready.reducer.stages(10**6) else None
        results = job(net, batches, asked, found.labels, largest if found.answers else None, size, own, report)
    results = {**results, "model": ready.name, "data": str(data), "unreadable": found.unreadable}
    screen.print_comparison(results)
    for one in results["left_out"]:
        screen.note(f"{one['label']} at {one['share']:.0%} is left out: {one['reason']}")
    screen.list_unreadable(found.unreadable)
    write_json(out / "compare.json", results)
    write_page(results, out / "compare.html", f"{ready.name}, {results['images']:,} images of {data}")
    screen.say(f"\nPage: {out / 'compare.html'}   all numbers: {out / 'compare.json'}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in options.listed(text, "--batch-sizes"))
    except ValueError as error:
        raise ConfigError(f"--batch-sizes {text!r} is not a list of whole numbers, as 1,16") from error
