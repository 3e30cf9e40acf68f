"""Top-1 and top-5 of a model on a folder of photographs, and how fast."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from squeezevit.core.running import autocast, evaluation_mode, wait_for
from squeezevit.data.folder import WORKERS_REMEDY, Batches, UnreadableImage, reading
from squeezevit.errors import ConfigError, DataError


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured; `dataclasses.asdict` of it is ready for JSON.

    `top1` and `top5` are fractions of the readable images, the `_error`s their standard errors sqrt(p (1 - p) / n).
    With fewer than 5 classes `top5` counts the best `k`. `nonfinite` images had a NaN or infinite logit and count as
    wrong. `images_per_second` is end to end, reading included. `compute_images_per_second` is the model alone, images
    already on the device; the first batch runs once before, untimed. `unread`
    counts by suffix the files that were not even tried, as .heic without pillow-heif.
    """

    images: int
    classes: int
    top1: float
    top1_error: float
    top5: float
    top5_error: float
    k: int
    nonfinite: int
    unreadable: tuple[UnreadableImage, ...]
    seconds: float
    images_per_second: float
    compute_images_per_second: float
    device: str
    precision: str
    unread: dict[str, int]


@dataclass
class _Tally:
    top1: int = 0
    top5: int = 0
    images: int = 0
    nonfinite: int = 0

    def add(self, logits: Tensor, labels: Tensor, k: int) -> None:
        finite = logits.isfinite().all(dim=1)
        hits = (logits.float().topk(k, dim=1).indices == labels[:, None]) & finite[:, None]  # [b, k]
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.images += len(labels)
        self.nonfinite += int((~finite).sum())


def evaluate(
    model: nn.Module,
    batches: Batches,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Scores `model` on every readable image.

    The model is moved to `device` (None: where it is) and evaluated in eval mode, which is undone afterwards; "bf16"
    and "fp16" are autocast over its float32 weights. `progress(done, total)` counts files, unreadable ones included.

    Raises DataError where the number of classes is not the model's or no image at all can be read, ConfigError for an
    unknown precision or device.

    >>> result = evaluate(model, load("imagenet", model))  # doctest: +SKIP
    >>> print(f"{result.top1:.1%} +- {result.top1_error:.1%}, {len(result.unreadable)} unreadable")  # doctest: +SKIP
    """
    autocast("cpu", precision)  # an unknown precision is an error now, not after the first batch is read
    batches.dataset.check_classes(model)
    device = _place(model, device)
    total, done, tally, timings = len(batches.dataset), 0, _Tally(), list[tuple[int, float]]()
    k, unused = min(5, len(batches.dataset.classes)), 0.0
    start = time.perf_counter()
    died = reading(batches.dataset.folder, WORKERS_REMEDY)  # may be told while the model computes
    with died, torch.inference_mode(), evaluation_mode(model):
        for batch in batches:
            if not timings and len(batch.labels):
                _, unused = _timed_forward(model, batch.images.to(device), precision)  # what runs first is slow, for any model
            logits, seconds = _timed_forward(model, batch.images.to(device), precision)
            batches.dataset.check_outputs(_outputs(logits))
            tally.add(logits.cpu(), batch.labels, k)
            timings.append((len(batch.labels), seconds))
            done = tally.images + len(batches.unreadable)
            if progress:
                progress(done, total)
    elapsed = time.perf_counter() - start - unused
    if tally.images == 0:
        first = batches.unreadable[0]
        raise DataError(f"none of the {total} images of {batches.dataset.folder} is readable; {first.path}: {first.reason}")
    if progress and done < total:
        progress(total, total)  # the last batch had nothing readable in it
    return EvalResult(
        images=tally.images,
        classes=len(batches.dataset.classes),
        top1=tally.top1 / tally.images,
        top1_error=_standard_error(tally.top1, tally.images),
        top5=tally.top5 / tally.images,
        top5_error=_standard_error(tally.top5, tally.images),
        k=k,
        nonfinite=tally.nonfinite,
        unreadable=tuple(batches.unreadable),
        seconds=elapsed,
        images_per_second=tally.images / elapsed,
        compute_images_per_second=sum(n for n, _ in timings) / sum(seconds for _, seconds in timings),
        device=str(device),
        precision=precision,
        unread=dict(batches.dataset.unread),
    )


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    if str(device) == "meta":
        raise ConfigError("device='meta' computes nothing: choose cpu or cuda")
    try:
        place = torch.device(device)
        model.to(place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={str(device)!r} cannot be used ({reason}): choose cpu, or cuda on a machine that has it"
        ) from error
    return place


def _timed_forward(model: nn.Module, images: Tensor, precision: str) -> tuple[Tensor, float]:
    wait_for(images.device)
    start = time.perf_counter()
    with autocast(images.device, precision):
        out = model(images)
    wait_for(images.device)
    return getattr(out, "logits", out), time.perf_counter() - start


def _outputs(logits: Tensor) -> int:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"the model returns {what}, not logits [images, classes]: evaluate a classifier")
    return logits.shape[1]


def _standard_error(hits: int, n: int) -> float:
    p = hits / n
    return math.sqrt(p * (1 - p) / n)
