"""How long a model takes on this device with so many tokens: blocks timed at a few token counts, and what lies between.

The time of a reduced model is the sum of its blocks' halves at the tokens each has, what a stage costs for each token it looks at,
and what is there without any block; fitted to the times of the unreduced model and of one reducer. Nothing is assumed about the
shape of the curve (kernels have steps) but that it does not fall.
On a busy machine rounds disagree; they are then measured again, and what never settles is used once and not kept.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from squeezevit.bench.machine import machine, versions
from squeezevit.bench.timing import Timings, alternate
from squeezevit.budget.meter import Meter
from squeezevit.core.attach import reduce_as_needed_
from squeezevit.core.cut import cut
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import Progress, autocast, evaluation_mode, forward, images, share_weights, without_hooks
from squeezevit.reducers import Identity

Name = TypeVar("Name", bound=Hashable)
_POINTS = 9  # token counts at which a block is timed
_SECONDS = 4.0  # that this may take
_PAIRS = 100  # of rounds, at most
_AGREE = 0.3  # by which the best times of two halves of the rounds may differ
_TRIES = 3  # times that rounds are measured until they agree
logger = logging.getLogger(__name__)


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
    spread: float = 0.0  # by how much the two halves of the rounds differed

    def seconds(self, reducer: Reducer, at: Sequence[int], counts: Sequence[int]) -> float:
        """Of the model whose stages `at` let `counts[j + 1]` of `counts[j]` patch tokens out."""
        total, left = self.rest, dict(zip(at, counts[1:], strict=True))
        now = counts[0]
        for block in range(self.depth):
            after = left.get(block, now)
            total += self.stage * now if after < now else 0.0
            total += self._at(self.attention, after if reducer.place == "before" else now)
            total += self._at(self.mlp, now if reducer.place == "after" else after)
            now = after
        return total

    def _at(self, seconds: Sequence[float], patches: int) -> float:
        """Between two measured counts the straight line; below the first one as long as there."""
        t = patches + self.prefix
        for (a, b), (low, high) in zip(pairwise(self.tokens), pairwise(seconds), strict=True):
            if t <= b:
                return low + (high - low) * (t - a) / (b - a) if t >= a else low
        return seconds[-1]


class Clock:
    """How long a model takes with each reducer: by a profile that is measured once and kept in a file.

    probe: the reducer that tells what a stage costs. fresh: measure, whatever the file says.
    """

    def __init__(self, meter: Meter, probe: Reducer, fresh: bool = False, progress: Progress | None = None) -> None:
        self.meter, self.probe, self.progress = meter, probe, progress
        self.own = False  # whether the profile was measured here, and not read
        self.kept = True  # whether the file holds it
        found = None if fresh else _read(self.file, meter)
        if found is None:
            self.measure()
        else:
            self.profile = found

    def measure(self) -> None:
        self.profile = profile(self.meter, self.probe, self.progress)
        self.own, self.kept = True, _keep(self.file, self.profile)

    @cached_property
    def file(self) -> Path:
        """The profile's file, named by model, device, versions and setting."""
        model = self.meter.release()
        shapes = [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
        device = machine(next(model.parameters()).device)
        key = {"model": type(model).__qualname__, "shapes": shapes, "machine": device, "versions": versions()}
        key |= {"probe": repr(self.probe), **asdict(self.meter.setting)}
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
        return _folder() / f"{name}.json"

    @property
    def dense(self) -> float:
        """Seconds of the unreduced model, a batch."""
        return self.profile.seconds(Identity(), (), (self.meter.patches,))

    def seconds(self, reducer: Reducer) -> float:
        """Seconds with a reducer, a batch, as predicted."""
        return self.profile.seconds(reducer, reducer.stages(self.meter.depth), self.meter.counts(reducer))

    @property
    def settled(self) -> bool:
        """Whether the rounds of the profile agree."""
        return self.profile.spread <= _AGREE

    def source(self) -> str:
        """Where the times are from, and how to have others."""
        if not self.settled:
            return (
                f"This machine is busy: its times differed by up to {1 + self.profile.spread:.1f} x from round to round and were "
                "not kept; plan again when it is quiet"
            )
        if not self.kept:
            return "The blocks were timed just now"
        when = "just now and kept" if self.own else "earlier and kept"
        return f"The blocks were timed {when} in {self.file}; fresh=True (--fresh) times them again"


def profile(meter: Meter, probe: Reducer, progress: Progress | None = None) -> Profile:
    """Time an unreduced model and one of its blocks on its own device, in a few seconds, and what a stage of `probe` costs."""
    about, setting = meter.about, meter.setting
    counts, at = meter.counts(probe), probe.stages(meter.depth)
    model = meter.release()
    x = images(model, setting.batch_size, setting.image_size)
    tokens = tuple(sorted({about.prefix + max(round(counts[0] * i / _POINTS), 1) for i in range(1, _POINTS + 1)}))
    block = about.blocks[len(about.blocks) // 2]
    with evaluation_mode(model), without_hooks(model):
        cases: dict[Any, Callable[[], Any]] = {"dense": forward(model, x, setting.precision)}
        cases["reduced"] = forward(reduce_as_needed_(share_weights(model), probe), x, setting.precision)
        for t in tokens:
            some = torch.randn(setting.batch_size, t, about.dim, device=x.device, dtype=x.dtype)
            cases |= _halves(block, some, about.prefix, setting.precision)
        times, differs = settled(cases, x.device, "timing blocks", progress)
    attention, mlp = (_rising([times.best((t, half)) for t in tokens]) for half in ("attention", "mlp"))
    alone = Profile(meter.depth, about.prefix, tokens, attention, mlp, 0.0, 0.0, differs)
    return fitted(alone, times.best("dense"), times.best("reduced"), probe, at, counts)


def fitted(alone: Profile, dense: float, reduced: float, probe: Reducer, at: Sequence[int], counts: Sequence[int]) -> Profile:
    """A profile of blocks that were timed alone, so that it says of two whole models what they took.

    What blocks take too little for is put down to the rest of the model and to stages; where that is too much for the difference
    between the two, blocks are slower within the model than alone (other weights lie in the cache).
    """
    all_blocks, left_blocks = alone.seconds(Identity(), (), counts[:1]), alone.seconds(probe, at, counts)
    slower = max((dense - reduced) / (all_blocks - left_blocks), 1.0) if left_blocks < all_blocks else 1.0
    scale = min(slower, dense / all_blocks)
    rest = max(dense - scale * all_blocks, 0.0)
    over = reduced - rest - scale * left_blocks
    attention, mlp = (tuple(scale * t for t in half) for half in (alone.attention, alone.mlp))
    return replace(alone, attention=attention, mlp=mlp, rest=rest, stage=max(over, 0.0) / sum(counts[:-1]))


def _halves(block: nn.Module, x: Tensor, prefix: int, precision: str) -> dict[Any, Callable[[], Any]]:
    handlers = cut(type(block))
    given = {k: v for k, v in handlers.arguments(block, x[0, prefix:]).items() if isinstance(v, Tensor | tuple)}

    def run(half: Callable[..., Tensor], **options: Any) -> Tensor:
        with torch.inference_mode(), autocast(x.device, precision):
            return half(block, x, **options)

    t = x.shape[1]
    return {(t, "attention"): partial(run, handlers.attn_half, **given), (t, "mlp"): partial(run, handlers.mlp_half)}


def ratio(meter: Meter, reducer: Reducer, progress: Progress | None = None) -> tuple[float, float]:
    """Measured: seconds of the reduced model, and its share of the unreduced one's, alternating."""
    setting, model = meter.setting, meter.model
    x = images(model, setting.batch_size, setting.image_size)
    with without_hooks(model):
        variants = {r: reduce_as_needed_(share_weights(model).eval(), r) for r in (Identity(), reducer)}
    cases = {r: forward(variant, x, setting.precision) for r, variant in variants.items()}
    times, _ = settled(cases, x.device, "measuring the plan", progress)
    return times.best(reducer), times.best_ratio(reducer, Identity())


def settled(
    cases: Mapping[Name, Callable[[], Any]], device: torch.device, what: str, progress: Progress | None = None
) -> tuple[Timings[Name], float]:
    """Times of as many alternating rounds as fit into the time, at least four, and their `spread`.

    Where they disagree more are measured, at most three times as many; best times are then over all of them.
    """
    alternate(cases, 1, device=device)
    times = Timings({name: [] for name in cases})
    for _ in range(_TRIES):
        for more in _rounds(cases, device, what, progress):
            times = Timings({name: [*times.seconds[name], *more.seconds[name]] for name in cases})
        if spread(times) <= _AGREE:
            break
        logger.info("%s: rounds differ by up to %.1f x", what, 1 + spread(times))
    return times, spread(times)


def _rounds(
    cases: Mapping[Name, Callable[[], Any]], device: torch.device, what: str, progress: Progress | None
) -> Iterator[Timings[Name]]:
    """Pairs of rounds, at least two, while there is time."""
    start = time.perf_counter()
    for pair in range(_PAIRS):
        share = (time.perf_counter() - start) / _SECONDS
        if progress is not None:
            progress(what, min(int(100 * share), 100), 100)
        if pair >= 2 and share >= 1:
            return
        yield alternate(cases, 2, warmup=0, device=device)
    if progress is not None:
        progress(what, 100, 100)


def spread(times: Timings[Any]) -> float:
    """By how much the best times of earlier and later rounds differ, for the case where they differ most."""
    halves = [(min(s[: len(s) // 2]), min(s[len(s) // 2 :])) for s in times.seconds.values()]
    return max(max(a, b) / min(a, b) for a, b in halves) - 1


def _rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """More tokens never cost less: noise that says otherwise is taken out from the right."""
    out = list(seconds)
    for i in range(len(out) - 2, -1, -1):
        out[i] = min(out[i], out[i + 1])
    return tuple(out)


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(root) if root else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        cache = Path(tempfile.gettempdir())
    return cache / "squeezevit" / "profiles"


def _read(file: Path, meter: Meter) -> Profile | None:
    """What a file says of this model; None where there is none, or none that can be."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = _checked(values, meter)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        logger.warning("the profile %s cannot be used (%s); measuring again", file, error)
        return None
    return found


def _checked(values: Any, meter: Meter) -> Profile:
    """The profile of these values. Raises ValueError or TypeError where it is none of this model, or not plausible."""
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(Profile)}:
        raise ValueError("it is not a profile")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    found = Profile(**given)
    times = [*found.attention, *found.mlp]
    if not len(found.tokens) == len(found.attention) == len(found.mlp) or list(found.tokens) != sorted(set(found.tokens)):
        raise ValueError("its token counts are not those of its times")
    prefix = meter.about.prefix
    if (found.depth, found.prefix, found.tokens[-1:]) != (meter.depth, prefix, (prefix + meter.patches,)):
        raise ValueError("it is of another model")
    if not all(0 < t < math.inf for t in times) or not 0 <= found.rest < math.inf or not 0 <= found.stage < math.inf:
        raise ValueError("its times are none")
    if not found.spread <= _AGREE:
        raise ValueError(f"its rounds differ by up to {1 + found.spread:.1f} x")
    return found


def _keep(file: Path, found: Profile) -> bool:
    """Write a profile whole or not at all; whether it was."""
    if found.spread > _AGREE:
        logger.warning(
            "this machine is busy: times differ by up to %.1f x from round to round; the profile is used once and not kept",
            1 + found.spread,
        )  # fmt: skip
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            (Path(folder) / file.name).write_text(json.dumps(asdict(found)), encoding="utf-8")
            (Path(folder) / file.name).replace(file)
    except OSError as error:
        logger.warning("the profile cannot be kept in %s (%s); it will be measured again the next time", file, error)
        return False
    return True
