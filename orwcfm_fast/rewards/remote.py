"""A reward on a server: samples go out as safetensors over HTTP, scores come back; `orwcfm rewards serve` is one."""

import os
import random
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.rewards import wire
from orwcfm_fast.rewards.library import library
from orwcfm_fast.rewards.parallel import in_flight
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

PART = 16 << 20
"""Bytes of samples that one request carries at most, unless one sample is larger."""
RETRIES = 5
"""How often a request is repeated after no answer, 429 or 5xx; the waits are 0.25 s, 0.5 s, … up to 8 s."""
PASSING = (429, 500, 502, 503, 504)
TOKEN = "ORWCFM_REWARD_TOKEN"


class Answer(NamedTuple):
    """What a server sent back: HTTP's status and the body."""

    status: int
    data: bytes


class RemoteReward:
    """The client of a reward server; parts of a batch are scored at the same time and come back in order.

    Args:
        url: of the server, with the path that takes the samples.
        options: requests in flight, seconds to wait for an answer.
    """

    concurrent = True

    def __init__(self, url: str, options: RewardOptions) -> None:
        urllib3 = library("urllib3", "http")
        self.url, self.at_once = url, options.reward_requests
        retries = urllib3.Retry(
            total=RETRIES, redirect=0, status_forcelist=PASSING, allowed_methods=None, backoff_factor=0.25,
            backoff_max=8, raise_on_status=False, raise_on_redirect=False, respect_retry_after_header=False,
        )  # fmt: skip
        self._pool = urllib3.PoolManager(
            maxsize=self.at_once, block=True, retries=retries, timeout=options.reward_timeout
        )
        token = os.environ.get(TOKEN, "")
        self._headers = {"Content-Type": wire.TYPE} | ({"Authorization": f"Bearer {token}"} if token else {})

    def check_server(self) -> None:
        """Ask whether something answers there.

        Raises:
            UserError: nothing does, or it refuses.
        """
        try:
            answer = self._request("GET", None, 1 << 16)
        except RewardError as error:
            raise UserError(f"reward '{self.url}': {error}") from None
        if answer.status in (401, 403, 404):
            raise UserError(f"reward '{self.url}': {_told(answer)}")

    def __call__(
        self,
        samples: Tensor,
        prompts: list[str] | None = None,
        metadata: list[dict] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Samples [B, …] → scores [B] float64 on the CPU; prompts and metadata go along.

        Args:
            seed: of the seeds that the requests carry.

        Raises:
            MemoryError: the server ran out of memory (HTTP 507).
            RewardError: no answer after all repeats, or one that is no scores of these samples.
        """
        samples = samples.to("cpu", torch.float32)
        seeds = random.Random(seed)
        size = max(1, PART // max(1, 4 * samples[0].numel()))
        parts: list[tuple[Tensor, dict[str, Any]]] = []
        for start in range(0, len(samples), size):
            own = slice(start, start + size)
            notes = {"prompts": prompts and prompts[own], "metadata": metadata and metadata[own]}
            parts.append((samples[own], notes | {"seed": seeds.getrandbits(63)}))
        return torch.cat(in_flight(self._score, parts, self.at_once))

    def _score(self, part: tuple[Tensor, dict[str, Any]]) -> Tensor:
        samples, notes = part
        answer = self._request("POST", wire.pack("samples", samples, notes), 8 * len(samples) + (1 << 20))
        if answer.status == 507:
            raise MemoryError(_told(answer))
        if answer.status != 200:
            raise RewardError(_told(answer))
        try:
            scores, _ = wire.unpack(answer.data, "scores")
        except ValueError as error:
            raise RewardError(f"the answer is {error}") from None
        if scores.shape != (len(samples),):
            raise RewardError(
                f"returned shape {tuple(scores.shape)}, should be ({len(samples)},): one a sample"
            )
        return scores.double()

    def _request(self, method: str, body: bytes | None, limit: int) -> Answer:
        urllib3 = library("urllib3", "http")
        try:
            answer = self._pool.request(
                method, self.url, body=body, headers=self._headers, preload_content=False
            )
            data = answer.read(limit + 1, decode_content=False)
            if len(data) > limit:
                answer.close()
            answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise RewardError(
                f"no answer in {RETRIES + 1} attempts ({reason.rpartition(': ')[2][:120]})"
            ) from None
        if len(data) > limit:
            raise RewardError(f"the answer is over {limit} bytes")
        return Answer(answer.status, data)

    def close(self) -> None:
        """Close the connections; the next call would open others."""
        self._pool.clear()


def _told(answer: Answer) -> str:
    """HTTP status and the first line that the server wrote, where it is no page."""
    line = answer.data[:2000].decode(errors="replace").strip().split("\n")[0][:160]
    line = "" if line.startswith("<") else line
    if answer.status == 401:
        line = f"set {TOKEN} to the server's token"
    return f"HTTP {answer.status}" + (f" ({line})" if line else "")


def _make(scheme: str, argument: str, options: RewardOptions) -> Reward:
    if not re.fullmatch(r"//[^/\s@]+(/\S*)?", argument):
        raise UserError(f"reward '{scheme}:{argument}': write the server's URL, e.g. http://127.0.0.1:8400")
    found = RemoteReward(f"{scheme}:{argument}", options)
    found.check_server()
    return found


@reward_factory("http")
def http(argument: str, options: RewardOptions) -> Reward:
    """http://HOST:PORT, scores of a server, e.g. of `orwcfm rewards serve`"""
    return _make("http", argument, options)


@reward_factory("https")
def https(argument: str, options: RewardOptions) -> Reward:
    """https://HOST/PATH, the same over TLS"""
    return _make("https", argument, options)
