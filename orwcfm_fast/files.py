"""Small files: a size limit when reading, whole or not at all when writing."""

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


def read_text(path: Path, most: int) -> str:
    """The text of a regular file in UTF-8; a byte-order mark at its start is no part of it.

    Raises:
        OSError: no such file, not a file, or more than `most` bytes.
        ValueError: not text in UTF-8.
    """
    text = read_small(path, most).decode("utf-8-sig")
    if "\0" in text:  # of UTF-16 without a byte-order mark, whose bytes are UTF-8 as well
        raise ValueError("holds NUL characters, so it is not text in UTF-8")
    return text


def lines(text: str) -> list[str]:
    """Lines end with \\n or \\r\\n alone: str.splitlines would also split at U+0085, U+2028, \\x0b and others."""
    return [line.removesuffix("\r") for line in text.split("\n")]


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
