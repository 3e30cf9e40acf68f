"""Settings that were found by measuring, by name."""

from dataclasses import replace
from typing import cast

from torch import nn

from squeezevit.errors import ConfigError
from squeezevit.plan import on_curve, plan
from squeezevit.reducer import Reducer, Staged
from squeezevit.reducers.names import CURVE, staged

PRESETS: dict[str, Staged] = {
    # what goes has a more important twin that stays, from the first block on, gently at first; docs/training-free.md
    "training-free": cast(Staged, staged("training-free", 0.7)),
}
_DEPTH, _TOKENS, _CHANNELS, _PATCH = 12, 196, 384, 768  # ViT-S/16 at 224 pixels


def preset(
    name: str, macs: float = 0.5, model: nn.Module | None = None, image_size: int | tuple[int, int] | None = None
) -> Reducer:
    """A reducer by name for a share of the unreduced model's multiply-adds. The model is left unreduced.

    "training-free": for models that are not fine-tuned. With a model the share is met as by `plan`; without one the keep ratios are
    those of ViT-S/16 at 224 pixels, which hold for other ViTs of 12 blocks to a few points. Raises ConfigError on an unknown
    name and on a share that is none or out of reach.

    >>> preset("training-free", macs=0.5).keep
    (0.816, 0.65, 0.635, 0.652)
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; choose from {', '.join(PRESETS)}")
    template = PRESETS[name]
    if model is not None:
        return plan(model, template, macs=macs, image_size=image_size, curve=CURVE[name])
    low, high = 0.0, 1.0  # strengths: what costs more than the share, what costs less
    least = _share(_typical(name, high))
    if not least <= macs <= 1:
        raise ConfigError(f"macs={macs!r} is out of reach of {name!r}: give a share from {least:.2f} to 1")
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if _share(_typical(name, middle)) <= macs else (middle, high)
    return _typical(name, high)


def _typical(name: str, strength: float) -> Staged:
    """The preset of some strength on the reference; ratios as a person would write them."""
    template = PRESETS[name]
    found = on_curve(template, CURVE[name], strength, _TOKENS, len(template.stages(_DEPTH)))
    return replace(found, keep=tuple(round(ratio, 3) for ratio in cast(tuple[float, ...], found.keep)))


def _share(stages: Staged) -> float:
    """Of the reference's multiply-adds, without what scoring and matching cost."""
    C, now = _CHANNELS, _TOKENS
    at = stages.stages(_DEPTH)
    total = dense = _PATCH * C * now
    for block in range(_DEPTH):
        after = stages.count(at.index(block), now, _TOKENS) if block in at else now
        total += 4 * C * C * (now + 1) + 2 * C * (now + 1) ** 2 + 8 * C * C * (after + 1)
        dense += 12 * C * C * (_TOKENS + 1) + 2 * C * (_TOKENS + 1) ** 2
        now = after
    return total / dense
