"""One process a run: a lock that the system takes back when its holder dies, so that none goes stale."""

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

from orwcfm_fast.errors import UserError, warn

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """Held from its making until `release` or the end of the process, by kill -9 too.

    Raises:
        UserError: another process works in that folder; names it.
        OSError: the folder is not there or not writable.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._handle, 100, 0).decode("ascii", "replace").strip() or "another process"
            self.release()
            raise UserError(f"run {folder}: {holder} is at work in it; wait for it or end it") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                self.release()
                raise
            warn(f"{folder}: this file system has no locks; see to it that one process at a time works there")
        else:
            os.ftruncate(self._handle, 0)
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(self._handle, f"process {os.getpid()} (since {began})\n".encode(), 0)
            _held.add(self)

    def release(self) -> None:
        """Let others in; the file stays, or two could each lock one of that name."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _release_in_child() -> None:
    # a reward's worker processes must not outlive their parent with its lock
    for lock in _held:
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
