"""Small files: read no more than was bargained for, written whole or not at all."""

import errno
import os
import stat
from pathlib import Path

from orwcfm_fast.errors import WorkError


def read_small(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: not there; a folder, device or pipe (which might never end); more than `most` bytes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a file")
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"over {most >> 20} MiB")
    return data


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
