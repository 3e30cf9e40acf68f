"""From a kind of reducer and a budget to a reducer: a share of the multiply-adds, a share of the time, or images a second."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, cast, get_args

from torch import nn

from squeezevit.budget.meter import Meter, Setting, Size
from squeezevit.budget.solve import (
    BISECT_STEPS,
    CURVES,
    LAST,
    SOLVE_STEPS,
    Cost,
    Make,
    OutOfReach,
    along,
    most_tokens,
    on_curve,
    solve,
)  # fmt: skip
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer, Spread, Staged
from squeezevit.core.running import Progress
from squeezevit.errors import ConfigError
from squeezevit.reducers import Identity, catalog

if TYPE_CHECKING:
    from squeezevit.budget.latency import Clock

Kind = str | type[Reducer] | Reducer  # a method's name, a class, or a reducer whose other options stay
WITHIN = 0.03  # of the time asked for, of a plan that needs no second look
_LOOKS = 3  # measurements that a plan for a time is mended by, at most
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A reducer, and what is known of it. Times are seconds a batch; shares are of the unreduced model."""

    reducer: Reducer
    macs_share: float
    predicted: float | None = None  # share of the time
    measured: float | None = None  # share of the time, in the run that made the plan
    seconds: float | None = None  # measured
    images_per_second: float | None = None  # measured

    def __str__(self) -> str:
        text = f"{self.reducer}: {self.macs_share:.1%} of the multiply-adds"
        if self.measured is None or self.seconds is None or self.images_per_second is None:
            return text
        times = f"{self.predicted:.1%} of the time predicted, {self.measured:.1%} measured"
        return f"{text}, {times} ({duration(self.seconds)} a batch, {rate(self.images_per_second)})"


def duration(seconds: float) -> str:
    """A time as people read it.

    >>> duration(0.00123), duration(0.0456), duration(12.345)
    ('1.23 ms', '45.6 ms', '12.3 s')
    """
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def rate(images_per_second: float) -> str:
    """Images a second as people read them.

    >>> rate(12345.6), rate(4.5678)
    ('12,346 images/s', '4.57 images/s')
    """
    return f"{images_per_second:,.0f} images/s" if images_per_second >= 100 else f"{images_per_second:.3g} images/s"


def plan(model: nn.Module, reducer: Kind, **budget: Any) -> Reducer:
    """The reducer of this kind that meets a budget with the most tokens kept; see `make_plan`, whose `reducer` it returns.

    >>> plan(timm.create_model("deit_small_patch16_224"), ETPS, macs=0.5).keep  # doctest: +SKIP
    0.5013
    """
    return make_plan(model, reducer, **budget).reducer


