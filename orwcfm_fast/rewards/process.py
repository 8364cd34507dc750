"""A reward in a Python environment of its own: a worker process that samples are sent to."""

import atexit
import functools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

WORKER = Path(__file__).with_name("worker.py")
PART = 16 << 20
"""Bytes of samples that are sent at once."""
ATTEMPTS = 3
"""How often one batch is given to a worker that dies over it."""


class Died(Exception):
    """The worker ended by itself."""


class ProcessReward:
    """A function of another Python environment, called in a worker process that is started again if it dies.

    Args:
        python: that environment's interpreter.
        where, function: FILE.py or package.module, and the function in it.
        timeout: seconds to wait for one answer, or for the worker to start.
    """

    concurrent = True

    def __init__(self, python: Path, where: str, function: str, timeout: float) -> None:
        self.python, self.where, self.function, self.timeout = python, where, function, timeout
        self._process: subprocess.Popen | None = None

    def __call__(
        self,
        samples: Tensor,
        prompts: list[str] | None = None,
        metadata: list[dict] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Samples [B, …] → scores [B], float64 on the CPU; prompts and metadata go on to a function that takes them.

        Args:
            seed: of the worker's random generators.

        Raises:
            MemoryError: the function ran out of memory.
            RewardError: the function raised or answered another number of scores, the worker died over this batch
                three times, or did not answer in time.
        """
        request = {"shape": list(samples.shape), "seed": random.Random(seed).getrandbits(63)}
        both = {"prompts": prompts, "metadata": metadata}
        request |= {key: values for key, values in both.items() if values is not None}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._process is None:
                    self.start()
                return self._request(samples.detach().to("cpu", torch.float32).contiguous(), request)
            except Died as death:
                if attempt == ATTEMPTS:
                    raise RewardError(
                        f"its worker was {death}, {ATTEMPTS} times over the same samples"
                    ) from None
                print(f"warning: {self} was {death}; started again", file=sys.stderr)
        raise AssertionError

    def __str__(self) -> str:
        return f"worker {self.python} {self.where}:{self.function}"

    def start(self) -> None:
        """Start the worker and wait until it has imported the function.

        Raises:
            UserError: it cannot: no such interpreter, a package missing in its environment, no such function.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._line, far = multiprocessing.Pipe()
        try:
            self._process = subprocess.Popen(
                [self.python, WORKER, self.where, self.function, str(far.fileno())],
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, pass_fds=(far.fileno(),),
                start_new_session=True,  # Ctrl-C is for the run, which then closes its worker
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{self}: {error.strerror or error}") from None
        finally:
            far.close()
        atexit.register(self.close)
        try:
            answer = self._answer("start")
        except (EOFError, OSError):
            raise Died(self._obituary()) from None
        if "error" in answer:
            self.close()
            raise UserError(f"{self}: {answer['error']}")

    def _request(self, samples: Tensor, request: dict[str, Any]) -> Tensor:
        n = len(samples)
        try:
            self._line.send_bytes(json.dumps(request).encode())
            answer = self._answer("answer")
            if "room" in answer:
                self._send(memoryview(samples.flatten().numpy().data).cast("B"))
                answer = self._answer("answer")
            if "scores" in answer:
                return torch.frombuffer(bytearray(self._line.recv_bytes()), dtype=torch.float64)
        except (EOFError, OSError):
            raise Died(self._obituary()) from None
        if "full" in answer:
            raise MemoryError(answer["full"])
        if "wrong_shape" in answer:
            shape = tuple(answer["wrong_shape"])
            raise RewardError(f"returned shape {shape}, should be ({n},): one a sample")
        raise RewardError(answer["error"])

    def _send(self, data: memoryview) -> None:
        """All parts; a worker that does not take them within the timeout is killed, which ends the sending."""
        assert self._process
        limit = threading.Timer(self.timeout, self._process.kill)
        limit.start()
        try:
            for start in range(0, len(data), PART):
                self._line.send_bytes(data[start : start + PART])
        finally:
            limit.cancel()

    def _answer(self, what: str) -> dict[str, Any]:
        """The worker's next message.

        Raises:
            EOFError, OSError: it ended. RewardError: it does not answer in time.
        """
        if not self._line.poll(self.timeout):
            self.close()
            raise RewardError(f"its worker did not {what} within {self.timeout:g} s (--reward-timeout)")
        return json.loads(self._line.recv_bytes())

    def _obituary(self) -> str:
        """How the worker ended, and the last line that it wrote."""
        assert self._process
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"killed by signal {-code}" if code < 0 else f"gone with exit code {code}"
        return how + (f" ({lines[-1].strip()})" if lines else "")

    def close(self) -> None:
        """End the worker; the next call would start another."""
        atexit.unregister(self.close)
        if self._process is None:
            return
        process, self._process = self._process, None
        self._line.close()
        try:
            process.wait(0.2)  # idle, it ends by itself when the line is cut
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.close()


@functools.cache
def _worker(python: Path, where: str, function: str, timeout: float) -> ProcessReward:
    """One worker for each function, however often the reward is made."""
    return ProcessReward(python, where, function, timeout)


@reward_factory("process")
def process(argument: str, options: RewardOptions) -> Reward:
    """process:PYTHON:FILE.py:FUNCTION, a function of another Python environment (its interpreter or folder)"""
    parts = argument.rsplit(":", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"reward 'process:{argument}': write process:PYTHON:FILE.py:FUNCTION (or package.module:FUNCTION)"
        )
    python, where = Path(parts[0]).expanduser(), parts[1]
    if (python / "bin" / "python").exists():
        python = python / "bin" / "python"
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise UserError(f"reward 'process': {parts[0]} is no Python interpreter and no environment's folder")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise UserError(f"reward 'process': no file {where}")
        where = str(Path(where).absolute())
    worker = _worker(python.absolute(), where, parts[2], options.reward_timeout)
    if worker._process is None:
        try:
            worker.start()
        except (Died, RewardError) as error:
            raise UserError(f"{worker} did not start: {error}") from None
    return worker
