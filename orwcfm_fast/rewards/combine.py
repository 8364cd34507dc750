"""Makes one reward, a weighted sum, of the rewards that the user names: NAME[:ARG][=WEIGHT], once or more."""

import math
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.errors import RewardError, UserError, WorkError
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards.registry import REWARDS, Reward
from orwcfm_fast.rewards.scoring import score
from orwcfm_fast.rewards.standardize import standardize
from orwcfm_fast.rewards.user import is_user_reward, load_user_reward
from orwcfm_fast.settings import RewardOptions, RewardsWithHoldout


@dataclass(frozen=True)
class Scores:
    """The scores of N samples by each reward.

    Attributes:
        values: by name, [N], as the reward gave them.
        weights: by name.
        seconds: by name, wall clock.
    """

    values: dict[str, Tensor]
    weights: dict[str, float]
    seconds: dict[str, float]

    @property
    def total(self) -> Tensor:
        """Σ weight · reward [N]."""
        return self._add_up(self.values)

    def standardized(self) -> Tensor:
        """Σ weight · (reward − mean) / deviation [N]: each reward counts by its weight alone, whatever its unit.

        A reward that is the same for all N says nothing and adds 0.
        """
        return self._add_up({name: standardize(values) for name, values in self.values.items()})

    def _add_up(self, values: dict[str, Tensor]) -> Tensor:
        first, *others = (self.weights[name] * v for name, v in values.items())
        for other in others:
            first = first + other
        return first

    def each(self, change: Callable[[Tensor], Tensor]) -> "Scores":
        """The same with every reward's values changed."""
        return replace(self, values={name: change(values) for name, values in self.values.items()})

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Of all samples, from those of parts of them in order."""
        first = parts[0]
        values = {name: torch.cat([part.values[name] for part in parts]) for name in first.values}
        seconds = {name: sum(part.seconds[name] for part in parts) for name in first.seconds}
        return cls(values, first.weights, seconds)

    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.values.items()}


def scores_record(scores: Scores, held_out: Scores | None) -> dict[str, Any]:
    """Metrics of rewards one by one, where there are several or some are held out."""
    found: dict[str, Any] = {}
    if len(scores.values) > 1:
        found["rewards"] = scores.means()
    if held_out:
        found["holdout_mean"] = float(held_out.total.mean())
        found["holdout_std"] = float(held_out.total.std(correction=0))
        if len(held_out.values) > 1:
            found["holdout_rewards"] = held_out.means()
    seconds = scores.seconds | (held_out.seconds if held_out else {})
    return found | ({"seconds_rewards": seconds} if len(seconds) > 1 else {})


@dataclass
class RewardSum:
    """Σ weight_k · reward_k of decoded samples [B, …] → [B]; `terms` are (name, weight, function).

    Attributes:
        sizes: maximum batch size of a reward call (`reward_batch`).
    """

    terms: list[tuple[str, float, Reward]]
    sizes: BatchSizes = field(default_factory=BatchSizes, repr=False)

    @property
    def name(self) -> str:
        return "+".join(name for name, _, _ in self.terms)

    @property
    def concurrent(self) -> bool:
        """Whether every one of them may be called in a thread while the next samples are drawn."""
        return all(getattr(function, "concurrent", False) for _, _, function in self.terms)

    def scores(
        self, samples: Tensor, where: str = "", seed: int = 0, prompts: Sequence[Prompt] | None = None
    ) -> Scores:
        """Every reward of the samples; `where` is named in errors, `seed` for those that draw random numbers.

        Args:
            prompts: of each sample, for the rewards that take them.

        Raises:
            RewardError: one of them raised, returned what is no reward, or lacks the memory for a single sample;
                names it.
        """
        found = Scores({}, {}, {})
        if samples.is_cuda:
            torch.cuda.current_stream(
                samples.device
            ).synchronize()  # or the first would be charged for the rollout
        for name, weight, function in self.terms:
            began = time.perf_counter()
            found.values[name] = self._in_batches(function, samples, name, where, seed, prompts)
            found.seconds[name] = time.perf_counter() - began
            found.weights[name] = weight
        return found

    def _in_batches(
        self,
        function: Reward,
        samples: Tensor,
        name: str,
        where: str,
        seed: int,
        prompts: Sequence[Prompt] | None,
    ) -> Tensor:
        """`score` in batches that fit into memory, each with a seed of its own."""

        def scored(size: int) -> Tensor:
            parts = []
            for k, part in enumerate(samples.split(size)):
                own = None if prompts is None else prompts[k * size : (k + 1) * size]
                parts.append(score(function, part, name, where, seed + k * 0x9E3779B97F4A7C15, own))
            return torch.cat(parts)

        n = max(1, len(samples))
        try:
            return self.sizes.fit("reward_batch", scored, n)
        except RewardError:
            raise
        except WorkError as error:
            raise RewardError(f"reward {name}{', ' + where if where else ''}: {error}") from None

    def __call__(self, samples: Tensor) -> Tensor:
        return self.scores(samples).total

    def check_prompts(self, policy: Policy) -> None:
        """Let each reward that has a `check_prompts` look at the policy's prompts before samples are drawn.

        Raises:
            UserError: a reward cannot use one of them.
        """
        texts = [prompt.text for prompt in policy.conditions.prompts] if policy.conditions else []
        for _, _, function in self.terms:
            if callable(check := getattr(function, "check_prompts", None)):
                check(texts)

    def close(self) -> None:
        """End what the rewards keep running, e.g. worker processes."""
        for _, _, function in self.terms:
            if callable(end := getattr(function, "close", None)):
                end()


def make_reward(
    specs: Sequence[str] | str | Callable, options: RewardOptions | None = None, name: str = ""
) -> RewardSum:
    """The reward that the user named.

    Args:
        specs: one or several `NAME[:ARG][=WEIGHT]`; NAME of the registry, file.py:function or
            package.module:function; or a callable.
        options: what some rewards need besides, e.g. clip its prompts.
        name: of a callable in messages; by default its own.

    Raises:
        UserError: unknown name (the nearest known one), bad argument or weight, a name given twice.
    """
    if isinstance(specs, RewardSum):
        return specs
    if callable(specs):
        return RewardSum([(name or getattr(specs, "__name__", "reward"), 1.0, specs)])
    specs = [specs] if isinstance(specs, str) else specs
    if not specs:
        raise UserError("no reward named (orwcfm list rewards)")
    options = options or RewardOptions()
    split = [split_weight(spec) for spec in specs]
    names = [name for name, _ in split]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward '{name}': named twice; give it one weight, e.g. {name}=2")
    terms = [(name, weight, _function(name, options)) for name, weight in split]
    return RewardSum(terms, BatchSizes(reward_batch=options.reward_batch))


def user_code(specs: Sequence[str]) -> list[str]:
    """Those of `specs` that would run a user's code, or send samples to a server that someone named."""

    def is_code(spec: str) -> bool:
        base = spec.partition(":")[0]
        return base in ("process", "judge", "http", "https") or (
            base not in REWARDS.names() and is_user_reward(spec)
        )

    return [s for s in specs if is_code(s)]


