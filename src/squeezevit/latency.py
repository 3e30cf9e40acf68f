"""How long a model takes on this device with so many tokens: blocks timed at a few token counts, and what lies between.

The time of a reduced model is the sum of its blocks' halves at the tokens each has, what a stage costs for each token it looks at,
and what is there without any block. Nothing is assumed about the shape of the curve (kernels have steps) but that it does not fall.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from squeezevit.attach import reduce_, restore_
from squeezevit.bench.machine import machine, versions
from squeezevit.bench.run import forward, images, share_weights
from squeezevit.bench.timing import alternate
from squeezevit.families import cut, host_of
from squeezevit.macs import fake_trace
from squeezevit.modes import autocast, evaluation_mode
from squeezevit.reducer import Reducer
from squeezevit.reducers import Identity

_POINTS = 9  # token counts at which a block is timed
_SECONDS = 4.0  # that this may take


@dataclass(frozen=True)
class Profile:
    """What was measured on one device, in seconds. Token counts include the prefix."""

    depth: int
    prefix: int
    tokens: tuple[int, ...]  # ascending; the last is the unreduced count
    attention: tuple[float, ...]  # of one block's attention half at each
    mlp: tuple[float, ...]
    rest: float  # of the unreduced model, without its blocks
    stage: float  # per patch token that comes into a stage

    def seconds(self, reducer: Reducer, at: Sequence[int], counts: Sequence[int]) -> float:
        """Of the model whose stages `at` let `counts[j + 1]` of `counts[j]` patch tokens out."""
        total, left = self.rest, dict(zip(at, counts[1:], strict=True))
        now = counts[0]
        for block in range(self.depth):
            after = left.get(block, now)
            total += self.stage * now if after < now else 0.0
            total += self._at(self.attention, after if reducer.place == "before" else now) + self._at(self.mlp, after)
            now = after
        return total

    def _at(self, seconds: Sequence[float], patches: int) -> float:
        """Between two measured counts the straight line; below the first one in proportion to it."""
        t = patches + self.prefix
        for (a, b), (low, high) in zip(pairwise(self.tokens), pairwise(seconds), strict=True):
            if t <= b:
                return low + (high - low) * (t - a) / (b - a) if t >= a else low
        return seconds[-1]


def profile(
    model: nn.Module, probe: Reducer, batch_size: int, image_size: int | tuple[int, int] | None = None, precision: str = "fp32"
) -> Profile:
    """Time an unreduced model and one of its blocks on its own device, in a few seconds, and what a stage of `probe` costs."""
    h = host_of(restore_(model))
    x = images(model, batch_size, image_size)
    stages = fake_trace(reduce_(model, probe), image_size).stages
    counts = (stages[0].n, *(s.n_out for s in stages))
    restore_(model)
    tokens = tuple(sorted({h.prefix + max(round(counts[0] * i / _POINTS), 1) for i in range(1, _POINTS + 1)}))
    block = h.blocks[len(h.blocks) // 2]
    with evaluation_mode(model):
        dense = forward(model, x, precision)
        cases: dict[Any, Callable[[], Any]] = {"dense": dense}
        for t in tokens:
            cases |= _halves(block, torch.randn(batch_size, t, h.dim, device=x.device, dtype=x.dtype), h.prefix, precision)
        times = _timed(cases, x.device)
        attention = _rising([times.best((t, "attention")) for t in tokens])
        mlp = _rising([times.best((t, "mlp")) for t in tokens])
        rest = max(times.best("dense") - len(h.blocks) * (attention[-1] + mlp[-1]), 0.0)
        found = Profile(len(h.blocks), h.prefix, tokens, attention, mlp, rest, 0.0)
        at = tuple(s.block for s in stages)
        reduce_(model, probe)
        times = _timed({"reduced": forward(model, x, precision)}, x.device)
        restore_(model)
        over = times.best("reduced") - found.seconds(probe, at, counts)
    return replace(found, stage=max(over, 0.0) / sum(counts[:-1]))


def _halves(block: nn.Module, x: Tensor, prefix: int, precision: str) -> dict[Any, Callable[[], Any]]:
    handlers = cut(type(block))
    given = {k: v for k, v in handlers.arguments(block, x[0, prefix:]).items() if isinstance(v, Tensor | tuple)}

    def run(half: Callable[..., Tensor], **options: Any) -> Tensor:
        with torch.inference_mode(), autocast(x.device, precision):
            return half(block, x, **options)

    t = x.shape[1]
    return {(t, "attention"): partial(run, handlers.attn_half, **given), (t, "mlp"): partial(run, handlers.mlp_half)}


def _timed(cases: dict[Any, Callable[[], Any]], device: torch.device) -> Any:
    """As many alternating rounds as fit into the time, at least three."""
    start = time.perf_counter()
    alternate(cases, 1, warmup=0, device=device)
    once = time.perf_counter() - start
    return alternate(cases, max(3, min(50, int(_SECONDS / once))), device=device)


def _rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """More tokens never cost less: noise that says otherwise is taken out from the right."""
    out = list(seconds)
    for i in range(len(out) - 2, -1, -1):
        out[i] = min(out[i], out[i + 1])
    return tuple(out)


def ratio(
    model: nn.Module, reducer: Reducer, batch_size: int, image_size: int | tuple[int, int] | None = None, precision: str = "fp32"
) -> tuple[float, float]:
    """Measured: seconds of the reduced model, and its share of the unreduced one's, alternating. The model is left unreduced."""
    restore_(model.eval())
    x = images(model, batch_size, image_size)
    cases = {r: forward(reduce_(share_weights(model), r), x, precision) for r in (Identity(), reducer)}
    times = _timed(dict(cases), x.device)
    return times.best(reducer), times.best_ratio(reducer, Identity())


def cached_profile(
    model: nn.Module,
    probe: Reducer,
    batch_size: int,
    image_size: int | tuple[int, int] | None = None,
    precision: str = "fp32",
    fresh: bool = False,
) -> Profile:
    """`profile`, kept in a file by model, device, versions and setting; `fresh` measures again."""
    device = next(model.parameters()).device
    shapes = [(name, list(p.shape), str(p.dtype)) for name, p in restore_(model).named_parameters()]
    key: dict[str, Any] = {"model": type(model).__qualname__, "shapes": shapes, "machine": machine(device), "versions": versions()}
    key |= {"probe": repr(probe), "batch_size": batch_size, "image_size": image_size, "precision": precision}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    file = _folder() / f"{name}.json"
    if file.is_file() and not fresh:
        values: dict[str, Any] = json.loads(file.read_text())
        return Profile(**{k: cast(Any, tuple(v) if isinstance(v, list) else v) for k, v in values.items()})
    found = profile(model, probe, batch_size, image_size, precision)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(found)))
    return found


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "squeezevit" / "profiles"
