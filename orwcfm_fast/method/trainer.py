"""The online loop: draw, score, weigh, step, record."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.partial_round import PartialRound, pack, unpack
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.control.guard import Fault
from orwcfm_fast.control.target_w2 import probe_size
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.probe import Probe
from orwcfm_fast.method import noise
from orwcfm_fast.method.minibatches import Minibatches
from orwcfm_fast.method.rollout import Rollout, draw, start_conditions
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.method.weighting import check_bounded, check_positive, effective_sample_size
from orwcfm_fast.networks.lora import add_lora, load_lora, lora_state
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Reward, RewardSum, Scores, make_reward
from orwcfm_fast.settings import Finetune

PHASES = ("rollout", "reward", "reference", "policy", "optimizer")


@dataclass
class Progress:
    """Where a round stands; what a display reads."""

    round: int
    step: int
    phase: str


class Trainer:
    """Fine-tunes a policy online with any reward.

    Args:
        policy: pretrained; its network is trained in place.
        reward: decoded samples [B, …] → [B] numbers; no gradient needed; asked of `reward_batch` at once.
        settings: all of `orwcfm finetune`.
        reward_name: of a reward that is a bare function, in messages.
        holdout: rewards that are measured on each rollout and never trained on.
        reference: the anchor; by default a frozen copy of the policy as it is now.
        features: samples → features [B, F] in which diversity is measured; pixels where None.
        watch: called with a Progress at each phase of each step.
        ranks: those that rollouts and minibatches are spread over; each holds the whole rollout, and all else too.

    Attributes:
        pause: called where a round can be left and taken up again: after a chunk of its rollout, and between
            its steps. It may raise; `save` then writes what `restore` goes on from.
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
        features: Callable[[Tensor], Tensor] | None = None,
        watch: Callable[[Progress], None] | None = None,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        sizes = {"rollout": settings.rollout, "probe": probe_size(settings), "eval-n": settings.eval_n}
        for name, n in sizes.items():
            if n < ranks.world:
                raise UserError(f"--{name} {n}: is less than a sample for each of {ranks.world} ranks")
        if settings.coupling == "ot" and settings.batch < 2:
            raise UserError("coupling 'ot' needs a batch of at least 2")
        if settings.coupling == "ot" and policy.conditions and len(policy.conditions) > 1:
            raise UserError(
                "coupling 'ot': would pair noise across prompts, which skews them; use --coupling independent"
            )
        self.policy, self.settings, self.ranks = policy, settings, ranks
        self.reward, self.holdout = make_reward(reward, name=reward_name), holdout
        if settings.gradient_checkpointing:
            policy.checkpoint_gradients()
        if settings.lora:
            add_lora(policy.network, settings.lora, seed=settings.seed)
        self.start = {k: v.clone() for k, v in lora_state(policy.network).items()}
        self.reference = reference or policy.frozen_copy()
        self.watch = watch or (lambda progress: None)
        self.oversight = RunController(settings)
        self.learner = PolicyOptimizer(policy, self.reference, settings, ranks)
        self.learner.on_halved = self.oversight.set_micro_batch
        for asked in self.rewards():
            asked.on_halved = self.oversight.set_reward_batch
        self.take_sizes()
        self.phases = self.learner.phases
        self.seed = noise.seed_on(settings.seed, policy.device)
        self.minibatches = Minibatches(self.learner, settings, self.seed)
        self.pause: Callable[[], None] = lambda: None
        self.round = 0
        self.steps = 0  # of whole rounds
        self.begun: PartialRound | None = None
        self.scores: Scores | None = None  # of the last rollout
        self.held_out: Scores | None = None
        self.probe = Probe(policy, self.reference, settings, features or (lambda x: x), self.oversight, ranks)
        self.rollout: Rollout | None = None  # of the last round

    def train(self, rounds: int) -> Iterator[dict[str, Any]]:
        """Run up to `rounds` rounds in all; yields each round's metrics (the keys of metrics.jsonl)."""
        while self.round < rounds:
            yield self.one_round()

    def one_round(self) -> dict[str, Any]:
        """Draw a rollout, score and weigh it, take its gradient steps; the metrics of the round.

        A round that was left after some steps goes on with the next.

        Raises:
            Fault: the guard does not let the round stand.
        """
        s, number = self.settings, self.round
        rollout = self.begun.rollout if self.begun else self.draw_and_score(number)
        w, found = self.oversight.begin_round(rollout, again=self.begun is not None)
        check_bounded(w, self.oversight.control.alpha)
        if s.coupling == "ot":
            check_positive(w)
        self.rollout = rollout
        self.begun = self.begun or PartialRound(rollout, [])
        losses = self.begun.losses
        for batch in self.minibatches(rollout, w, self.oversight.control.alpha, number, len(losses)):
            self.watch(Progress(number, len(losses), "step"))
            losses.append(self.learner.step(batch, self.seed))
            if len(losses) < s.steps_per_round:
                with self.ranks.together():
                    self.pause()
        self.steps += s.steps_per_round
        self.round += 1
        self.begun = None
        self.oversight.agree(self.ranks)
        self.take_sizes()
        record = self.measure(rollout, w, torch.stack(losses))
        return self.oversight.judge(self.round, record, found)

    @property
    def steps_taken(self) -> int:
        """Gradient steps in all, those of a round that has begun among them."""
        return self.steps + (len(self.begun.losses) if self.begun else 0)

    def where(self) -> str:
        """Where the loop stands, in words."""
        begun = self.begun or self.round == 0
        return f"in round {self.round + 1}" if begun else f"after round {self.round}"

    def draw_and_score(self, number: int) -> Rollout:
        """The round's whole rollout, drawn from the policy as it stands, with its rewards."""
        s = self.settings
        self.watch(Progress(number, 0, "rollout"))
        mine = self.ranks.share(s.rollout)
        with self.phases("rollout"), self.ranks.together():
            part = self.oversight.in_chunks(
                lambda chunk: draw(self.policy, s.rollout, number, s.seed, s, chunk, self.pause, mine)
            )
        self.watch(Progress(number, 0, "reward"))
        with self.phases("reward"):
            own = self.ranks.rank * 0xD1B54A32D192ED03  # odd: a CPU's generator takes the low 32 bits
            told = (f"round {number + 1}", s.seed * 1_000_003 + number + own)
            with self.ranks.together():
                samples, prompts = self.policy.decode(part.x1), self.policy.prompts_of(part.condition)
                found = self.reward.scores(samples, *told, prompts)
                held_out = self.holdout.scores(samples, *told, prompts) if self.holdout else None
            self.scores = self.of_all(found)
            self.held_out = self.of_all(held_out) if held_out else None
        with self.phases("rollout"):
            x1 = self.ranks.gather(part.x1, s.rollout)
        index = noise.indices(number * s.rollout, s.rollout, self.policy.device)
        condition = start_conditions(self.policy, s.rollout, s, number * s.rollout)
        return Rollout(x1, index, self.trained_on(self.scores), condition)

    def of_all(self, mine: Scores) -> Scores:
        """What the rewards say of the whole rollout, each rank having asked them of its share."""
        return mine.each(lambda values: self.ranks.gather(values, self.settings.rollout))

    def measure(self, rollout: Rollout, w: Tensor, losses: Tensor) -> dict[str, Any]:
        """The round's metrics; the only place where a round reads from the device."""
        s = self.settings
        self.watch(Progress(self.round - 1, s.steps_per_round, "measure"))
        with self.phases("probe"):
            gap = self.probe.look_along()
            spread, share = self.probe.diversity(rollout.x1[:512]), self.probe.share()
        seconds = self.phases.read()
        training = sum(seconds[p] for p in PHASES[2:])
        loss_fm, loss_w2, norm, norm_max = torch.cat([losses.mean(0), losses[:, 2:].amax(0)]).tolist()
        assert self.scores
        reward = self.scores.total
        record = {
            "round": self.round,
            "reward_mean": float(reward.mean()),
            "reward_std": float(reward.std(correction=0)),
            "reward_max": float(reward.max()),
            **by_name(self.scores, self.held_out),
            "loss_fm": loss_fm,
            "loss_w2": loss_w2,
            "grad_norm_mean": norm,
            "grad_norm_max": norm_max,
            **self.oversight.control.to_state(),
            "ess": effective_sample_size(w),
            "w2_coupled": self.probe.w2(),
            "velocity_gap": gap,
            "diversity": spread,
            "diversity_share": share,
            **{f"seconds_{p}": seconds[p] for p in (*PHASES, "probe")},
            "images_per_s_rollout": s.rollout / seconds["rollout"],
            "images_per_s_train": s.steps_per_round * s.batch / training,
        }
        return self.ranks.from_first(lambda: record)  # one clock, one judgement

    def save(self, path, more: dict[str, Any]) -> None:
        """Write a checkpoint from which `restore` goes on: bit for bit on a CPU; a GPU adds up in no fixed order."""
        state = {"kind": "finetune", "round": self.round, "step": self.steps_taken, **self.policy.describe()}
        state |= self.oversight.to_state()
        begun: dict[str, checkpoint.Tensors] = {}
        if self.begun and self.begun.losses:
            assert self.scores
            self.phases.add(seconds := self.phases.read())
            begun["begun"], state["begun"] = pack(self.begun, self.scores, self.held_out, seconds)
        checkpoint.save(
            path,
            {**state, **more},
            optimizer=checkpoint.optimizer_tensors(self.learner.optimizer),
            **self.policy.tensors(),
            **begun,
        )

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint written by `save`, with the α, τ and sizes that were in force.

        Raises:
            UserError: it is of another kind or another model.
        """
        self.oversight.restore(found.state, str(found.path))
        self.take_sizes()
        with checkpoint.reading(found):
            if self.settings.lora:
                load_lora(self.policy.network, found.tensors.get(self.policy.lora_file, {}), str(found.path))
            else:
                checkpoint.load_weights(self.policy.network, found.tensors["model"], str(found.path))
            checkpoint.load_optimizer(self.learner.optimizer, found.tensors["optimizer"], str(found.path))
            self.round, step = int(found.state["round"]), int(found.state["step"])
            self.begun = None
            if "begun" in found.tensors:
                self.begun, self.scores, self.held_out, seconds = unpack(
                    found, self.round, self.policy, self.settings, self.reward, self.holdout
                )
                self.begun.rollout.reward = self.trained_on(self.scores)
                self.phases.add(seconds)
            self.steps = self.round * self.settings.steps_per_round
            if self.steps_taken != step or not 0 <= step < 2**62:
                raise ValueError("its round and its step do not agree")
        self.probe.look()
        self.learner.go_on_from(step)

    def trained_on(self, scores: Scores) -> Tensor:
        """The reward [N] that weights are made of."""
        return scores.standardized() if self.settings.standardize_rewards else scores.total

    def rewards(self) -> list[RewardSum]:
        """The one that is trained on, and the one that is held out where there is one."""
        return [self.reward, *([self.holdout] if self.holdout else [])]

    def take_sizes(self) -> None:
        """Go on with what memory allowed."""
        control = self.oversight.control
        self.learner.micro_batch = control.micro_batch
        for asked in self.rewards():
            asked.at_once = control.reward_batch

    def take_back(self, fault: Fault, restore: Callable[[], int]) -> None:
        """`RunController.take_back`, with the sizes that memory allowed."""
        self.oversight.take_back(fault, restore)
        self.take_sizes()

    def start_over(self) -> None:
        """Back to before the first round."""
        if self.settings.lora:
            load_lora(self.policy.network, self.start, "the start")
        else:
            self.policy.network.load_state_dict(self.reference.network.state_dict())
        self.learner.start_over()
        self.round = self.steps = 0
        self.probe.start_over()
        self.oversight.start_over()


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