def make_plan(
    model: nn.Module,
    reducer: Kind,
    *,
    macs: float | None = None,
    latency: float | None = None,
    images_per_second: float | None = None,
    batch_size: int = 1,
    image_size: Size = None,
    precision: str = "fp32",
    at: Sequence[int] | str | None = None,
    curve: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Choose the strength (a keep ratio, or ToMe's r) of a kind of reducer for a budget. The model is left as it was.

    reducer: a method's name, a class, or a reducer whose other options stay. One budget: macs, the share of the unreduced model's
    multiply-adds; latency, the share of its time a batch of `batch_size` on the model's own device; images_per_second, there.
    at: stages, "auto" for the latest evenly spaced ones that reach the budget, or None for the reducer's own. curve: a ratio for
    each stage instead of one for all, so that the tokens left fall along a "geometric", "linear", "cosine" or "lorentzian" curve,
    whose steepness is planned; where neither names stages there is one in every block. A name brings its own curve.
    For times the model's blocks are timed at a few token counts (kept in a cache file by model, device, versions and setting;
    `fresh` measures again), the plan is verified by a measurement, and made anew from it where it misses by over 3 %.
    progress: told what is being done, with steps done and to do. Raises ConfigError where the budget cannot be reached, saying
    what can.
    """
    name, value = _budget(macs=macs, latency=latency, images_per_second=images_per_second)
    kind = _kind_of(reducer, at, curve)
    with Meter(model, Setting(batch_size, image_size, precision)) as meter:
        tries = kind.placed(at, meter.depth)
        if getattr(tries[0].template, "class_token_only", False):
            meter.hold(tries[0].template)  # refuses a model that is read elsewhere, before anything is counted or timed
        if name == "macs":
            return _first(tries, partial(_for_macs, meter, value, progress))
        return _in_time(meter, tries, name, value, fresh, progress)


def plan_macs(
    model: nn.Module,
    method: str,
    share: float,
    at: Sequence[int] | None = None,
    image_size: Size = None,
    progress: Progress | None = None,
) -> Reducer:
    """`plan` for a share of the multiply-adds, by a method's name; "identity" is itself. at: where a method has stages.

    One keep ratio for all stages (one r for ToMe, spread evenly; of the preset ratios along its curve) is found on the MACs
    counted; they move in steps of one token, so the share is met to 0.4 points or half a step, whichever is more.
    """
    template = catalog.method(method).template()
    if not is_share(share):
        raise ConfigError(f"share {share!r} of the multiply-adds is not above 0 and at most 1; give 0.5 for half")
    if isinstance(template, Identity):
        return template
    stages = at if isinstance(template, Staged) else None
    return plan(model, method, macs=share, at=stages, image_size=image_size, progress=progress)


def like(
    model: nn.Module,
    method: str,
    keep: float | Sequence[float],
    at: Sequence[int] | None = None,
    image_size: Size = None,
) -> Reducer:
    """A reducer by name and keep ratio; a method of every block gets what costs the same as eTPS at this ratio.

    The model is left as it was.

    >>> like(timm.create_model("deit_small_patch16_224"), "tome", 0.7)  # doctest: +SKIP
    ToMe(r=(10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11))
    """
    template = catalog.method(method).template()
    everywhere = at is None and getattr(template, "at", None) == "every"
    if isinstance(template, Staged) and template.class_token_only and at is None and not isinstance(keep, Sequence):
        apart = len(template.stages(len(description_of(model).blocks))) - 1
        return replace(template, keep=(*[keep] * apart, min(keep, LAST)))
    if isinstance(template, Staged | Identity) and not everywhere:
        return catalog.staged(method, keep, at)
    with Meter(model, Setting(image_size=image_size)) as meter:
        share = meter.share(catalog.staged("etps", keep, at))
    return plan_macs(model, method, share, image_size=image_size)


def preset(name: str, macs: float = 0.5, model: nn.Module | None = None, image_size: Size = None) -> Reducer:
    """A method whose ratios were found by measuring, for a share of the model's multiply-adds. The model is left as it was.

    "training-free": for models that are not fine-tuned. Raises ConfigError on an unknown name, without a model, and on a share
    that is none or out of reach.

    >>> preset("training-free", macs=0.5, model=timm.create_model("vit_small_patch16_224")).keep  # doctest: +SKIP
    (0.821428, 0.652173, 0.628571, 0.666666)
    """
    if _curve_of(name) is None:
        known = [row.name for row in catalog.methods().values() if row.curve is not None]
        raise ConfigError(f"preset {name!r} is not known; choose from {', '.join(known)}")
    if model is None:
        raise ConfigError(
            f"preset {name!r} is planned for a model: give it, as sv.preset({name!r}, macs={macs!r}, model=model); "
            f"its stages and options alone are squeezevit.reducers.catalog.method({name!r}).template()"
        )
    return plan(model, name, macs=macs, image_size=image_size)


def _curve_of(name: str) -> str | None:
    try:
        return catalog.method(str(name)).curve
    except ConfigError:
        return None


def _budget(**budgets: float | None) -> tuple[str, float]:
    """The one budget that was given."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give one budget, macs, latency or images_per_second, not {', '.join(given) or 'none'}")
    (name, value), = given.items()  # fmt: skip
    if name == "images_per_second":
        good, wanted = _is_positive(value), "a number above 0"
    else:
        good, wanted = is_share(value), "a share above 0 and at most 1"
    if not good:
        raise ConfigError(f"{name}={value!r} is no budget; give {wanted}")
    return name, float(value)


