"""One write at a time, in a thread, while the next round is trained."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs a write beside the caller; the next one begins when it is done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Begin `write` once the one before it is done.

        Raises:
            Exception: what the one before it raised.
        """
        self.wait()
        self._pending = self._thread.submit(write)

    @property
    def done(self) -> bool:
        """Whether a write that was begun has ended, well or not, and nobody has waited for it."""
        return self._pending is not None and self._pending.done()

    def wait(self) -> bool:
        """Wait for what is being written; whether something was.

        Raises:
            Exception: what the write raised, once.
        """
        pending = self._pending
        if pending is None:
            return False
        error = pending.exception()
        self._pending = None
        if error:
            raise error
        return True
