"""The online loop: draw, score, weigh, step, record."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.method import noise
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.minibatches import Minibatches
from orwcfm_fast.method.rollout import Rollout, draw, start_conditions
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.method.weighting import (
    check_bounded,
    check_positive,
    effective_sample_size,
    weigh,
    weigh_within,
)
from orwcfm_fast.networks.lora import add_lora, load_lora, lora_state
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Reward, RewardSum, Scores, decode_and_score, make_reward
from orwcfm_fast.settings import Finetune

PHASES = ("rollout", "reward", "reference", "policy", "optimizer")
C = TypeVar("C", bound=Callback)


@dataclass
class RoundState:
    """A round under way: its scored rollout, its rewards one by one, and (fm, w2, gradient norm) [3] of each step."""

    rollout: Rollout
    scores: Scores
    held_out: Scores | None = None
    losses: list[Tensor] = field(default_factory=list)


class Trainer:
    """Fine-tunes a policy online with any reward.

    Args:
        policy: pretrained; its network is trained in place.
        reward: decoded samples [B, …] → [B] numbers; needs no gradient.
        settings: all of `orwcfm finetune`.
        reward_name: of a reward that is a bare function, in messages.
        holdout: rewards that are measured on each rollout and never trained on.
        reference: the anchor; by default a frozen copy of the policy as it is now.
        callbacks: called in order between the parts of a round.
        sizes: how many samples are processed at once; by default as the settings say.
        ranks: the processes that share rollouts and minibatches; each holds the whole rollout.

    Attributes:
        alpha, tau: in force; they begin as in the settings, and callbacks may change them.
        round, steps: whole rounds done, and their gradient steps.
        current: the round under way, None between rounds; last: the round before.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        settings: Finetune,
        *,
        reward_name: str = "reward",
        holdout: RewardSum | None = None,
        reference: Policy | None = None,
        callbacks: Sequence[Callback] = (),
        sizes: BatchSizes | None = None,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        _check(policy, settings, ranks)
        self.policy, self.settings, self.ranks = policy, settings, ranks
        self.callbacks = list(callbacks)
        self.sizes = sizes or BatchSizes.of(settings)
        self.reward, self.holdout = make_reward(reward, name=reward_name), holdout
        for rewards in self.rewards():
            rewards.sizes = self.sizes
        if settings.gradient_checkpointing:
            policy.checkpoint_gradients()
        if settings.lora:
            add_lora(policy.network, settings.lora, seed=settings.seed)
        self.start = {k: v.clone() for k, v in lora_state(policy.network).items()}
        self.reference = reference or policy.frozen_copy()
        self.optimizer = PolicyOptimizer(policy, self.reference, settings, self.sizes, ranks)
        self.phases = self.optimizer.phases
        self.seed = noise.seed_on(settings.seed, policy.device)
        self.minibatches = Minibatches(policy, settings, self.seed, ranks)
        self.alpha, self.tau = settings.alpha, settings.tau
        self.round = self.steps = 0
        self.current: RoundState | None = None
        self.last: RoundState | None = None

    def train(self, rounds: int) -> Iterator[dict[str, Any]]:
        """Run up to `rounds` rounds in all; yields each round's record (the keys of metrics.jsonl)."""
        while self.round < rounds:
            yield self.one_round()

    def one_round(self) -> dict[str, Any]:
        """Draw a rollout, score and weigh it, take its gradient steps; the record of the round.

        A round that was left after some of its steps continues with the next one.

        Raises:
            whatever a callback raises to leave the round or to refuse it.
        """
        resumed = self.current is not None
        self.current = current = self.current or self.draw_and_score()
        self.notify("on_rollout", current.rollout, resumed)
        w = self.weigh(current.rollout)
        check_bounded(w, self.alpha)
        if self.settings.coupling == "ot":
            check_positive(w)
        for batch in self.minibatches(current.rollout, w, self.alpha, self.round, skip=len(current.losses)):
            self.notify("on_stage", "step")
            current.losses.append(self.optimizer.step(batch, self.seed))
            if len(current.losses) < self.settings.steps_per_round:
                self.boundary()
        self.round, self.steps = self.round + 1, self.steps + len(current.losses)
        self.current, self.last = None, current
        record = self.measure(current, w)
        self.notify("on_round", record)
        return record

    def draw_and_score(self) -> RoundState:
        """The coming round's whole rollout, drawn from the policy as it stands, with its rewards."""
        s, first = self.settings, self.round * self.settings.rollout
        mine = self.ranks.share(s.rollout)
        with self.stage("rollout"):
            part = self.sizes.fit(
                "chunk",
                lambda chunk: draw(
                    self.policy, s.rollout, self.round, s.seed, s, chunk, self.boundary_here, mine
                ),
                s.rollout,
            )
        with self.stage("reward"):
            # odd: a CPU's generator takes the low 32 bits
            own = s.seed * 1_000_003 + self.round + self.ranks.rank * 0xD1B54A32D192ED03
            scores, *others = decode_and_score(
                self.policy, part.x1, part.condition, self.rewards(), f"round {self.round + 1}", own
            )
        with self.phases("rollout"):
            x1 = self.whole(part.x1)
        scores, held_out = scores.each(self.whole), others[0].each(self.whole) if others else None
        index = noise.indices(first, s.rollout, self.policy.device)
        condition = start_conditions(self.policy, s.rollout, s, first)
        return RoundState(Rollout(x1, index, self.trained_on(scores), condition), scores, held_out)

    def weigh(self, rollout: Rollout) -> Tensor:
        """Weights [N] of a scored rollout, with the τ in force."""
        s, how = self.settings, (self.tau, self.settings.weights, self.settings.normalize_weights)
        if s.group > 1 and rollout.condition is not None:
            return weigh_within(rollout.reward, rollout.condition, *how)
        return weigh(rollout.reward, *how)

    def measure(self, done: RoundState, w: Tensor) -> dict[str, Any]:
        """The record of a round; the only place where a round reads from the device."""
        s, reward = self.settings, done.scores.total
        self.notify("on_stage", "measure")
        losses = torch.stack(done.losses)
        loss_fm, loss_w2, norm, norm_max = torch.cat([losses.mean(0), losses[:, 2:].amax(0)]).tolist()
        record = {
            "round": self.round,
            "reward_mean": float(reward.mean()),
            "reward_std": float(reward.std(correction=0)),
            "reward_max": float(reward.max()),
            **by_name(done.scores, done.held_out),
            "loss_fm": loss_fm,
            "loss_w2": loss_w2,
            "grad_norm_mean": norm,
            "grad_norm_max": norm_max,
            "ess": effective_sample_size(w),
        }
        self.notify("on_measure", done.rollout, record)
        seconds = self.phases.read()
        record |= {f"seconds_{p}": seconds[p] for p in (*PHASES, "probe")}
        record["images_per_s_rollout"] = s.rollout / seconds["rollout"]
        record["images_per_s_train"] = s.steps_per_round * s.batch / sum(seconds[p] for p in PHASES[2:])
        return self.ranks.from_first(lambda: record)  # one clock, one judgement

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A timed part of a round; an error in it on one process is an error on all."""
        self.notify("on_stage", name)
        with self.phases(name), self.ranks.together():
            yield

    def boundary(self) -> None:
        """Tell the callbacks that the round can be left here; all processes leave it together."""
        with self.ranks.together():
            self.boundary_here()

    def boundary_here(self) -> None:
        """The same within a part that ends on all processes together."""
        self.notify("on_boundary")

    def notify(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    def find(self, kind: type[C]) -> C:
        """The callback of a class.

        Raises:
            LookupError: there is none.
        """
        for callback in self.callbacks:
            if isinstance(callback, kind):
                return callback
        raise LookupError(f"no {kind.__name__} among the callbacks")

    @property
    def steps_taken(self) -> int:
        """Gradient steps in all, those of the round under way among them."""
        return self.steps + (len(self.current.losses) if self.current else 0)

    def where(self) -> str:
        """Where the loop stands, in words."""
        under_way = self.current or self.round == 0
        return f"in round {self.round + 1}" if under_way else f"after round {self.round}"

    def whole(self, part: Tensor) -> Tensor:
        """The rollout's [N, …] on every process, from this process's share of it."""
        return self.ranks.gather(part, self.settings.rollout)

    def trained_on(self, scores: Scores) -> Tensor:
        """The reward [N] that weights are made of."""
        return scores.standardized() if self.settings.standardize_rewards else scores.total

    def rewards(self) -> list[RewardSum]:
        """The reward that is trained on, and the held-out one where there is one."""
        return [self.reward, *([self.holdout] if self.holdout else [])]

    def continue_from(self, round: int, current: RoundState | None) -> None:
        """Go on after so many rounds; the policy's weights and the optimiser's state are loaded already."""
        self.round, self.current, self.last = round, current, None
        self.steps = round * self.settings.steps_per_round
        if current:
            current.rollout.reward = self.trained_on(current.scores)
        self.optimizer.go_on_from(self.steps_taken)
        self.notify("on_restore")

    def reset(self) -> None:
        """Back to before the first round."""
        if self.settings.lora:
            load_lora(self.policy.network, self.start, "the start")
        else:
            self.policy.network.load_state_dict(self.reference.network.state_dict())
        self.optimizer.reset()
        self.round = self.steps = 0
        self.current = self.last = None
        self.notify("on_reset")


def _check(policy: Policy, settings: Finetune, ranks: ProcessGroup) -> None:
    """Raises UserError for settings that this policy or this many processes cannot have."""
    for name in ("rollout", "probe", "eval_n"):
        if (n := getattr(settings, name)) < ranks.world:
            raise UserError(
                f"--{name.replace('_', '-')} {n}: is less than a sample for each of {ranks.world} ranks"
            )
    if policy.conditions and settings.rollout % settings.group:
        near = settings.rollout - settings.rollout % settings.group or settings.group
        raise UserError(
            f"--rollout {settings.rollout}: is no multiple of --group {settings.group}, so the last samples would be "
            f"compared with those of the next round; use {near}"
        )
    if settings.coupling == "ot" and settings.batch < 2:
        raise UserError("coupling 'ot' needs a batch of at least 2")
    if settings.coupling == "ot" and policy.conditions and len(policy.conditions) > 1:
        raise UserError(
            "coupling 'ot': would pair noise across prompts, which skews them; use --coupling independent"
        )


def by_name(scores: Scores, held_out: Scores | None) -> dict[str, Any]:
    """Metrics of rewards one by one, where there are several or some are held out."""
    found: dict[str, Any] = {}
    if len(scores.values) > 1:
        found["rewards"] = scores.means()
    if held_out:
        found["holdout_mean"] = float(held_out.total.mean())
        if len(held_out.values) > 1:
            found["holdout_rewards"] = held_out.means()
    seconds = scores.seconds | (held_out.seconds if held_out else {})
    return found | ({"seconds_rewards": seconds} if len(seconds) > 1 else {})
