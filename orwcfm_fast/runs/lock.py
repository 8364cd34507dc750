"""One process per run directory: a file lock that the system releases when its holder ends, however that happens."""

import errno
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from orwcfm_fast.errors import UserError, warn
from orwcfm_fast.files import open_regular

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """The lock of a run directory, held from construction until `release` or the end of the process.

    filelock keeps it out of forked children, so that a reward's worker processes cannot outlive their parent with it.

    Raises:
        UserError: another process holds it; the message names that process.
        OSError: the directory does not exist or is not writable.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        # the file stays after release: were it removed, two processes could each lock a file of that name
        self._lock = FileLock(
            path, blocking=False, thread_local=False, preserve_lock_file=True, on_acquired=_write_holder
        )
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"run {folder}: {_holder(path)} is at work in it; wait for it or end it"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            warn(
                f"{folder}: this file system has no locks; make sure that only one process at a time works there"
            )

    def release(self) -> None:
        """Let another process take the lock."""
        self._lock.release()


def _write_holder(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})\n".encode(), 0)


def _holder(path: Path) -> str:
    with open_regular(path) as file:
        return file.read(100).decode("ascii", "replace").strip() or "another process"
