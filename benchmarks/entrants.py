"""Who runs in the race, and with which settings each is tried: the methods, and the plain loop of the paper's script.

All start from the same pretrained model, with the same network, reward and device, and have twelve trials each.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise, product
from typing import Any

import torch

from orwcfm_fast.benchmarks.plain_loop import PlainLoop, torchcfm_network
from orwcfm_fast.errors import RewardError
from orwcfm_fast.evaluation.drift import coupled_w2, pairwise_distance
from orwcfm_fast.method.callbacks import Progress, ReportProgress
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rewards.digits import classifier_for
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune, Sampling

REWARD = "even-digits"
HELD_OUT = 256
HELD_OUT_SEED = 1000  # of the samples that are looked at, added to the run's own
EPOCH = 24  # plain steps between hard copies
Trial = dict[str, Any]

COMMON: Trial = {"nfe": 8, "warmup": 2, "cooldown": 0.9, "probe": 2, "guard": "off"}
LOOPS: tuple[Trial, ...] = (
    {"rollout": 128, "steps_per_round": 4, "batch": 32},
    {"rollout": 512, "steps_per_round": 16, "batch": 64},
)
RATES = (5e-4, 1e-3, 2e-3)
STRENGTHS: dict[str, tuple[Trial, Trial]] = {  # how strongly the reward pulls: a milder and a stronger one
    "orw-centred": ({"alpha": 1.0, "tau": 2.0}, {"alpha": 0.3, "tau": 2.0}),
    "orw-centred, no anchor": ({"alpha": 0.0, "tau": 1.0}, {"alpha": 0.0, "tau": 2.0}),
    "orw": ({"alpha": 1.0, "tau": 2.0}, {"alpha": 0.3, "tau": 2.0}),
    "nft": ({"nft_beta": 1.0}, {"nft_beta": 0.1}),
    "awm": ({"kl": 0.003}, {"kl": 0.001}),
    "adrpo": ({"adrpo_beta0": 2.0}, {"adrpo_beta0": 1.0}),
    "ram": ({"ram_m": 0.1}, {"ram_m": 0.5}),
    "raft": ({"raft_best_of": 2}, {"raft_best_of": 4}),
}
TRIALS: dict[str, list[Trial]] = {
    name: [{**loop, "lr": lr, **strength} for loop, lr, strength in product(LOOPS, RATES, both)]
    for name, both in STRENGTHS.items()
}
TRIALS["rwr"] = [{**loop, "lr": lr} for loop, lr in product(LOOPS, (1e-4, 2e-4, *RATES, 4e-3))]
TRIALS["plain"] = [
    {"batch": n, "lr": lr, "alpha": 1.0, "tau": 2.0} for n, lr in product((8, 16, 32), (*RATES, 4e-3))
]
PATIENCE = {"plain": 4.0}
"""Times the seconds of the others that an entrant has, in choosing its settings and in the race."""


@dataclass(frozen=True)
class Look:
    """What held-out samples show; seconds and gradient steps since the start, with the looks taken out.

    broke_off: why the run ended before the limit, where it did.
    """

    seconds: float
    steps: int
    reward: float
    w2: float
    diversity: float
    confidence: float
    broke_off: str = ""


@dataclass
class Looks:
    """A clock that stops while samples are looked at: at the start, after `first` seconds, then ever less often.

    Args:
        limit: seconds until the race is over.
        held_out: how many samples are looked at.
        growth: each look comes after so many times the seconds of the one before.
    """

    policy: Policy
    base: Policy
    seed: int
    limit: float
    growth: float
    clock: Callable[[], float]
    held_out: int = HELD_OUT
    first: float = 0.25
    seen: list[Look] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reward = make_reward(REWARD)
        self.x0 = start_noise(self.base, self.held_out, self.seed + HELD_OUT_SEED)
        self.x_ref = sample(self.base, self.x0, Sampling(), self.held_out)
        self.running, self.next = 0.0, self.first
        self.seen.append(self._look(self.x_ref, 0))
        self.began = self.clock()

    def after(self, steps: int) -> bool:
        """Called after a gradient step: whether the race is over.

        Raises:
            RewardError: the samples are no longer finite.
        """
        if self.x0.is_cuda:
            torch.cuda.synchronize()  # steps that are queued count too
        self.running += self.clock() - self.began
        over = self.running >= self.limit
        if over or self.running >= self.next:
            look = self._look(sample(self.policy, self.x0, Sampling(), self.held_out), steps)
            if not math.isfinite(look.reward + look.w2):
                raise RewardError("its samples are not finite")
            self.seen.append(look)
            self.next = self.running * self.growth
        self.began = self.clock()
        return over

    def broke_off(self, reason: str) -> None:
        """From here to the limit there is no reward."""
        last = self.seen[-1]
        self.seen.append(replace(last, seconds=self.running, reward=0.0, confidence=0.0, broke_off=reason))

    def _look(self, x: torch.Tensor, steps: int) -> Look:
        images = self.policy.decode(x)
        classifier = classifier_for(images, "")
        confidence = float(classifier.probabilities(images).max(1).values.mean())
        return Look(
            self.running, steps, float(self.reward(images).mean()), coupled_w2(x, self.x_ref),
            pairwise_distance(classifier.features(images)), confidence,
        )  # fmt: skip


def method_of(name: str) -> str:
    """The method of an entrant that is not the plain loop."""
    return name.partition(",")[0]


class Over(Exception):
    """The limit is reached in the middle of a round."""


def run(name: str, base: Policy, trial: Trial, seed: int, looks: Callable[[Policy], Looks]) -> list[Look]:
    """One entrant from the base's weights to the limit; one that breaks off has no reward from there on.

    Args:
        name: of a method, with what is special about it after a comma, or "plain".
        looks: policy → its clock, started.
    """
    clock, go = (
        _plain(base, trial, seed, looks) if name == "plain" else _method(name, base, trial, seed, looks)
    )
    try:
        go()
    except Over:
        pass
    except RewardError as error:
        clock.broke_off(str(error))
    return clock.seen


Start = tuple[Looks, Callable[[], None]]


def _method(name: str, base: Policy, trial: Trial, seed: int, looks: Callable[[Policy], Looks]) -> Start:
    policy = base.trainable_copy()
    s = Finetune(**COMMON | {"method": method_of(name), "seed": seed} | trial)

    def watch(progress: Progress) -> None:
        steps = progress.round * s.steps_per_round + progress.step
        if progress.stage == "step" and progress.step and clock.after(steps):
            raise Over

    trainer = build_trainer(policy, make_reward(REWARD), s, reference=base, callbacks=[ReportProgress(watch)])
    clock = looks(policy)

    def go() -> None:
        for _ in trainer.train(100_000):
            pass

    return clock, go


def _plain(base: Policy, trial: Trial, seed: int, looks: Callable[[Policy], Looks]) -> Start:
    torch.manual_seed(seed)
    network = torchcfm_network(base.model, base.network.state_dict()).to(base.device)
    loop = PlainLoop(network, make_reward(REWARD), base.shape, **trial)
    clock = looks(Policy(network, base.shape, base.model, base.data))

    def go() -> None:
        for steps in count(1):
            loop.step()
            if steps % EPOCH == 0:
                loop.end_epoch()
            if clock.after(steps):
                raise Over

    return clock, go


# What is read off a run.


def seconds_to(looks: Sequence[Look], reward: float, in_a_row: int = 3) -> float | None:
    """Seconds to the first of three looks in a row with this reward or more; None: never."""
    for k in range(len(looks) - in_a_row + 1):
        if all(look.reward >= reward for look in looks[k : k + in_a_row]):
            return looks[k].seconds
    return None


def reward_after(looks: Sequence[Look], seconds: float) -> float:
    """Reward at these seconds, by straight lines between the looks; the last one's afterwards."""
    return _reward_where(looks, seconds, lambda look: look.seconds)


