"""The methods, each a frozen dataclass over the protocol of `squeezevit.core.reducer`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from squeezevit.core.reducer import Reducer
from squeezevit.errors import ConfigError
from squeezevit.reducers.baselines import Identity, Random, TopK
from squeezevit.reducers.evit import EViT
from squeezevit.reducers.learned import DTPS, DynamicViT
from squeezevit.reducers.tome import ToMe
from squeezevit.reducers.tps import ETPS, Squeeze

__all__ = ["DTPS", "ETPS", "DynamicViT", "EViT", "Identity", "Random", "Squeeze", "ToMe", "TopK"]


_BY_NAME: dict[str, type[Reducer]] = {c.__name__: c for c in (DTPS, ETPS, DynamicViT, EViT, Identity, Random, Squeeze, ToMe, TopK)}


def to_dict(reducer: Reducer) -> dict[str, Any]:
    """A reducer as plain values, for a configuration file.

    >>> to_dict(ToMe(r=4))
    {'name': 'ToMe', 'r': 4}
    """
    return {"name": type(reducer).__name__, **asdict(reducer)}


def from_dict(values: Mapping[str, Any]) -> Reducer:
    """The reducer that `to_dict` took apart. Raises ConfigError where there is no such reducer, or it has no such fields.

    >>> from_dict({"name": "ToMe", "r": 4})
    ToMe(r=4)
    """
    from squeezevit.reducers.catalog import methods  # which imports these

    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "name"}
    templates = (row.template() for row in methods().values())
    by_name = {**{type(template).__name__: type(template) for template in templates}, **_BY_NAME}
    try:
        return by_name[values["name"]](**fields)
    except (KeyError, TypeError) as error:
        known = ", ".join(by_name)
        raise ConfigError(f"{dict(values)} describes no reducer of this version ({error}); known are {known}") from error
