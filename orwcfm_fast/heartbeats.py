"""Signs of life between ranks: a rank that is gone is missed after minutes, not after the patience of an exchange.

gloo sees at once that a process has ended; NCCL, a host without power and a process that hangs give no sign at all, and
the others would wait inside an exchange for as long as a slow reward may take.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

INTERVAL = 10.0  # seconds between signs
MISSED = 600.0  # seconds without one after which a rank is lost: Python may be busy in a library for minutes


@contextmanager
def heartbeats(store: dist.Store, rank: int, world: int) -> Iterator[None]:
    """Inside, a thread gives signs of life and watches the next rank; it ends the process where that one is lost.

    Each rank watches one other, so that a thousand of them do not ask the store for more than a thousand signs. The
    process ends with exit code 1: torchrun then ends the others, and starts all again where it may.
    """
    over, own = threading.Event(), store.clone()
    thread = threading.Thread(target=_beat, args=(own, rank, (rank + 1) % world, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _beat(store: dist.Store, rank: int, other: int, over: threading.Event) -> None:
    count, seen, quiet = 0, b"", 0.0
    while True:
        try:
            store.set(f"beat/{rank}", str(count := count + 1))
            found = store.get(f"beat/{other}") if store.check([f"beat/{other}"]) else b""
        except RuntimeError:  # the store is gone with the rank that held it
            found = seen
        quiet = 0.0 if found != seen else quiet + INTERVAL
        seen = found
        if over.wait(INTERVAL):
            return
        if quiet >= MISSED:
            os.write(
                2,
                f"error: no sign of life of rank {other} for {MISSED:g} s; the last checkpoint stays\n".encode(),
            )
            os._exit(1)
