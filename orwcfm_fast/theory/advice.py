"""Settings for what a user may wish, from the runs of the manual's figures.

τ is given by the spread of the rewards, on which alone a weight exp(τ·r) over its mean depends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Wish:
    """One wish and what answers it.

    Attributes:
        pull: τ times the standard deviation of the rewards.
        settings: beside α and τ, those that differ from the defaults.
    """

    name: str
    alpha: float
    pull: float
    why: str
    settings: dict[str, Any] = field(default_factory=dict)

    def command(self, spread: float, more: Sequence[str] = ()) -> str:
        """The call of `orwcfm finetune` for rewards of this standard deviation.

        Args:
            more: arguments that go first, of model and reward.
        """
        tau = self.pull / (1.0 if self.settings.get("weights") == "advantage" else spread)
        given = {"alpha": f"{self.alpha:g}", "tau": f"{tau:.2g}", **self.settings}
        flags = (f"--{key.replace('_', '-')} {value}" for key, value in given.items())
        return " ".join(("orwcfm finetune", *more, *flags))


SMALL_ROUNDS = {"rollout": 128, "steps_per_round": 4, "batch": 32, "rounds": 5, "lr": 0.002, "warmup": 2}
WISHES = (
    Wish("much reward soon", 0.0, 1.0, "small rounds; diversity falls", SMALL_ROUNDS),
    Wish("more reward, diversity kept", 0.3, 0.25, "drift settles, samples stay clear", {"rounds": 14}),
    Wish("some reward, hardly any drift", 1.0, 0.25, "the default"),
    Wish("all the reward there is", 0.0, 0.25, "nothing holds it back; diversity falls", {"rounds": 12}),
    Wish("a noisy reward", 0.3, 0.25, "noise of deviation σ divides the ESS by exp(τ²σ²)", {"rollout": 4096}),
)
MANY_PROMPTS = Wish(
    "many prompts", 1.0, 0.5, "weights compare samples of one prompt", {"weights": "advantage", "group": 8}
)
"""For a pipeline with `--prompts`, of which nothing is forecast."""
