"""Small files: read no more than was bargained for, written whole or not at all."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from orwcfm_fast.errors import WorkError


def open_regular(path: Path) -> BinaryIO:
    """A regular file for reading; a folder, device or pipe (which might never end) is an OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a file")
    return os.fdopen(handle, "rb")


def read_small(path: Path, most: int) -> bytes:
    """The bytes of a regular file; an OSError where they are more than `most`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"over {most:,} bytes")
        return file.read(size)


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, then rename: a reader sees the old text or the new.

    Raises:
        WorkError: no room, or the folder is gone.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise WorkError(f"{path}: {error.strerror or error}") from None
