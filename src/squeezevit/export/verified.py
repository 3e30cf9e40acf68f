"""What was written against the model it was made of: numbers, decisions, and speed on this machine."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from squeezevit.bench.timing import Timings, alternate
from squeezevit.core.attach import restore_
from squeezevit.core.running import Progress
from squeezevit.errors import UnsupportedError
from squeezevit.export.engines import Run
from squeezevit.export.graph import Exportable

TOLERANCE = 1e-4  # of the largest output
ROUNDS = 5


def padded(images: np.ndarray, batch: int | None) -> np.ndarray:
    """Images [b, ...] with the last one repeated -> [batch, ...]; as they are where any number fits."""
    lacking = 0 if batch is None else batch - len(images)
    return np.concatenate([images, np.repeat(images[-1:], lacking, 0)]) if lacking > 0 else images


def fillings(batch: int | None) -> list[int]:
    """How many images are given at once to see that each number works."""
    return [1, 2, 5] if batch is None else sorted({1, max(batch // 2, 1), batch})


def expected(module: Exportable, x: Tensor) -> list[np.ndarray]:
    with torch.inference_mode():
        return [out.float().numpy() if out.is_floating_point() else out.numpy() for out in module(x)]


def agree(module: Exportable, run: Run, x: Tensor, batch: int | None) -> dict[str, Any]:
    """Hold the model's outputs for each filling against torch's, to `TOLERANCE`.

    An image that torch itself answers otherwise when its pixels change by one in a million lies on a tie, and is left out; at most
    a quarter may be. Returns {"error", "images", "ties"}. Raises UnsupportedError where the outputs differ.
    """
    worst, seen, ties = 0.0, 0, 0
    for n in fillings(batch):
        given = x[:n]
        right = expected(module, given)
        found = [out[:n] for out in run(padded(given.numpy(), batch))]
        errors = _errors(found, right)
        wrong = errors > TOLERANCE
        if wrong.any():
            tied = wrong & _tied(module, given, right)
            ties += int(tied.sum())
            wrong &= ~tied
            errors[tied] = 0
        if wrong.any():
            raise UnsupportedError(
                f"the written model gives other numbers than torch: {errors.max():.2g} of the largest output for "
                f"{int(wrong.sum())} of {n} images, at most {TOLERANCE:g} is rounding. Its runtime gets something of this model "
                "wrong: take another format, batch_size=None (--batch-size 0), scatter=False (--no-scatter), or another reducer"
            )
        worst, seen = max(worst, float(errors.max())), seen + n
    if 4 * ties > seen:
        raise UnsupportedError(
            f"{ties} of {seen} images lie on ties, where rounding decides; export a trained model, or give real photographs"
        )
    return {"error": worst, "images": seen, "ties": ties}


def _errors(found: list[np.ndarray], right: list[np.ndarray]) -> np.ndarray:
    """The largest error of each image, as a share of the largest output; 1 where the number of its groups differ: [B]."""
    total = np.zeros(len(right[0]))
    for a, b in zip(found, right, strict=True):
        if a.shape != b.shape:
            raise UnsupportedError(f"the written model puts out {a.shape}, torch {b.shape}; take another format")
        apart = np.abs(a.astype(np.float64) - b).reshape(len(b), -1).max(1)
        scale = max(float(np.abs(b).max()), 1e-12) if b.dtype.kind == "f" else 1
        total = np.maximum(total, np.nan_to_num(apart / scale, nan=np.inf))
    return total


def _tied(module: Exportable, x: Tensor, right: list[np.ndarray]) -> np.ndarray:
    """Which images torch itself answers otherwise after a change of their pixels as small as rounding: [B] bool."""
    generator = torch.Generator().manual_seed(0)
    moved = [x * (1 + 1e-6 * torch.randn(x.shape, generator=generator)) for _ in range(4)]
    return np.any([_errors(expected(module, m), right) > TOLERANCE for m in moved], axis=0)


def close(module: Exportable, run: Run, x: Tensor, batch: int | None, floor: float) -> dict[str, Any]:
    """Hold a model of fewer bits against torch: cosine of each image's outputs, and how often the largest is the same.

    Returns {"cosine", "lowest_cosine", "agreement", "images"}, and of a model that puts out groups {"groups"}, the share of patches
    that end in the same token. Raises UnsupportedError where the mean cosine is below the floor.
    """
    size = batch or 16
    out = [[part[: len(images)] for part in run(padded(images.numpy(), batch))] for images in x.split(size)]
    told = [expected(module, images) for images in x.split(size)]
    (found, *others), (right, *true) = ([np.concatenate(parts) for parts in zip(*each, strict=True)] for each in (out, told))
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (found, right))
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    figures = {
        "cosine": float(cosine.mean()), "lowest_cosine": float(cosine.min()),
        "agreement": float((a.argmax(1) == b.argmax(1)).mean()), "images": len(x),
    }  # fmt: skip
    if module.groups:
        figures["groups"] = float(np.mean([np.mean(mine == its) for mine, its in zip(others, true, strict=True)]))
    if not figures["cosine"] >= floor:
        raise UnsupportedError(
            f"on {len(x)} images that were not calibrated on the mean cosine to torch is {figures['cosine']:.3f} (lowest "
            f"{figures['lowest_cosine']:.3f}), the largest output is the same for {figures['agreement']:.0%}, and floor={floor:g}; "
            "calibrate on more photographs, of the kind the model will see, reduce less, leave int8 out, or set a lower floor"
        )
    return figures


def speed(module: Exportable, run: Run, x: Tensor, progress: Progress) -> dict[str, Any]:
    """Seconds a batch of torch unreduced, torch reduced and the written model, alternating; and how many times as fast it is."""
    dense, images = Exportable(module.model), x.numpy()
    restore_(dense.model)
    cases = {
        "torch_unreduced": lambda: expected(dense, x), "torch": lambda: expected(module, x), "exported": lambda: run(images)
    }  # fmt: skip
    times: Timings[str] = alternate(cases, ROUNDS, progress=lambda done, all_: progress("timing", done, all_))
    seconds = {name: {"min": times.best(name), "median": times.median(name)} for name in cases}
    return {
        "batch": len(x), "threads": torch.get_num_threads(), "rounds": ROUNDS, "seconds": seconds,
        "speedup": times.ratio("torch_unreduced", "exported"), "speedup_best": times.best_ratio("torch_unreduced", "exported"),
        "images_per_second": len(x) / times.median("exported"),
    }  # fmt: skip


def spread(images: Iterable[Tensor], count: int) -> Tensor:
    """So many of the images, again from the first where there are fewer: [count, 3, H, W]."""
    there = list(images)
    return torch.stack([there[i % len(there)] for i in range(count)])
