"""Ctrl-C and SIGTERM stop training at a point from which it can resume; a second Ctrl-C ends the process at once."""

import os
import signal
import socket
import threading
from types import FrameType

from orwcfm_fast.method.callbacks import Callback

DEADLINE = 45.0
"""Seconds after SIGTERM in which one process of many must come to where it can save."""
SHOW_CURSOR = b"\x1b[?25h"  # a live progress bar hides it


def _forget_signals() -> None:
    """In a forked child, of a reward, say: its signals are not this process's."""
    signal.set_wakeup_fd(-1)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if isinstance(getattr(signal.getsignal(number), "__self__", None), SignalHandler):
            signal.signal(number, usual)


os.register_at_fork(after_in_child=_forget_signals)


class StopRequested(Exception):
    """Raised by `SignalHandler.raise_if_stopped` where the state of training is consistent and can be saved."""


class SignalHandler(Callback):
    """Within `with`, the first SIGINT or SIGTERM is only noted, and the next `raise_if_stopped` raises StopRequested.

    A second Ctrl-C ends the process at once with exit code 130. Outside the main thread, where Python delivers no
    signals, nothing is caught.

    Args:
        exit_message: the line printed by a second Ctrl-C; with an empty one, no signal prints anything.
        deadline: seconds after a SIGTERM within which the process must come to where it can save, or it ends: one that
            waits inside an exchange for a rank that is gone never does. What was saved last stays. None: no such end.

    Attributes:
        signal: number of the first signal received, or None.
    """

    def __init__(self, exit_message: str, deadline: float | None = None) -> None:
        self.exit_message, self.deadline = exit_message, deadline
        self._left = threading.Event()
        self._wakeup: tuple[int, socket.socket] | None = None
        self.signal: int | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._caught)
            if self.deadline is not None:
                self._watch(self.deadline)
        return self

    def _watch(self, deadline: float) -> None:
        """A thread that ends the process; a handler alone would run only when the main thread is back in Python."""
        there, here = socket.socketpair()
        there.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False), there

        def wait() -> None:
            while (received := here.recv(1)) and received[0] != signal.SIGTERM:
                pass
            if received and not self._left.wait(deadline):
                os.write(
                    2, f"error: still busy {deadline:g} s after SIGTERM; the last checkpoint stays\n".encode()
                )
                os._exit(128 + signal.SIGTERM)
            here.close()

        threading.Thread(target=wait, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._wakeup:
            before, there = self._wakeup
            signal.set_wakeup_fd(before)
            there.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 130 or 143."""
        return 128 + (self.signal or signal.SIGINT)

    def raise_if_stopped(self) -> None:
        """Raise StopRequested if a signal was received; called where training can be saved."""
        if self.signal is not None:
            self._left.set()
            raise StopRequested

    def on_boundary(self, trainer) -> None:
        """As a trainer's callback: leave the round here."""
        self.raise_if_stopped()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        # os.write, because the handler may interrupt a buffered write
        if self.signal is None:
            self.signal = number
            if self.exit_message and os.isatty(2):
                os.write(2, b"\nstopping after this step, then saving; Ctrl-C again leaves at once\n")
        elif number == signal.SIGINT:
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            if self.exit_message:
                os.write(2, f"error: {self.exit_message}\n".encode())
            os._exit(128 + number)
