"""Timing several callables against each other on a machine that others use too."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from squeezevit.core.running import wait_for

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timings(Generic[Name]):
    """Seconds of each case in each round. Ratios are taken within rounds, where both cases saw the same machine."""

    seconds: Mapping[Name, list[float]]

    def best(self, name: Name) -> float:
        return min(self.seconds[name])

    def median(self, name: Name) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: Name, to: Name) -> float:
        """Median over rounds of the time of `name` divided by that of `to`."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))

    def best_ratio(self, name: Name, to: Name) -> float:
        """The fastest round of `name` divided by the fastest of `to`."""
        return self.best(name) / self.best(to)


def alternate(
    cases: Mapping[Name, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Timings[Name]:
    """Run every case once a round, forwards in even rounds and backwards in odd ones, after `warmup` rounds not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in cases}
    for round_ in range(-warmup, rounds):
        order = list(cases) if round_ % 2 == 0 else list(cases)[::-1]
        for name in order:
            wait_for(device)
            start = time.perf_counter()
            cases[name]()
            wait_for(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
        if progress is not None:
            progress(round_ + warmup + 1, rounds + warmup)
    return Timings(seconds)
