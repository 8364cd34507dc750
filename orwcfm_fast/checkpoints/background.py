"""One write at a time, in a thread, while the next round is trained."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs a write beside the caller; the next one begins when it is done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin `write` once the one before it is done.

        Raises:
            Exception: what the one before it raised.
        """
        self.wait()
        self._pending = self._thread.submit(write)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            Exception: what the write raised, once.
        """
        if pending := self._pending:
            error = pending.exception()
            self._pending = None
            if error:
                raise error
