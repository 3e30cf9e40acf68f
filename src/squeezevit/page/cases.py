"""What a page compares: each method at each share of the multiply-adds, and in words what each does."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from squeezevit.budget.meter import Meter, Setting
from squeezevit.budget.plan import Plan, make_plan
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer, Staged
from squeezevit.core.running import Progress
from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import method

METHODS = ("training-free", "topk", "tome")
SHARES = (0.8, 0.65, 0.5, 0.35, 0.25)
OWN = "own"  # the method of a bundle that brings its reducer
_FEWEST = 0.25  # of its tokens that a stage with one ratio for all keeps, where earlier stages reach the budget, too
_TOLD = {  # heading, and what it does
    "training-free": (
        "TPS",
        "Without training: prunes tokens that have a more important twin, and squeezes each into the token most like it.",
    ),
    "topk": ("Plain pruning", "Throws away the tokens that the class token attends to least."),
    "tome": ("ToMe", "Merges the most similar pairs of tokens in every block."),
}
_COLOURS = (("#1d7a2c", "#6fd07c"), ("#0a5fb4", "#62adff"), ("#cf3f12", "#ff8552"))  # where the catalogue has none
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A reducer that costs `share` of the multiply-adds; `told` is the share that was asked for."""

    method: str
    told: float
    share: float
    reducer: Reducer

    @property
    def file(self) -> str:
        return f"{''.join(c if c.isalnum() else '-' for c in self.method)}-{100 * self.told:g}.onnx"

    @property
    def python(self) -> str:
        """The line that reduces a model just so; learned heads come with their bundle alone."""
        if self.reducer.learned:
            return f'model = sv.load("bundle")  # {self.reducer}, whose score heads are in the bundle'
        if self.method == "training-free":
            return f'sv.reduce_(model, sv.preset("training-free", macs={self.told:g}, model=model))'
        return f"sv.reduce_(model, sv.{self.reducer!r})"


def described(name: str, own: Reducer | None, index: int) -> dict[str, Any]:
    """A method as the page names it: its key, heading, what it does, its colours on white and on black."""
    reducer = own if name == OWN and own is not None else method(name).template()
    heading, words = _TOLD.get(name, (None, _first_sentence(type(reducer))))
    look = None if name == OWN else method(name).look
    light, dark = (look.light, look.dark) if look else _COLOURS[index % len(_COLOURS)]
    return {
        "key": name, "label": heading or (type(reducer).__name__ if name == OWN else method(name).label), "words": words,
        "light": light, "dark": dark,
    }  # fmt: skip


def planned(
    net: nn.Module, methods: Sequence[str], shares: Sequence[float] | None, size: tuple[int, int], progress: Progress
) -> list[Case]:
    """Each method at each share, planned on the unreduced model, which is left as it was.

    shares: None for the usual ones, of which those that a method cannot reach are left out, with a note; a share that was asked for
    and cannot be reached raises ConfigError.
    """
    cases: list[Case] = []
    wanted = SHARES if shares is None else shares
    for i, share in enumerate(wanted):
        found: list[Case] = []
        try:
            for name in methods:
                progress("planning", i * len(methods) + len(found), len(wanted) * len(methods))
                made = _plan(net, name, share, size)
                found.append(Case(name, share, made.macs_share, made.reducer))
        except ConfigError as error:
            if shares is not None:
                raise
            logger.warning("the page goes without %g %% of the multiply-adds: %s", 100 * share, error)
        else:
            cases += found
    if not cases:
        raise ConfigError("none of the usual shares can be reached; give --macs and --methods that can")
    return cases


def beside(net: nn.Module, own: Reducer, methods: Sequence[str], size: tuple[int, int], progress: Progress) -> list[Case]:
    """A bundle's own reducer, and the methods at the share that it costs, but for those that are the same or cannot reach it."""
    with Meter(net, Setting(image_size=size)) as meter:
        share = meter.share(own)
    told = round(share, 2)
    if not 0 < told < 1:
        raise ConfigError(f"{own} leaves {share:.1%} of the multiply-adds, so there is nothing to watch; reduce the model more")
    cases = [Case(OWN, told, share, own)]
    for i, name in enumerate(methods):
        progress("planning", i, len(methods))
        try:
            made = _plan(net, name, told, size)
        except ConfigError as error:
            logger.warning("the page goes without %s: %s", name, error)
            continue
        if made.reducer != own:
            cases.append(Case(name, told, made.macs_share, made.reducer))
    return cases


def _plan(net: nn.Module, name: str, share: float, size: tuple[int, int]) -> Plan:
    """A reducer with one ratio for all of its stages begins as many blocks earlier as keep that ratio from ruin."""
    row = method(name)
    template = row.template()
    if row.curve is not None or not isinstance(template, Staged):
        return make_plan(net, name, macs=share, image_size=size)
    *tries, last = _earlier(template, net)
    for staged in tries:
        try:
            made = make_plan(net, staged, macs=share, image_size=size)
        except ConfigError:
            continue
        if isinstance(made.reducer, Staged) and made.reducer.ratio(0) >= _FEWEST:
            return made
    return make_plan(net, last, macs=share, image_size=size)


def _earlier(template: Staged, net: nn.Module) -> Iterator[Staged]:
    at = template.stages(len(description_of(net).blocks))
    for shift in range(at[0] + 1):
        yield replace(template, at=tuple(block - shift for block in at))


def _first_sentence(reducer: type) -> str:
    return " ".join((reducer.__doc__ or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
