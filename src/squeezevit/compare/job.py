"""Measuring every method on one model and its images: fidelity, accuracy where labels are known, time at some batch sizes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from squeezevit.bench.machine import header
from squeezevit.bench.run import Speed, measure
from squeezevit.budget.plan import plan_macs
from squeezevit.compare.ranks import ranks
from squeezevit.core.attach import reduce_as_needed_, restore_
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import Progress, embedded
from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.reducers import Identity
from squeezevit.reducers.catalog import Method, label_of, method, methods

Size = int | tuple[int, int] | None
Answer = Callable[[np.ndarray], np.ndarray]  # outputs [n, C] -> a class each, [n]


@dataclass(frozen=True)
class Asked:
    """What is compared: methods of the catalogue at shares of the unreduced model's multiply-adds, timed at some batch sizes.

    methods: () means all that need no training. Raises ConfigError for what is unknown, has to be trained, or is no share.
    """

    methods: tuple[str, ...] = ()
    shares: tuple[float, ...] = (0.65, 0.5, 0.35)
    batch_sizes: tuple[int, ...] = (1, 16)
    rounds: int = 7
    rows: tuple[Method, ...] = field(init=False)

    def __post_init__(self) -> None:
        wanted = [method(name) for name in self.methods] or [row for row in methods().values() if not row.learns]
        rows = {row.name: row for row in wanted if row.name != "identity"}
        if not rows:
            raise ConfigError(f"methods={self.methods!r} leaves nothing to compare; name some, or none for all")
        for name, row in rows.items():
            if row.learns:
                raise ConfigError(f"{name} scores by heads that are learned, and nothing is trained here; leave it out")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise ConfigError(f"shares={self.shares} of the multiply-adds: give numbers between 0 and 1, as 0.5")
        if not self.batch_sizes or min(self.batch_sizes) < 1 or self.rounds < 1:
            raise ConfigError(f"batch_sizes={self.batch_sizes}, rounds={self.rounds}: give numbers of 1 or more")
        object.__setattr__(self, "rows", tuple(rows.values()))


@dataclass(frozen=True)
class Point:
    """A method at a share of the multiply-adds; share None: the model's own reducer."""

    name: str
    label: str
    share: float | None
    reducer: Reducer


