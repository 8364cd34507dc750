"""What the headers of weight files claim, checked before the files are opened: a lie costs no memory."""

import json
import os
import pickle
import zipfile
from pathlib import Path

from orwcfm_fast.files import open_regular

MAX_HEADER_BYTES = 16 << 20
MAX_PICKLE_BYTES = 64 << 20


def memory_bytes() -> int:
    """Of this machine, in all."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_size(size: int) -> None:
    if size > memory_bytes():
        raise ValueError(f"{size >> 30} GiB, more than this machine's memory")


def check_safetensors(path: Path) -> None:
    """The header is a JSON object whose tensors fill the file exactly.

    Raises:
        ValueError: it is not, or the file is larger than memory; says which.
        OSError: no such file, or not a file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(size)
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header claims {length:,} bytes of a file of {size:,}")
        try:
            header = json.loads(file.read(length))
            spans = [v["data_offsets"] for k, v in header.items() if k != "__metadata__"]
            ends = [(int(start), int(end)) for start, end in spans]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            raise ValueError("its header is not one of safetensors") from None
    if sum(end - start for start, end in ends) != size - 8 - length or any(a < 0 or b < a for a, b in ends):
        raise ValueError(f"its tensors do not fill the {size:,} bytes of the file")


def check_pt(path: Path) -> None:
    """A zip archive as torch writes it: nothing compressed, nothing larger than the file that holds it.

    Raises:
        ValueError: it is none; says why.
        OSError: no such file, or not a file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(size)
        start = file.read(2)
        if start[:1] == pickle.PROTO:
            raise ValueError(
                "refused, a bare pickle; torch 1.6 and later save zip archives: save it again with one"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile raises many kinds for what is no archive
            raise ValueError("not a torch checkpoint, or a truncated one") from error
    if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
        raise ValueError("refused, its entries are compressed: not as torch writes them")
    if sum(e.file_size for e in entries) > size:
        raise ValueError(f"refused, its entries claim more than the {size:,} bytes of the file")
    if any(e.filename.endswith("data.pkl") and e.file_size > MAX_PICKLE_BYTES for e in entries):
        raise ValueError(f"refused, its pickle is over {MAX_PICKLE_BYTES >> 20} MiB")
