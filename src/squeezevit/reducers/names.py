"""Methods by the names people type."""

from collections.abc import Callable, Sequence
from functools import partial

from squeezevit.errors import ConfigError
from squeezevit.reducer import Reducer
from squeezevit.reducers import DTPS, ETPS, DynamicViT, EViT, Identity, Random, Squeeze, TopK

STAGED: dict[str, Callable[..., Reducer]] = {
    "etps": ETPS,
    "etps+mass": partial(ETPS, mass=True),
    "dtps": DTPS,
    "evit": EViT,
    "evit+norm": partial(EViT, normalize=True),
    "dynamicvit": DynamicViT,
    "topk": TopK,
    "random": Random,
    "training-free": partial(Squeeze, score="mrmr", fuse="mass", at="quarters"),
}
CURVE = {"training-free": "lorentzian"}  # along which a budget spreads a method's ratios; one ratio for all stages elsewhere
METHODS = ("identity", *STAGED, "tome")
LABELS = {
    "identity": "unreduced",
    "etps": "eTPS",
    "etps+mass": "eTPS + mass",
    "dtps": "dTPS",
    "evit": "EViT",
    "evit+norm": "EViT (normalised)",
    "dynamicvit": "DynamicViT",
    "topk": "TopK",
    "random": "Random",
    "training-free": "preset",
    "tome": "ToMe",
}


def check_method(name: str) -> str:
    """The name in lower case. Raises ConfigError where there is no such method, listing those there are."""
    if name.lower() not in METHODS:
        raise ConfigError(f"method {name!r} is not known; choose from {', '.join(METHODS)}")
    return name.lower()


def staged(name: str, keep: float | Sequence[float], at: Sequence[int] | str | None = None) -> Reducer:
    """A reducer by name and keep ratio. ToMe has no keep ratio: `squeezevit.plan.plan_macs` finds its r.

    >>> staged("topk", 0.5, (3, 6, 9))
    TopK(keep=0.5, at=(3, 6, 9), score='auto')
    """
    if check_method(name) == "identity":
        return Identity()
    if name.lower() not in STAGED:
        raise ConfigError(f"method {name!r} has no keep ratio; give r (tokens merged per block) instead")
    where = {} if at is None else {"at": at if isinstance(at, str) else tuple(at)}
    return STAGED[name.lower()](keep=keep, **where)