def compare(
    model: nn.Module,
    batches: Sequence[Tensor],
    asked: Asked,
    labels: np.ndarray | None = None,
    answer: Answer | None = None,
    image_size: Size = None,
    own: Reducer | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """A row for the unreduced model and for each method at each share; the model is left unreduced, in evaluation mode.

    batches: images [b, 3, H, W], on the model's device. labels: of all images [n], where they are known. answer: what the outputs
    say, as `largest` of a classifier's, or a probe's prediction from features. own: a reducer that came with the model.

    `cosine` is that of each image's outputs with the unreduced model's, `same` the share of equal answers, `loss` in accuracy
    against the unreduced model, paired. A method out of reach at a share is in `left_out` with the reason. Ranks are within a
    share: 1 and the number of methods told to be better (`ranks`). Raises ConfigError where all are out of reach, and
    UnsupportedError where the model puts out something else than a row an image.
    """
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (n := sum(map(len, batches)),):
            raise ConfigError(f"labels are {list(labels.shape)} for {n} images; give one for each, [{n}]")
    heads = model._modules.get("token_reducer")  # of the model's own reducer, which ranks as they learned to
    restore_(model.eval())
    points = [Point("identity", method("identity").label, 1.0, Identity())]
    if own is not None:
        points.append(Point("own", f"{label_of(own)} of the bundle", None, own))
    wanted, left_out = [(row, share) for share in asked.shares for row in asked.rows], list[dict[str, Any]]()
    for done, (row, share) in enumerate(wanted):
        progress("solving for equal multiply-adds", done, len(wanted))
        try:
            points.append(Point(row.name, row.label, share, plan_macs(model, row.name, share, image_size=image_size)))
        except (ConfigError, UnsupportedError) as error:  # out of its reach, or not for this model
            left_out.append({"method": row.name, "label": row.label, "share": share, "reason": str(error)})
    if len(left_out) == len(wanted):
        raise ConfigError(f"no method can be compared at {asked.shares} of the multiply-adds: {left_out[0]['reason']}")
    speeds = {size: _speeds(model, points, size, asked, image_size, progress) for size in asked.batch_sizes}
    dense = _outputs(model, batches, str(points[0].label), progress)
    judged = [_Judged.of(dense, dense, labels, answer)]
    for point in points[1:]:
        if heads is not None and point.share is None:
            model.token_reducer = heads
        found = _outputs(reduce_as_needed_(model, point.reducer), batches, f"{point.label} at {point.share or 'its own'}", progress)
        restore_(model)
        judged.append(_Judged.of(found, dense, labels, answer))
    rows = [
        {**_about(point), **one.row(judged[0], answer is not None), **_timed({size: at[i] for size, at in speeds.items()})}
        for i, (point, one) in enumerate(zip(points, judged, strict=True))
    ]
    for share in asked.shares:
        _rank([(row, one) for row, one, p in zip(rows, judged, points, strict=True) if p.share == share and p.name != "identity"])
    settings = {"images": len(dense), "shares": list(asked.shares), "batch_sizes": list(asked.batch_sizes), "rounds": asked.rounds}
    return {**header(str(next(model.parameters()).device)), **settings, "dense": rows[0], "rows": rows[1:], "left_out": left_out}


@dataclass(frozen=True, eq=False)
class _Judged:
    """One reduced model's outputs beside the unreduced model's, a number for each image: [n]."""

    near: np.ndarray  # cosine
    said: np.ndarray  # the classes
    right: np.ndarray | None  # 1 or 0, where labels are known

    @classmethod
    def of(cls, found: np.ndarray, dense: np.ndarray, labels: np.ndarray | None, answer: Answer | None) -> "_Judged":
        """Outputs [n, C] of both."""
        a, b = found.astype(np.float64), dense.astype(np.float64)
        near = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
        said = (answer or largest)(found)
        return cls(near, said, None if labels is None else (said == labels).astype(float))

    def row(self, dense: "_Judged", answers: bool) -> dict[str, Any]:
        out: dict[str, Any] = {"cosine": float(self.near.mean()), "cosine_se": _error(self.near)}
        if answers:
            out["same"] = float((self.said == dense.said).mean())
        if self.right is not None and dense.right is not None:
            lost = dense.right - self.right
            out |= {"accuracy": float(self.right.mean()), "accuracy_se": _error(self.right)}
            out |= {"loss": float(lost.mean()), "loss_se": _error(lost)}
        return out


def largest(outputs: np.ndarray) -> np.ndarray:
    """The class of a classifier's largest output: [n, K] -> [n]."""
    return cast(np.ndarray, outputs.argmax(axis=1))


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _about(point: Point) -> dict[str, Any]:
    about = {"method": point.name, "label": point.label, "share": point.share}
    return {**about, "reducer": point.reducer.setting(), "reducer_full": repr(point.reducer)}


def _speeds(model: nn.Module, points: list[Point], batch: int, asked: Asked, size: Size, progress: Progress) -> list[Speed]:
    told = f"timing at batch {batch}, all methods in turn"
    report = lambda done, total: progress(told, done, total)  # noqa: E731
    return measure(model, [p.reducer for p in points], batch, size, asked.rounds, limits=False, progress=report)


def _timed(speeds: dict[int, Speed]) -> dict[str, Any]:
    first = next(iter(speeds.values()))
    times = {
        str(batch): {"ms": 1e3 / s.images_per_second, "ms_best": 1e3 / s.images_per_second_best, "speedup": s.speedup,
                     "speedup_best": s.speedup_best}
        for batch, s in speeds.items()
    }  # fmt: skip
    return {"macs": first.macs, "macs_share": first.macs_share, "tokens": list(first.tokens), "times": times}


@torch.inference_mode()
def _outputs(model: nn.Module, batches: Sequence[Tensor], what: str, progress: Progress) -> np.ndarray:
    """[n, C]."""
    about, found = description_of(model), list[np.ndarray]()
    runs: Any = about.tower or model
    for batch in batches:
        out = embedded(model, runs(*about.given(batch), **about.named(batch)))
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(batch):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UnsupportedError(
                f"the model puts out {shape} for {len(batch)} images, and not a row for each; give one that pools"
            )
        found.append(out.float().cpu().numpy())
        progress(what, len(found), len(batches))
    return np.concatenate(found)


def _rank(rows: list[tuple[dict[str, Any], _Judged]]) -> None:
    """Write into each row of one share its rank by cosine and, where labels are known, by accuracy."""
    values = {"cosine": {row["method"]: one.near for row, one in rows}}
    if rows and rows[0][1].right is not None:
        values["accuracy"] = {row["method"]: cast(np.ndarray, one.right) for row, one in rows}
    for what, of_method in values.items():
        places = ranks(of_method)
        for row, _ in rows:
            row[f"{what}_rank"] = places[row["method"]]
