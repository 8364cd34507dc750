"""Held-out prompts: whether the reward rises for prompts that are not trained on, too."""

from typing import Any

from orwcfm_fast.errors import RewardError, warn
from orwcfm_fast.method import noise
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.rollout import Rollout, sample, start_noise
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.rewards import Scores, decode_and_score


class HeldOutPrompts(Callback):
    """Draws samples for the held-out prompts after every round, from one noise, and records their rewards.

    The record gets `eval_reward_mean` and `eval_reward_std`, and `eval_holdout_mean` and `eval_holdout_std` where
    there are held-out rewards. They are of the policy after the round.

    Args:
        trainer: of a policy with held-out prompts; each of its processes draws and scores its share.
    """

    def __init__(self, trainer: Trainer) -> None:
        assert trainer.policy.conditions
        n = trainer.settings.probe
        self.noise = start_noise(trainer.policy, n, trainer.settings.seed, noise.PROBE)
        self.rows = trainer.policy.conditions.held_out_rows(n)

    def on_measure(self, trainer: Trainer, rollout: Rollout, record: dict[str, Any]) -> None:
        """Draw, score and record; a reward that fails here leaves a warning, since the round is already learned."""
        try:
            with trainer.phases("probe"):
                found = self._scores(trainer)
        except RewardError as error:
            warn(f"held-out prompts are not scored: {error}")
            return
        for name, scores in zip(("reward", "holdout"), found, strict=False):
            total = scores.each(lambda part: trainer.ranks.gather(part, len(self.noise))).total
            record[f"eval_{name}_mean"] = float(total.mean())
            record[f"eval_{name}_std"] = float(total.std(correction=0))

    def _scores(self, trainer: Trainer) -> list[Scores]:
        mine = trainer.ranks.share(len(self.noise))
        x0, rows = self.noise[mine], self.rows[mine]
        with trainer.ranks.together():
            x = trainer.sizes.fit(
                "chunk",
                lambda chunk: sample(trainer.policy, x0, trainer.settings, chunk, condition=rows),
                len(x0),
            )
            where = f"held-out prompts after round {trainer.round}"
            return decode_and_score(trainer.policy, x, rows, trainer.rewards(), where, mine.start)
