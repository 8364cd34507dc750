"""Many requests at once, in order."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_flight(ask: Callable[[T], R], cases: Sequence[T], at_once: int) -> list[R]:
    """`ask` of each case on up to `at_once` threads, in order; the first exception ends those that have not begun."""
    with ThreadPoolExecutor(max_workers=max(1, min(at_once, len(cases)))) as pool:
        waiting = [pool.submit(ask, case) for case in cases]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