def check_code_named(
    specs: Sequence[str], named: Sequence[str], where: Path | str, key: str = "reward"
) -> None:
    """Code or a server that a run's own files name may come from anyone: it is used only if the user names it too.

    Args:
        specs: the rewards that the file `where` asks for under `key`.
        named: those that the user gave on the command line.

    Raises:
        UserError: one of `specs` is code or a server, and the user has not named them.
    """
    if user_code(specs) and list(named) != list(specs):
        flag = f"--{key.replace('_', '-')}"
        again = " ".join(f"{flag} {shlex.quote(s)}" for s in specs)
        raise UserError(
            f"{where}: its {key} is code or a server, which is used only if you name it too: add {again}"
        )


def make_holdout(options: RewardsWithHoldout) -> RewardSum | None:
    """The rewards of --holdout-reward, measured but never trained on; None without any.

    Raises:
        UserError: as `make_reward`, and for one that is trained on as well.
    """
    trained = {split_weight(spec)[0] for spec in options.reward}
    for spec in options.holdout_reward:
        if (name := split_weight(spec)[0]) in trained:
            raise UserError(f"holdout-reward '{name}': is trained on as well; hold out another one")
    return make_reward(options.holdout_reward, options) if options.holdout_reward else None


def split_weight(spec: str) -> tuple[str, float]:
    """NAME[=WEIGHT] to its parts; an = within a path or before a file's ending is part of the name.

    Raises:
        UserError: what follows = is neither a finite number nor part of a path.
    """
    head, equals, tail = spec.rpartition("=")
    if not equals:
        return spec, 1.0
    try:
        weight = float(tail)
    except ValueError:
        if re.search(r"[/\\:]|\.[A-Za-z]\w*$", tail):
            return spec, 1.0
        raise UserError(f"reward '{spec}': the weight after = should be a number, e.g. {head}=0.5") from None
    if not math.isfinite(weight):
        raise UserError(f"reward '{spec}': the weight after = should be finite")
    return head, weight


def _function(name: str, options: RewardOptions) -> Reward:
    base, colon, argument = name.partition(":")
    if base not in REWARDS.names():
        if is_user_reward(name):
            return load_user_reward(name)
        raise unknown("reward", name, REWARDS.names(), "orwcfm list rewards")
    entry = REWARDS.get(base)
    if getattr(entry, "is_factory", False):
        return entry(argument, options)
    if colon:
        raise UserError(f"reward '{name}': '{base}' takes no argument after ':'")
    return entry
