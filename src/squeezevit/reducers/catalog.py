"""Every method once: its name, what it is, how a budget is spread over its stages, and how it is drawn.

A method of your own appears in every command by one row: `register(Method("mine", "mine", Mine))` in a module that is named by
`squeezevit --import my_methods ...`, or by an entry point of the group "squeezevit.methods".
"""

import difflib
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, cast

from squeezevit.core.reducer import Reducer, Staged
from squeezevit.errors import ConfigError
from squeezevit.reducers import (
    ATC,
    DTPS,
    ETPS,
    MCTF,
    SAINT,
    DiffRate,
    DynamicViT,
    EViT,
    Identity,
    MergeError,
    PiToMe,
    PruMerge,
    Random,
    Squeeze,
    ToFu,
    ToMe,
    TopK,
    VisionZip,
    ZeroTPrune,
)

logger = logging.getLogger(__name__)


class Look(NamedTuple):
    """How charts draw a method: its colour on white and on black, matplotlib's marker, dashes; `strong`: a thick line."""

    light: str
    dark: str
    marker: str = "o"
    dashes: tuple[float, ...] = ()
    strong: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the catalogue."""

    name: str  # what people type
    label: str  # what tables and charts say
    make: Callable[..., Reducer]  # the class
    options: Mapping[str, Any] = field(default_factory=dict)  # its fields where they are not the class's own
    curve: str | None = None  # along which a budget spreads the ratios of stages; None: one ratio for all
    look: Look | None = None  # None: one that is left
    compared: bool = False  # whether the demo shows it unasked

    def template(self) -> Reducer:
        """The reducer as it is before a budget or a keep ratio is known."""
        return self.make(**self.options)

    @property
    def learns(self) -> bool:
        """Whether it scores by heads that have to be trained."""
        return self.template().heads(1, 8) is not None


_ROWS = (
    Method("identity", "unreduced", Identity, look=Look("#1c2127", "#e8ebee")),
    Method(
        "training-free", "training-free", Squeeze, {"score": "mrmr", "fuse": "length", "at": "quarters"}, "lorentzian",
        Look("#1d7a2c", "#6fd07c", "*", strong=True), True,
    ),
    Method(  # of a model that is read at its class token
        "class-token", "training-free + cls", Squeeze, {"score": "mrmr", "fuse": "length", "at": "quarters+last"},
        "lorentzian", Look("#004d40", "#7fe0cf", "*", (4, 1.5)),
    ),
    Method("etps", "eTPS", ETPS, look=Look("#cf3f12", "#ff8552", "o", strong=True), compared=True),
    Method("etps+mass", "eTPS + mass", ETPS, {"mass": True}, None, Look("#0a5fb4", "#62adff", "s", strong=True), True),
    Method("dtps", "dTPS", DTPS, look=Look("#6a3fb5", "#b598ff", "P", strong=True)),
    Method("evit", "EViT", EViT, look=Look("#007a5a", "#35c79c", "^", (5, 2))),
    # without training the paper's own sum is several points worse than the normalised one
    Method("evit+norm", "EViT (normalised)", EViT, {"normalize": True}, None, Look("#007a5a", "#35c79c", "^", (5, 2)), True),
    Method("dynamicvit", "DynamicViT", DynamicViT, look=Look("#00758a", "#45c4da", "p", (3, 2))),
    Method("topk", "TopK", TopK, look=Look("#a0408a", "#e58fca", "v", (6, 2, 1.5, 2)), compared=True),
    Method("tome", "ToMe", ToMe, look=Look("#8f6200", "#e0b23e", "D", (9, 3)), compared=True),
    Method("pitome", "PiToMe", PiToMe, look=Look("#b35900", "#ff9f45", "d", (6, 2))),
    Method("tofu", "ToFu", ToFu, look=Look("#4f6d00", "#b5d455", ">", (4, 3))),
    Method("mctf", "MCTF", MCTF, look=Look("#c01f63", "#ff7fb2", "<", (7, 2, 2, 2))),
    Method("diffrate", "DiffRate", DiffRate, look=Look("#255e9e", "#86b8f0", "h", (8, 2))),
    Method("atc", "ATC", ATC, look=Look("#7a3b12", "#dda06f", "p", (5, 1.5))),
    Method("zero-tprune", "Zero-TPrune", ZeroTPrune, look=Look("#8b1e8b", "#e884e8", "v", (3, 1.5))),
    Method("merge-error", "ToMe by merge error", MergeError, look=Look("#5d5200", "#cfc24a", "D", (2, 1.5))),
    Method("saint", "SAINT", SAINT, look=Look("#1f6b6b", "#74d0d0", "^", (3, 1.5, 1, 1.5))),
    Method("shift", "TopK by shift", TopK, {"score": "shift"}, look=Look("#a31515", "#ff8a80", "X", (6, 1.5, 1, 1.5))),
    Method("visionzip", "VisionZip", VisionZip, look=Look("#3d3d9e", "#a6a6ff", "s", (2, 2))),
    Method("prumerge", "PruMerge", PruMerge, look=Look("#2f6f3a", "#7fc98c", "P", (1.5, 1.5))),
    Method("random", "Random", Random, look=Look("#68707b", "#a6afba", "X", (1.5, 2)), compared=True),
)  # fmt: skip
_METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
_ALIASES = {"preset": "training-free"}


def register(row: Method) -> Method:
    """Add a method, or the same one again as where a notebook's cell is run twice.

    Raises ConfigError where another one has its name, its reducer needs options that the row does not give, another class of
    reducer has the same name, by which saved models know it, or the name is not lower case.
    """
    if row.name != row.name.lower() or not row.name.strip():
        raise ConfigError(f"a method's name is lower case, as 'mine'; got {row.name!r}")
    old = _METHODS.get(row.name)
    if old is not None and _class_name(old) != _class_name(row):
        raise ConfigError(f"there already is a method {row.name!r} ({old.make}); choose another name")
    try:
        kind = type(row.template())
    except TypeError as error:
        raise ConfigError(
            f"method {row.name!r} cannot be made without options ({error}); give them in the row, or defaults"
        ) from error
    for other in _METHODS.values():
        known = type(other.template())
        if (
            other.name != row.name
            and known.__name__ == kind.__name__
            and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__)
        ):
            raise ConfigError(
                f"there already is a reducer class {kind.__name__} ({known.__module__}), and saved models name theirs; rename yours"
            )
    _METHODS[row.name] = row
    return row


def _class_name(row: Method) -> str:
    return getattr(row.make, "__qualname__", repr(row.make))


def methods() -> dict[str, Method]:
    """All rows by name, those of installed packages included."""
    _load_installed()
    return dict(_METHODS)


@cache
def _load_installed() -> None:
    for point in entry_points(group="squeezevit.methods"):
        try:
            point.load()
        except ConfigError as error:  # one package's method is no reason to end all commands
            logger.warning("%s of an installed package is left out: %s", point.name, error)


def import_methods(module: str) -> None:
    """Import a module that registers methods, from the working folder or the path. Raises ConfigError where it cannot be."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--import {module}: {error}; give the name of a module that Python finds, without .py") from error


