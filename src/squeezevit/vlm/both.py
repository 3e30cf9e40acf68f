"""Both ends of a vision-language model with one budget: the tower reduced inside, and the prompt squeezed behind it."""

import math
from typing import Any

from torch import nn

from squeezevit.core.attach import reduce_
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Staged
from squeezevit.errors import ConfigError
from squeezevit.reducers import catalog
from squeezevit.vlm import host
from squeezevit.vlm.groups import Budget
from squeezevit.vlm.wrapper import VLM


def reduce_vlm_(model: nn.Module, keep: float = 0.5, *, method: str = "training-free", **options: Any) -> VLM:
    """Reduce the vision tower in place, and give the language model as large a share of its image tokens: one budget for both.

    The tower ends with the share `keep` of its patch tokens, which falls by the same ratio at each stage of the method, and puts
    out the full grid: each patch has the token that it ended in. The prompt then keeps the share `keep` of the projected features,
    of equal ones one. `vlm.squeeze(inputs).images` tells which features each prompt token stands for, `sv.trace(model)` which
    patches each token of the tower does. `sv.restore_(model)` makes the tower whole again.

    model: of transformers, with a tower that SqueezeViT knows. keep: above 0 and at most 1. method: a row of the catalogue that has
    keep ratios. options: those of `VLM` but for `tokens`. Raises ConfigError and UnsupportedError before anything is changed.

    >>> vlm = reduce_vlm_(model, keep=0.25)  # doctest: +SKIP
    >>> vlm.generate(**processor(images=photo, text=text, return_tensors="pt"), max_new_tokens=20)  # doctest: +SKIP
    """
    if "tokens" in options:
        raise ConfigError(
            f"tokens={options['tokens']!r}: both ends share one budget, which is a share; give keep, as keep=0.25, or reduce the "
            "tower by sv.reduce_(model, reducer, grid=True) and give tokens to sv.VLM"
        )
    if options.get("scores") == "tower":
        raise ConfigError('scores="tower": the tower is itself reduced here; use scores="even", which asks for no attention')
    Budget(keep, None)
    wrapper = VLM(model, keep, **options)
    template = catalog.method(method).template()
    if not isinstance(template, Staged):
        raise ConfigError(
            f"method {method!r} has no keep ratio, so the budget cannot be shared; give one that has, as 'training-free' or "
            "'etps', or reduce the tower by sv.reduce_(model, reducer, grid=True) and put sv.VLM around it"
        )
    base = host.base_of(model)
    stages = len(template.stages(len(description_of(base).blocks)))
    ratio = math.pow(keep, 1 / stages)
    reduce_(base, catalog.staged(method, ratio), grid=True)
    return wrapper