def reward_at_w2(looks: Sequence[Look], w2: float) -> float:
    """Reward where the coupled W2 first reaches this; the last one's where it does not."""
    return _reward_where(looks, w2, lambda look: look.w2)


def reward_at_diversity(looks: Sequence[Look], share: float) -> float:
    """Reward where the diversity first falls to this share of the start's; the last one's where it does not."""
    return _reward_where(looks, 1 - share, lambda look: 1 - look.diversity / looks[0].diversity)


def _reward_where(looks: Sequence[Look], level: float, of: Callable[[Look], float]) -> float:
    for before, after in pairwise(looks):
        if of(before) < level <= of(after):
            share = (level - of(before)) / (of(after) - of(before))
            return before.reward + share * (after.reward - before.reward)
    return looks[-1].reward


def mean_reward(looks: Sequence[Look], limit: float) -> float:
    """Mean over the seconds up to the limit."""
    ends = [*(look.seconds for look in looks[1:]), limit]
    spans = [max(min(end, limit) - look.seconds, 0) for look, end in zip(looks, ends, strict=True)]
    return sum(s * look.reward for s, look in zip(spans, looks, strict=True)) / sum(spans)


FOR_REWARDS, AFTER, AT_DIVERSITY = (0.65, 0.8), (3.0, 10.0, 30.0), (0.97, 0.9)
AT_W2 = {"digits": (1.0, 1.5, 2.0), "mnist": (2.0, 3.0, 4.0)}
"""Levels at which rewards are read; settings near the pretrained model are chosen at the middle one of digits."""
GOALS: dict[str, Callable[[Sequence[Look], float], float]] = {
    "soon": mean_reward,
    "near": lambda looks, limit: reward_at_w2(looks, AT_W2["digits"][1]),
}
"""What the settings are chosen for: much reward soon, and much reward near the pretrained model."""


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time on a CPU, where races run side by side; on a GPU the time of the wall."""
    return time.perf_counter if device.type == "cuda" else time.process_time
