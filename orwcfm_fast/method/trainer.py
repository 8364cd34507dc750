"""The online loop: draw, score, weigh, step, record."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.method import noise
from orwcfm_fast.method.anchors import Anchors, compute_anchors, velocities
from orwcfm_fast.method.average import PolicyAverage
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.checks import check_trainable
from orwcfm_fast.method.graph import VelocityGraphs
from orwcfm_fast.method.minibatches import Minibatches
from orwcfm_fast.method.objectives import METHODS, Method, Point, check_bounded, signal_of
from orwcfm_fast.method.rollout import Rollout, draw, start_conditions
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.method.weighting import check_positive, effective_sample_size
from orwcfm_fast.networks.inference import InferenceCopy
from orwcfm_fast.networks.lora import add_lora, load_lora, lora_state, trained_parameters
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Reward, RewardSum, RolloutScoring, Scores, make_reward
from orwcfm_fast.rewards.combine import scores_record
from orwcfm_fast.settings import Finetune
from orwcfm_fast.sharding import ShardedNetworks

PHASES = ("rollout", "reward", "reference", "policy", "optimizer")
C = TypeVar("C", bound=Callback)


@dataclass
class RoundState:
    """A round under way.

    Attributes:
        rollout: scored; scores, held_out: its rewards one by one.
        anchors: of its draws, once they are computed.
        losses: (fm, distance to the anchor, gradient norm) [3] of each step taken.
    """

    rollout: Rollout
    scores: Scores
    held_out: Scores | None = None
    anchors: Anchors | None = None
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
        grown: how far errors of the policy's velocity can have grown by then, 0-d (see `weighting.centre`).
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
        check_trainable(policy, settings, ranks)
        self.policy, self.settings, self.ranks = policy, settings, ranks
        self.callbacks = list(callbacks)
        self.sizes = sizes or BatchSizes.of(settings)
        self.reward, self.holdout = make_reward(reward, name=reward_name), holdout
        for rewards in self.rewards():
            rewards.check_prompts(policy)
            rewards.sizes = self.sizes
        if settings.gradient_checkpointing:
            policy.checkpoint_gradients()
        if settings.lora:
            add_lora(policy.network, settings)
        # under --shard FSDP casts the shards as it gathers them
        self.reference = reference or policy.frozen_copy(exact=settings.shard)
        trained_parameters(policy.network)
        sharded = ShardedNetworks([policy, self.reference], ranks) if settings.shard else None
        self.sizes.fixed = settings.shard
        self.inference = InferenceCopy(policy, off=settings.shard)
        if settings.compile:
            for one in (policy, self.reference, self.inference.policy):
                one.compile()
        self.start = self.initial_weights()
        self.optimizer = PolicyOptimizer(policy, settings, self.sizes, ranks, sharded)
        self.method: Method = METHODS.get(settings.method)
        self.average = PolicyAverage(self.optimizer.parameters) if self.method.averages else None
        self.graphs = VelocityGraphs(self.optimizer.graph.choices) if self.optimizer.graph else None
        self.phases = self.optimizer.phases
        self.seed = noise.seed_on(settings.seed, policy.device)
        self.alpha, self.tau = settings.alpha, settings.tau
        self.grown = torch.ones((), device=policy.device)
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
            Exception: what a callback raises to leave the round or to refuse it.
        """
        resumed = self.current is not None
        self.current = current = self.current or self.draw_and_score()
        self.notify("on_rollout", current.rollout, resumed)
        signal = self.signal(current.rollout)
        batches = self.minibatches(current.rollout, signal)
        current.anchors = current.anchors or self.anchors(batches)
        for k in range(len(current.losses), len(batches)):
            self.notify("on_stage", "step")
            batch = replace(batches[k], **current.anchors.of_step(k, self.policy.device))  # type: ignore[arg-type]
            current.losses.append(self.optimizer.step(batch, self.seed))
            if len(current.losses) < len(batches):
                self.boundary()
        if self.average and self.method.averages:
            self.average.update(self.method.averages(self.round + 1))
        self.grown = batches.grown
        self.round, self.steps = self.round + 1, self.steps + len(current.losses)
        self.current, self.last = None, current
        record = self.measure(current, signal)
        self.notify("on_round", record)
        return record

    def draw_and_score(self) -> RoundState:
        """The coming round's whole rollout, drawn from the policy as it stands, with its rewards."""
        s, first = self.settings, self.round * self.settings.rollout
        mine = self.ranks.share(s.rollout)
        condition = start_conditions(self.policy, s.rollout, s, first)
        if self.policy.pipeline and condition is not None:
            self.policy.pipeline.read_ahead(condition)
        with ExitStack() as stack:
            averaged = self.method.samples_average
            # a rank joins calls of the others at the stage's end
            with self.stage("rollout"), self.without_gradient(averaged) as policy:
                part, scoring = self.sizes.fit(
                    "chunk", lambda chunk: self.draw(policy, chunk, mine, condition), s.rollout
                )
                stack.callback(scoring.close)
            self.phases.add({"rollout": -scoring.waited, "reward": scoring.waited})
            with self.stage("reward"):
                scores, *others = scoring.result(part.x1)
        with self.phases("rollout"):
            x1 = self.whole(part.x1)
        scores, held_out = scores.each(self.whole), others[0].each(self.whole) if others else None
        index = noise.indices(first, s.rollout, self.policy.device)
        return RoundState(Rollout(x1, index, self.trained_on(scores), condition), scores, held_out)

    def draw(
        self, policy: Policy, chunk: int, mine: slice, condition: Tensor | None
    ) -> tuple[Rollout, RolloutScoring]:
        """This process's part of the rollout, `chunk` samples at a time, and its scoring, which may have begun."""
        s = self.settings
        # odd: a CPU's generator takes the low 32 bits
        seed = s.seed * 1_000_003 + self.round + self.ranks.rank * 0xD1B54A32D192ED03
        rows = None if condition is None else condition[mine]
        scoring = RolloutScoring(self.policy, rows, self.rewards(), f"round {self.round + 1}", seed)

        def each(x1: Tensor) -> None:
            scoring.put(x1)
            self.boundary_here()

        try:
            return draw(policy, s.rollout, self.round, s.seed, s, chunk, each, mine), scoring
        except BaseException:
            scoring.close()
            raise

    def signal(self, rollout: Rollout) -> Tensor:
        """What the rewards of a rollout say of its samples, [N], with the τ in force."""
        return signal_of(self.method.signal, rollout, self.tau, self.settings)

    def minibatches(self, rollout: Rollout, signal: Tensor) -> Minibatches:
        """The minibatches of the coming round.

        Raises:
            UserError: the signal cannot be trained on with the α in force, or with this coupling.
        """
        if self.settings.coupling == "ot":
            check_positive(signal)
        found = Minibatches(
            rollout,
            signal,
            self.alpha,
            self.round,
            self.method,
            self.settings,
            self.seed,
            self.ranks,
            self.grown,
        )
        if not self.method.reads_velocity:
            at = Point(signal, found.mean, found.centre, torch.ones_like(signal), self.alpha, self.settings)
            check_bounded(self.settings.method, self.method.coefficients(at))
        return found

    def anchors(self, batches: Minibatches) -> Anchors:
        """The velocities that the round holds the policy to, from the policy as it drew the round."""
        with self.phases("reference"), self.without_gradient(averaged=True) as old, self.ranks.together():
            network = old.network if self.reference.base_only else self.reference.network
            reference = replace(self.reference, network=network, replay=old.replay)
            return compute_anchors(
                batches,
                (lambda batch: velocities(old, batch, self.sizes)) if self.method.old else None,
                (lambda batch: velocities(reference, batch, self.sizes))
                if self.method.has_reference(self.alpha)
                else None,
                blended=not self.method.reads_velocity,
            )

    @contextmanager
    def without_gradient(self, averaged: bool) -> Iterator[Policy]:
        """The policy as it is now, for passes without gradient.

        Args:
            averaged: the average of past policies instead, where the method has one.
        """
        with self.average.in_place() if self.average and averaged else nullcontext():
            yield replace(self.inference.refresh(), replay=self.graphs)

    def measure(self, done: RoundState, signal: Tensor) -> dict[str, Any]:
        """The record of a round; the only place where a round reads from the device."""
        s, reward = self.settings, done.scores.total
        self.notify("on_stage", "measure")
        losses = torch.stack(done.losses)
        assert done.anchors
        loss_fm, loss_w2, norm, norm_max = torch.cat([losses.mean(0), losses[:, 2:].amax(0)]).tolist()
        record = {
            "round": self.round,
            "reward_mean": float(reward.mean()),
            "reward_std": float(reward.std(correction=0)),
            "reward_max": float(reward.max()),
            **scores_record(done.scores, done.held_out),
            "loss_fm": loss_fm,
            "loss_w2": self.loss_w2(done.anchors, loss_w2),
            "grad_norm_mean": norm,
            "grad_norm_max": norm_max,
            "ess": effective_sample_size(signal),
        }
        self.notify("on_measure", done.rollout, record)
        seconds = self.phases.read()
        record |= {f"seconds_{p}": seconds[p] for p in (*PHASES, "probe", "checkpoint")}
        record["images_per_s_rollout"] = s.rollout / seconds["rollout"]
        record["images_per_s_train"] = s.steps_per_round * s.batch / sum(seconds[p] for p in PHASES[2:])
        return self.ranks.from_first(lambda: record)  # one clock, one judgement

    def loss_w2(self, anchors: Anchors, to_anchor: float) -> float | None:
        """Mean 1/D ‖v − v_ref‖² of the round: over its steps where v_ref is the anchor, else as the round began.

        None where the method has no reference.
        """
        if not self.method.has_reference(self.alpha):
            return None
        if not self.method.old:
            return to_anchor
        return anchors.mean_drift(self.ranks)

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

    def gather_anchors(self) -> None:
        """Bring the anchors of a round under way together, for a checkpoint; called on all processes."""
        if self.current and self.current.losses and self.current.anchors:
            self.current.anchors.gather(self.ranks, self.settings.batch)

    def trained_on(self, scores: Scores) -> Tensor:
        """The reward [N] that weights are made of."""
        return scores.standardized() if self.settings.standardize_rewards else scores.total

    def rewards(self) -> list[RewardSum]:
        """The reward that is trained on, and the held-out one where there is one."""
        return [self.reward, *([self.holdout] if self.holdout else [])]

    def continue_from(self, round: int, current: RoundState | None, grown: float) -> None:
        """Go on after so many rounds; the policy's weights and the optimiser's state are loaded already."""
        self.grown = torch.full_like(self.grown, grown)
        self.round, self.current, self.last = round, current, None
        self.steps = round * self.settings.steps_per_round
        if current:
            current.rollout.reward = self.trained_on(current.scores)
        self.optimizer.go_on_from(self.steps_taken)
        self.notify("on_restore")

    def initial_weights(self) -> dict[str, Tensor]:
        """What is trained, as it is before the first round: the reference's weights where these are not rounded."""
        if self.settings.lora:
            return {k: v.clone() for k, v in lora_state(self.policy.network).items()}
        own, reference = self.policy.network.state_dict(), self.reference.network.state_dict()
        if all(reference[key].dtype == value.dtype for key, value in own.items()):
            return reference
        return {key: value.to("cpu", copy=True) for key, value in own.items()}

    def reset(self) -> None:
        """Back to before the first round."""
        if self.settings.lora:
            load_lora(self.policy.network, self.start, "the start")
        else:
            self.policy.network.load_state_dict(self.start)
        self.optimizer.reset()
        if self.average:
            self.average.reset()
        self.grown = torch.ones_like(self.grown)
        self.round = self.steps = 0
        self.current = self.last = None
        self.notify("on_reset")
