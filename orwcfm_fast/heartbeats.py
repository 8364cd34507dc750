"""Signs of life between ranks: a rank that is gone is missed after minutes, not after the patience of an exchange.

gloo sees at once that a process has ended; NCCL, a host without power and a process that hangs give no sign at all, and
the others would wait inside an exchange for as long as a slow reward may take.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

INTERVAL = 10.0  # seconds between signs
MISSED = 600.0  # seconds without one after which a rank is lost: Python may be busy in a library for minutes


@contextmanager
def heartbeats(store: dist.Store, rank: int, world: int) -> Iterator[None]:
    """Inside, a thread gives signs of life and watches the next rank; it ends the process where that one is lost.

    Each rank watches one other, so that a thousand of them do not ask the store for more than a thousand signs. The
    process ends with exit code 1: torchrun then ends the others, and starts all again where it may.
    """
    signs = _Signs(store.clone(), rank, (rank + 1) % world)
    for loop in (signs.give, signs.watch):  # two: the store may let the first wait for ever
        threading.Thread(target=loop, daemon=True).start()
    try:
        yield
    finally:
        signs.over.set()


class _Signs:
    """The signs of life of `rank` and of the `other` that it watches, and when the last of the other's was new."""

    def __init__(self, store: dist.Store, rank: int, other: int) -> None:
        self.store, self.rank, self.other = store, rank, other
        self.over, self.seen, self.last = threading.Event(), b"", time.monotonic()

    def give(self) -> None:
        count, key = 0, f"beat/{self.other}"
        while True:
            with suppress(RuntimeError):  # of a store that is gone with the host that held it
                self.store.set(f"beat/{self.rank}", str(count := count + 1))
                if self.store.check([key]) and (found := self.store.get(key)) != self.seen:
                    self.seen, self.last = found, time.monotonic()
            if self.over.wait(INTERVAL):
                return

    def watch(self) -> None:
        while not self.over.wait(INTERVAL):
            if time.monotonic() - self.last >= MISSED:
                lost = f"rank {self.other}, or of the host where all ranks meet,"
                line = f"error: no sign of life of {lost} for {MISSED:g} s; the last checkpoint stays\n"
                os.write(2, line.encode())
                os._exit(1)
