"""How much of reading photographs hides behind the model in `squeezevit embed`: seconds of either alone, in turn, and together.

python benchmarks/overlap.py        # one reader, one thread for the model: benchmarks/results/overlap.json

Photographs of scikit-image, enlarged to 1600 pixels and saved as JPEG. "reading": with a model that does nothing. "model": on
images that were read before. "in turn": no reader of its own. "together": as `embed` does it. Hidden: the share of the shorter of
reading and model that "together" does not take beside the longer. The first batch is read before the model begins, so that of 6
batches at most 0.83 is hidden. "elsewhere": a model that needs no processor, as on a device of its own, is waited for.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from skimage import data

import squeezevit as sv
from squeezevit.bench.timing import Timings, alternate
from squeezevit.data.folder import read_image
from squeezevit.embed import Engine, Settings, embed, open_engine
from workshop import RESULTS, Sheet, arguments

MODELS = {
    "elsewhere": None,
    "light": ("deit_tiny_patch16_224", 0.35),
    "heavy": ("deit_small_patch16_224", 0.5),
}  # share of multiply-adds
SIDE, BATCH, WAIT = 1600, 2, 0.3  # pixels; images; seconds a batch where the model runs elsewhere


def photographs(folder: Path, count: int) -> list[Path]:
    """Parts of four photographs, no two the same, as a camera saves them."""
    sources = [Image.fromarray(photo) for photo in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())]
    files = []
    for i in range(count):
        source, cut = sources[i % 4], 2 * (i // 4)
        part = source.crop((cut, cut, source.width - cut, source.height - cut))
        files.append(folder / f"{i:03}.jpg")
        part.resize((SIDE, round(SIDE * part.height / part.width)), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def engine_of(name: str, share: float, folder: Path, threads: int) -> Engine:
    """A model at random weights without a classifier, as a bundle that is opened."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    if share < 1:
        sv.reduce_(model, sv.preset("training-free", macs=share, model=model))
    sv.save(model, folder)
    return open_engine(folder, threads=threads)


def wait(images: np.ndarray) -> np.ndarray:
    """What a model on a device of its own is to the processor."""
    time.sleep(WAIT)
    return np.zeros((len(images), 8), np.float32)


def cases(engine: Engine, files: list[Path], out: Path, workers: int, draft: bool) -> dict[str, Callable[[], object]]:
    images = np.stack([engine.card.preprocessing(read_image(str(file))) for file in files])
    idle = replace(engine, call=lambda x: np.zeros((len(x), 8), np.float32))

    def run(by: Engine, workers: int) -> None:
        embed([out / "photographs"], by, out / "features.npy", Settings(BATCH, workers, draft=draft))

    def model() -> None:
        for part in np.split(images, range(BATCH, len(images), BATCH)):
            engine.run(part)

    return {
        "reading": lambda: run(idle, 0),
        "model": model,
        "in turn": lambda: run(engine, 0),
        "together": lambda: run(engine, workers),
    }


def hidden(times: Timings[str]) -> float:
    """Median over rounds, in each of which all saw the same machine."""
    rounds = zip(*(times.seconds[name] for name in ("reading", "model", "together")), strict=True)
    return statistics.median((reading + model - together) / min(reading, model) for reading, model, together in rounds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--count", type=int, default=12, help="photographs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--workers", type=int, default=1, help="threads that read")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--json", type=Path, default=RESULTS / "overlap.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sheet = Sheet(args.json, pixels=SIDE, batch_size=BATCH, count=args.count, rounds=args.rounds, workers=args.workers)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "photographs").mkdir()
        files = photographs(root / "photographs", args.count)
        for name in args.models:
            model, share = MODELS[name] or MODELS["light"]
            engine = engine_of(model, share, root / name, args.threads)
            engine = engine if MODELS[name] else replace(engine, call=wait)
            for draft in (False, True):
                times = alternate(cases(engine, files, root, args.workers, draft), args.rounds)
                seconds = {case: {"min": times.best(case), "median": times.median(case)} for case in times.seconds}
                row = {"case": f"{name}{', draft' if draft else ''}", "model": model, "macs_share": share, "draft": draft}
                row |= {} if MODELS[name] else {"model": f"{WAIT} s a batch", "macs_share": None}
                row |= {"seconds": seconds, "hidden": hidden(times), "together to in turn": times.ratio("together", "in turn")}
                told = ", ".join(f"{case} {s['min']:.2f} ({s['median']:.2f})" for case, s in seconds.items())
                sheet.add(row, f"{row['case']}: {told}; hidden {row['hidden']:.2f}, to in turn {row['together to in turn']:.2f}")
    sheet.save()


if __name__ == "__main__":
    main()
