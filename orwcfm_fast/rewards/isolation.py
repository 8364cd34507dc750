"""Runs code that users bring, so that the process is afterwards as it was before."""

import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGE = Path(__file__).parent.parent


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_benchmark(on: bool) -> None:
    torch.backends.cudnn.benchmark = on


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed
        return ""


def _change_folder(path: str) -> None:
    with suppress(OSError):
        os.chdir(path)


GLOBAL_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (lambda: torch.backends.cudnn.benchmark, _set_benchmark),
    (np.geterr, lambda found: np.seterr(**found)),
    (_folder, _change_folder),
    (lambda: list(sys.path), lambda found: sys.path.__setitem__(slice(None), found)),
)


@contextmanager
def isolated(seed: int = 0, device: torch.device | None = None) -> Iterator[None]:
    """Run a reward's code in this context.

    What it prints on standard output, also from C and from child processes, goes to standard error. The global
    random generators of torch, NumPy and Python are seeded; their state, the settings of `GLOBAL_STATE` and the
    handlers of SIGINT and SIGTERM are restored at the end.

    Args:
        device: a CUDA device whose generator is seeded and restored too.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device and device.type == "cuda" else []))
        for read, write in GLOBAL_STATE:
            stack.callback(_restore, read, write, read())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) is not None:
                    stack.callback(signal.signal, number, handler)
        stack.enter_context(_output_to_stderr())
        torch.manual_seed(seed % 2**63)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def _restore(read: Callable[[], Any], write: Callable[[Any], Any], before: Any) -> None:
    if read() != before:
        write(before)


@contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Standard output is standard error: of Python, and of the process where it has both."""
    sys.stdout.flush()
    saved = -1
    with suppress(OSError):  # started without one of them
        os.fstat(2)
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved >= 0:
            os.dup2(saved, 1)
            os.close(saved)


def describe(error: BaseException) -> str:
    """One line: the error's kind, its text, and where in the user's own code it was raised."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        text = f"called sys.exit({error.code!r})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and PACKAGE not in Path(f.filename).parents]
    own = [f for f in own if not f.filename.startswith("<frozen")]
    return text.split("\n")[0] + (f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "")
