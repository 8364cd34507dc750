"""Decodes and scores the samples of a rollout: after it is drawn, or chunk by chunk while the next one is."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards.combine import RewardSum, Scores

WAITING = 2  # chunks of decoded samples that are held while one more is drawn: one being scored, one to come
Prompts = Sequence[Prompt] | None


def decoded(
    policy: Policy, x1: Tensor, condition: Tensor | None, rewards: Sequence[RewardSum]
) -> Iterator[tuple[int, Tensor, Prompts]]:
    """Decoded samples with the number of the first and their prompts; latents a chunk at a time, others all at once.

    Raises:
        WorkError: not even one sample can be decoded; on out-of-memory the chunk is halved before.
    """
    sizes, first = rewards[0].sizes, 0
    while first < len(x1):
        rest, left = x1[first:], None if condition is None else condition[first:]
        if policy.pipeline:

            def decode(size: int, rest: Tensor = rest, left: Tensor | None = left) -> Tensor:
                return policy.decode(rest[:size], None if left is None else left[:size])

            images = sizes.fit("chunk", decode, len(rest))
        else:  # costs nothing; rewards are called on as many samples as they take
            images = policy.decode(rest)
        rows = None if condition is None else condition[first : first + len(images)]
        yield first, images, policy.prompts_of(rows)
        first += len(images)


def own_seed(seed: int, first: int) -> int:
    """The seed of the call whose first sample has this number."""
    return seed + first * 0xBF58476D1CE4E5B9


def decode_and_score(
    policy: Policy,
    x1: Tensor,
    condition: Tensor | None,
    rewards: Sequence[RewardSum],
    where: str = "",
    seed: int = 0,
) -> list[Scores]:
    """The scores of samples x1 [N, *shape] by each of `rewards`; no more than a chunk of decoded latents is held.

    Args:
        condition: the samples' rows [N] of the policy's prompts.
        where, seed: as for `RewardSum.scores`.

    Raises:
        RewardError: as `RewardSum.scores`.
        WorkError: not even one sample can be decoded.
    """
    parts = [
        [reward.scores(images, where, own_seed(seed, first), prompts) for reward in rewards]
        for first, images, prompts in decoded(policy, x1, condition, rewards)
    ]
    return [Scores.joined(found) for found in zip(*parts, strict=True)]


class RolloutScoring:
    """Scores a rollout while it is drawn, in a thread, where every reward is `concurrent`; else afterwards.

    Decoding stays with the caller, who holds the network. Chunks are scored in their order. Of a pipeline the calls and
    their seeds are those of `decode_and_score`; of another policy there is a call for each chunk instead of one for
    all samples, each with a seed of its own.

    Args:
        condition: rows [N] of the policy's prompts of the samples to come.
        rewards, where, seed: as for `decode_and_score`.

    Attributes:
        waited: seconds in which `put` had to wait for the rewards.
    """

    def __init__(
        self, policy: Policy, condition: Tensor | None, rewards: Sequence[RewardSum], where: str, seed: int
    ) -> None:
        self.policy, self.condition, self.rewards = policy, condition, rewards
        self.where, self.seed = where, seed
        self._thread = self._stream = None
        if all(reward.concurrent for reward in rewards):
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
            self._stream = torch.cuda.Stream(policy.device) if policy.device.type == "cuda" else None
        self._parts: list[Future[list[Scores]]] = []
        self._taken, self._failed, self.waited = 0, False, 0.0

    def put(self, x1: Tensor) -> None:
        """Take the next chunk of samples; waits while `WAITING` decoded chunks are not scored yet.

        Raises:
            RewardError: a chunk before it could not be scored.
        """
        if not self._thread:
            return
        start, self._taken = self._taken, self._taken + len(x1)
        rows = None if self.condition is None else self.condition[start : self._taken]
        for first, images, prompts in decoded(self.policy, x1, rows, self.rewards):
            if len(self._parts) >= WAITING:
                began = time.perf_counter()
                self._parts[-WAITING].result()
                self.waited += time.perf_counter() - began
            ready = None
            if self._stream:
                ready = torch.cuda.Event()
                ready.record()
            seed = own_seed(self.seed, start + first)
            self._parts.append(self._thread.submit(self._score, images, prompts, seed, ready))

    def _score(
        self, images: Tensor, prompts: Prompts, seed: int, ready: torch.cuda.Event | None
    ) -> list[Scores]:
        if self._failed:  # the round is over
            return []
        try:
            if not self._stream or not ready:
                return [reward.scores(images, self.where, seed, prompts) for reward in self.rewards]
            with torch.cuda.stream(self._stream):  # not after what is queued for the next chunk
                self._stream.wait_event(ready)
                if images.is_cuda:
                    images.record_stream(self._stream)
                found = [reward.scores(images, self.where, seed, prompts) for reward in self.rewards]
                self._stream.synchronize()  # the caller reads them on another stream
                return found
        except BaseException:
            self._failed = True
            raise

    def result(self, x1: Tensor) -> list[Scores]:
        """The scores of the whole rollout x1 [N, *shape] by each reward.

        Raises:
            RewardError, WorkError: as `decode_and_score`.
        """
        if not self._thread:
            return decode_and_score(self.policy, x1, self.condition, self.rewards, self.where, self.seed)
        parts = [part.result() for part in self._parts]
        return [Scores.joined(found) for found in zip(*parts, strict=True)]

    def close(self) -> None:
        """Drop the chunks that wait, and wait for the one that is being scored."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
