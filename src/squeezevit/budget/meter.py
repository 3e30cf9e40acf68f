"""One model, held while reducers are tried in it: what it costs without one, and with each."""

from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import cast

from torch import nn

from squeezevit.core.attach import reduce_, reduce_as_needed_, restore_, retune_
from squeezevit.core.cut import description_of
from squeezevit.core.macs import macs, token_counts
from squeezevit.core.reducer import Reducer, is_index
from squeezevit.core.running import PRECISIONS
from squeezevit.errors import ConfigError
from squeezevit.reducers import Random

Size = int | tuple[int, int] | None  # in pixels; None: what the model is set up for


@dataclass(frozen=True)
class Setting:
    """What a cost is for. The device is the model's own."""

    batch_size: int = 1
    image_size: Size = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not is_index(self.batch_size) or not self.batch_size:
            raise ConfigError(f"batch_size={self.batch_size!r} is no number of images; give 1 or more")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if is_index(self.image_size):  # NumPy's whole numbers, too
            object.__setattr__(self, "image_size", int(cast(int, self.image_size)))


class Meter:
    """Holds a model while reducers are tried in it, and leaves it as it was, reducer and learned heads, when closed.

    Where a reducer differs from the last one by its ratios alone, the model's blocks are not proved again.

    >>> with Meter(timm.create_model("deit_small_patch16_224")) as meter:  # doctest: +SKIP
    ...     round(meter.share(ETPS(keep=0.5)), 4), meter.counts(ETPS(keep=0.5))
    (0.4974, (196, 98, 49, 25))
    """

    def __init__(self, model: nn.Module, setting: Setting | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"a {type(model).__name__} is not a model; give one, then what is to be planned for it")
        self.about = description_of(model)
        self._before, self._heads = vars(model).get("squeezevit_state"), model._modules.get("token_reducer")
        self.model, self.setting = restore_(model), setting or Setting()
        self._shares: dict[Reducer, float] = {}

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.release()
        if self._before is None:
            return
        if self._heads is not None:
            self.model.token_reducer = self._heads
        reduce_(self.model, self._before.reducer, grid=self._before.grid)

    @property
    def depth(self) -> int:
        return len(self.about.blocks)

    @cached_property
    def dense(self) -> int:
        """Multiply-adds of the unreduced model for one image."""
        return macs(self.release(), self.setting.image_size)

    @cached_property
    def patches(self) -> int:
        """Patch tokens of the unreduced model. Raises ConfigError for a size that the model does not take."""
        return token_counts(self.hold(Random(keep=1.0)), self.setting.image_size)[0]

    def share(self, reducer: Reducer) -> float:
        """Multiply-adds with a reducer, of those of the unreduced model."""
        if reducer not in self._shares:
            dense = self.dense
            self._shares[reducer] = macs(self.hold(reducer), self.setting.image_size) / dense
        return self._shares[reducer]

    def counts(self, reducer: Reducer) -> tuple[int, ...]:
        """Patch tokens before a reducer's first stage and after each."""
        return token_counts(self.hold(reducer), self.setting.image_size) or (self.patches,)

    def hold(self, reducer: Reducer) -> nn.Module:
        """The model with a reducer in it."""
        try:
            retune_(self.model, reducer)
        except ConfigError:
            if self._heads is not None:
                self.model.token_reducer = self._heads  # used where they fit
            reduce_as_needed_(self.model, reducer)
        return self.model

    def release(self) -> nn.Module:
        """The model without a reducer."""
        return restore_(self.model)