def from_dict(values: Mapping[str, Any]) -> Reducer:
    """The reducer that `squeezevit.reducers.to_dict` took apart, a registered method's too.

    Raises ConfigError where there is no such reducer, or it has no such fields.

    >>> from_dict({"name": "ToMe", "r": 4})
    ToMe(r=4)
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "name"}
    by_name = {kind.__name__: kind for kind in (type(row.template()) for row in methods().values())}
    try:
        return by_name[values["name"]](**fields)
    except (KeyError, TypeError) as error:
        known = ", ".join(by_name)
        raise ConfigError(f"{dict(values)} describes no reducer of this version ({error}); known are {known}") from error


def method(name: str) -> Method:
    """The row of this name, in any case. Raises ConfigError where there is none, naming those there are and the nearest.

    >>> method("ETPS").label
    'eTPS'
    """
    known = methods()
    key = _ALIASES.get(name.lower(), name.lower())
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"method {name!r} is not known; {hint}choose from {', '.join(known)}")
    return known[key]


def label_of(reducer: Reducer) -> str:
    """What tables and charts call a reducer: the label of the row whose options it has, or the name of its class.

    >>> label_of(ETPS(keep=0.5)), label_of(ETPS(mass=True)), label_of(Squeeze(score="random"))
    ('eTPS', 'eTPS + mass', 'Squeeze')
    """
    best, most = type(reducer).__name__, (-1, False)
    for row in methods().values():
        same = type(row.template()) is type(reducer) and all(
            getattr(reducer, name) == value for name, value in row.options.items() if name != "at"
        )
        near = len(row.options), getattr(reducer, "at", None) == row.options.get("at")
        if same and near > most:
            best, most = row.label, near
    return best


def staged(name: str, keep: float | Sequence[float], at: Sequence[int] | str | None = None) -> Reducer:
    """A reducer by name, keep ratio and stages. Raises ConfigError for a method without keep ratios, as ToMe.

    >>> staged("topk", 0.5, (3, 6, 9))
    TopK(keep=0.5, at=(3, 6, 9), score='auto')
    """
    template = method(name).template()
    if isinstance(template, Identity):
        return template
    if not isinstance(template, Staged):
        raise ConfigError(f"method {name!r} has no keep ratio; give {type(template).__name__}'s own options, or a budget, instead")
    where: dict[str, Any] = {} if at is None else {"at": at if isinstance(at, str) else tuple(at)}
    return replace(template, keep=cast(Any, keep), **where)
