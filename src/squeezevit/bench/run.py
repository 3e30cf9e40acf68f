"""Speed of reducers on one model: against the unreduced model, and against the limit."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from squeezevit.bench.limit import Slice, limit_of
from squeezevit.bench.timing import alternate
from squeezevit.core.attach import reduce_as_needed_, restore_
from squeezevit.core.macs import fake_trace, macs, token_counts
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import forward, images, share_weights
from squeezevit.errors import ConfigError
from squeezevit.reducers import Identity

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile


@dataclass(frozen=True)
class Speed:
    """One reducer's cost. Ratios compare it with the unreduced model and with the limit, in the same rounds."""

    reducer: str
    tokens: tuple[int, ...]  # patch tokens before the first stage and after each
    macs: int
    macs_share: float  # of the unreduced model
    images_per_second: float  # median over rounds
    images_per_second_best: float
    speedup: float  # median of the ratios in each round
    speedup_best: float  # fastest round against fastest round
    overhead: float | None  # time / time of the limit, median of the ratios in each round; None where nothing is reduced
    overhead_best: float | None


def measure(
    model: nn.Module,
    reducers: Sequence[Reducer],
    batch_size: int,
    image_size: int | tuple[int, int] | None = None,
    rounds: int = 9,
    precision: str = "fp32",
    limits: bool = True,
    compiled: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Time a model under each reducer, in inference mode, alternating round by round with the unreduced model and the limits.

    The model is left unreduced, on its own device. Images are noise, which changes nothing: counts are fixed.
    precision: "fp32" as the weights are, or autocast to "bf16" or "fp16". limits=False leaves the sliced models out.
    compiled: a mode of torch.compile, "default" or "reduce-overhead" (CUDA graphs); one graph each, or it fails. Raises
    ConfigError on an unknown mode.
    """
    if compiled not in (None, *MODES):
        raise ConfigError(f"compiled={compiled!r} is no mode of torch.compile; choose from {', '.join(MODES)}")
    device = next(model.parameters()).device
    restore_(model.eval())
    dense = macs(model, image_size)
    variants = {r: reduce_as_needed_(share_weights(model), r) for r in (Identity(), *reducers)}
    bounds = {r: _limit(variant, r, image_size) for r, variant in variants.items()} if limits else {}
    for bound in {b for b in bounds.values() if b is not None}:
        variants[bound] = reduce_as_needed_(share_weights(model), bound)
    x = images(model, batch_size, image_size)
    cases = {r: forward(variant, x, precision, compiled) for r, variant in _neighbours(variants, bounds).items()}
    with nullcontext() if compiled is None else _fresh_graphs(len(cases)):
        times = alternate(cases, rounds, warmup=1 if compiled is None else 3, device=device, progress=progress)

    def speed(r: Reducer) -> Speed:
        bound, cost = bounds.get(r), macs(variants[r], image_size)
        return Speed(
            reducer=repr(r),
            tokens=token_counts(variants[r], image_size),
            macs=cost,
            macs_share=cost / dense,
            images_per_second=batch_size / times.median(r),
            images_per_second_best=batch_size / times.best(r),
            speedup=times.ratio(Identity(), r),
            speedup_best=times.best_ratio(Identity(), r),
            overhead=None if bound is None else times.ratio(r, bound),
            overhead_best=None if bound is None else times.best_ratio(r, bound),
        )

    return [speed(r) for r in reducers]


def _fresh_graphs(variants: int) -> AbstractContextManager[Any]:
    """Compiling anew, with room for so many variants, which share their code.

    Graphs of an earlier call would make this one's batch size dynamic.
    """
    from torch import _dynamo  # takes a second to import

    _dynamo.reset()
    return _dynamo.config.patch(recompile_limit=8 + 2 * variants)


def _limit(model: nn.Module, reducer: Reducer, image_size: int | tuple[int, int] | None) -> Slice | None:
    stages = fake_trace(model, image_size).stages
    return limit_of(reducer, tuple(s.block for s in stages), tuple(s.n_out for s in stages)) if stages else None


def _neighbours(variants: dict[Reducer, nn.Module], bounds: dict[Reducer, Slice | None]) -> dict[Reducer, nn.Module]:
    """The variants in an order in which a reducer runs next to its limit, so that both see the same moment."""
    order: dict[Reducer, nn.Module] = {}
    for reducer in variants:
        for one in (bounds.get(reducer), reducer):
            if one is not None:
                order.setdefault(one, variants[one])
    return order