def _is_positive(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # a whole number that no float holds
        return False


def is_share(value: object) -> bool:
    """Whether it is a number above 0 and at most 1."""
    return _is_positive(value) and cast(float, value) <= 1


@dataclass(frozen=True)
class _Kind:
    """What is planned: a template whose strength is open, what messages call it, and the curve that its ratios follow."""

    label: str
    template: Reducer
    curve: str | None = None

    def placed(self, at: Sequence[int] | str | None, depth: int) -> "list[_Kind]":
        """The kind with the stages to try, in order."""
        if self.curve is not None:
            return [self._on_curve(at)]
        if at is None:
            return [self]
        if not isinstance(self.template, Staged):
            raise ConfigError(f"{self.label} has no stages to choose (at={at!r}); leave at out")
        if at == "auto":
            return [self._with(keep=0.5, at=stages) for stages in _spaced(depth)]
        return [self._with(keep=0.5, at=_stages(at))]

    def _on_curve(self, at: Sequence[int] | str | None) -> "_Kind":
        if self.curve not in CURVES:
            raise ConfigError(f"curve={self.curve!r} is not known; choose from {', '.join(CURVES)}")
        if not isinstance(self.template, Staged):
            raise ConfigError(f"{self.label} has no keep ratios to spread (curve={self.curve!r}); leave the curve out")
        if at == "auto":
            raise ConfigError(
                f"curve={self.curve!r} gives each stage a ratio of its own, but at='auto' looks for stages of one; leave one out"
            )
        return self._with(keep=1.0, at=(self.template.at or "every") if at is None else _stages(at))

    def _with(self, **options: Any) -> "_Kind":
        return replace(self, template=replace(cast(Any, self.template), **options))

    def make(self, meter: Meter) -> Make:
        """From a strength to the reducer. Raises ConfigError where strength changes nothing."""
        template, curve = self.template, self.curve
        if curve is not None and isinstance(template, Staged):
            stages = len(template.stages(meter.depth))
            return lambda strength: on_curve(template, curve, strength, meter.patches, stages)
        if template.at_strength(0.0, meter.patches, meter.depth) == template.at_strength(1.0, meter.patches, meter.depth):
            raise ConfigError(f"{template} has no keep ratio to plan; give a reducer with one, as sv.ETPS")
        return lambda strength: template.at_strength(strength, meter.patches, meter.depth)


def _kind_of(reducer: Kind, at: Sequence[int] | str | None, curve: str | None) -> _Kind:
    if isinstance(reducer, str):
        row = catalog.method(reducer)
        return _Kind(reducer, row.template(), row.curve if curve is None and at != "auto" else curve)
    template = _made(reducer) if isinstance(reducer, type) and issubclass(reducer, Reducer) else reducer
    if not isinstance(template, Reducer):
        raise ConfigError(
            f"a {type(template).__name__} is not a reducer; give the model first, then a method's name, a class as sv.ETPS, or a "
            "reducer as sv.ETPS(mass=True)"
        )
    return _Kind(type(template).__name__, template, curve)


def _made(reducer: type[Reducer]) -> Reducer:
    try:
        return reducer()
    except TypeError as error:
        raise ConfigError(f"{reducer.__name__} wants options ({error}); give a reducer that has them, not the class") from error


def _stages(at: Sequence[int] | str) -> Any:
    if isinstance(at, str) and at not in get_args(Spread):
        raise ConfigError(f"at={at!r}: give block indices, as (3, 6, 9), or 'auto'")
    return at


def _spaced(depth: int) -> list[tuple[int, ...]]:
    """Three evenly spaced stages, the latest first."""
    step = max(depth // 4, 1)
    latest = min(step, depth - 1)
    return [tuple(b for b in (first, first + step, first + 2 * step) if b < depth) for first in range(latest, -1, -1)]


def _first(tries: Sequence[_Kind], find: Callable[[_Kind], Plan]) -> Plan:
    """The plan for the first placement that reaches the budget."""
    for kind in tries[:-1]:
        try:
            return find(kind)
        except OutOfReach as error:
            logger.info("%s", error)
    return find(tries[-1])


def _for_macs(meter: Meter, share: float, progress: Progress | None, kind: _Kind) -> Plan:
    make = kind.make(meter)
    with _told(meter.share, "counting multiply-adds", SOLVE_STEPS, progress) as cost:
        found = solve(make, cost, share, kind.label)
    return Plan(found, meter.share(found))


@contextmanager
def _told(cost: Cost, what: str, most: int, progress: Progress | None) -> Iterator[Cost]:
    """The same cost, each of whose calls is told."""
    done = 0

    def told(reducer: Reducer) -> float:
        nonlocal done
        done += 1
        tell(what, min(done, most), most)
        return cost(reducer)

    tell = progress or (lambda *said: None)
    yield told
    tell(what, most, most)


def _in_time(meter: Meter, tries: Sequence[_Kind], name: str, value: float, fresh: bool, progress: Progress | None) -> Plan:
    """A plan for a time; what an old profile says cannot be reached is measured again."""
    from squeezevit.budget.latency import Clock

    clock = Clock(meter, tries[0].make(meter)(0.5), fresh, progress)
    find = partial(_for_time, clock, name, value, progress)
    try:
        return _first(tries, find)
    except OutOfReach:
        if clock.own:
            raise
        clock.measure()
        return _first(tries, find)


def _for_time(clock: "Clock", name: str, value: float, progress: Progress | None, kind: _Kind) -> Plan:
    from squeezevit.budget.latency import ratio

    make, dense, batch = kind.make(clock.meter), clock.dense, clock.meter.setting.batch_size
    wanted = value if name == "latency" else batch / value / dense  # share of the unreduced model's time
    refusal = partial(_out_of_reach, clock, kind, name, wanted)
    known = {1.0: 1.0}  # shares measured, by the share that the profile predicts
    found: list[tuple[float, Plan]] = []  # with how far each is off

    def predicted(reducer: Reducer) -> float:
        return along(known, clock.seconds(reducer) / dense)

    for _ in range(_LOOKS):
        strongest = None
        try:
            with _told(predicted, "choosing the strength", BISECT_STEPS, progress) as cost:
                reducer = most_tokens(make, cost, wanted, refusal)
        except OutOfReach:
            if clock.settled:
                raise
            reducer = strongest = make(1.0)  # of times that never settled none is refused before it was measured
        seconds, share = ratio(clock.meter, reducer, progress)
        whole = 1.0 if name == "latency" else seconds / share / dense  # the unreduced model, as it was in these rounds
        if strongest is not None and share * whole > (1 + WITHIN) * wanted:
            raise OutOfReach(refusal(share * whole, "measured"))
        off = abs(share * whole / wanted - 1)
        plan = Plan(reducer, clock.meter.share(reducer), predicted(reducer), share, seconds, batch / seconds)
        logger.info("%s", plan)
        found.append((off, plan))
        if off <= WITHIN or reducer == make(0.0):
            break
        known |= {1.0: whole, clock.seconds(reducer) / dense: share * whole}
    off, plan = min(found, key=lambda f: f[0])
    if off > WITHIN and plan.reducer != make(0.0):
        logger.warning("the plan's time is %.0f %% off what was asked for, as times here do not settle: %s", 100 * off, plan)
    return plan


def _out_of_reach(clock: "Clock", kind: _Kind, name: str, wanted: float, least: float, how: str = "predicted") -> str:
    batch, seconds = clock.meter.setting.batch_size, least * clock.dense
    if name == "latency":
        asked = f"{wanted:.1%} of the unreduced model's time"
        best = f"the least {how} is {least:.1%} ({duration(seconds)} a batch)"
    else:
        asked = f"{rate(batch / (wanted * clock.dense))} in batches of {batch}"
        best = f"the most {how} is {rate(batch / seconds)} ({duration(seconds)} a batch)"
    return (
        f"{kind.label} cannot reach {asked} with these stages; {best}. Choose earlier or more stages (at), or a larger budget. "
        f"{clock.source()}"
    )
