"""Photographs read, decoded and cut while the model computes, by threads, in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from squeezevit.data.folder import image_or_reason, printable
from squeezevit.data.pixels import Preprocessing

Item = TypeVar("Item")
Read = TypeVar("Read")


def at_least(how: Preprocessing, draft: bool) -> int | None:
    """Pixels that the shorter side of a draft needs, None where photographs are decoded whole."""
    return 2 * (max(how.resize) if isinstance(how.resize, tuple) else how.resize) if draft else None


def pixels_of(path: str, how: Preprocessing, at_least: int | None, content: bytes | None = None) -> np.ndarray | str:
    """A file, or its content, resized and cut, uint8 [3, H, W], or why not; within `squeezevit.data.folder.decoding`."""
    image = image_or_reason(path, how.upright, at_least, content)
    if isinstance(image, str):
        return image
    try:
        return how.cut(image)
    except Exception as error:
        return f"it cannot be made ready: {printable(repr(error))}"


@dataclass(frozen=True)
class Patience(Generic[Item, Read]):
    """Seconds to wait for one item, and what stands for an item that took longer."""

    seconds: float
    late: Callable[[Item], Read]


def ahead(
    read: Callable[[Item], Read], items: Iterable[Item], workers: int, most: int, patience: Patience[Item, Read] | None = None
) -> Iterator[Read]:
    """`map` by threads, in order, with at most so many results waiting. Pillow and NumPy let other threads run meanwhile.

    workers: 0 for this thread. patience: after which an item is given up, and its thread left behind; without it, never.
    """
    if workers == 0:
        yield from map(read, items)
        return
    threads = _Threads(read, workers, patience)
    try:
        for item in items:
            threads.submit(item)
            if len(threads.waiting) > most:
                yield threads.first()
        while threads.waiting:
            yield threads.first()
    finally:
        threads.pool.shutdown(wait=patience is None, cancel_futures=True)


class _Threads(Generic[Item, Read]):
    """Threads that read, and what waits for them."""

    def __init__(self, read: Callable[[Item], Read], workers: int, patience: Patience[Item, Read] | None) -> None:
        self.read, self.workers, self.patience = read, workers, patience
        self.pool = ThreadPoolExecutor(workers, "reading")
        self.waiting: deque[tuple[Item, Future[Read]]] = deque()

    def submit(self, item: Item) -> None:
        self.waiting.append((item, self.pool.submit(self.read, item)))

    def first(self) -> Read:
        """The first result; where it takes too long its thread is left behind, and others take over those behind it."""
        item, future = self.waiting.popleft()
        if self.patience is None:
            return future.result()
        try:
            return future.result(self.patience.seconds)
        except TimeoutError:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = ThreadPoolExecutor(self.workers, "reading")
            for _ in range(len(self.waiting)):
                behind, begun = self.waiting.popleft()
                done = begun.done() and not begun.cancelled()
                self.waiting.append((behind, begun if done else self.pool.submit(self.read, behind)))
            return self.patience.late(item)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
