"""`--target-w2 X`: α by round, so that the coupled W2 comes to X and stays there."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.rewards.standardize import standardize
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory.recursion import METHODS

FORECAST_SAMPLES = 512
PER_PROMPT = 16  # samples that a prompt's own forecast needs


@dataclass
class W2Steering:
    """One step ahead by a model of a round, from v* = (E[w·u | x_t] + α·v_ref) / (E[w | x_t] + α) with mean w = 1:

        W' = (W + drive) / (1 + α)

    W is the coupled W2 before the round, W' after it; drive is what the weights add at α = 0. Each round shows
    a drive, of which half is believed (a network's W2 is noisy), and the next α is the one for which W' = X.
    At rest α = drive / X.

    Attributes:
        target: X; w2: after the last round; drive: None before the first round.
    """

    target: float
    w2: float = 0.0
    drive: float | None = None

    @classmethod
    def of(cls, s: Finetune) -> "W2Steering | None":
        """Where `target_w2` asks for it.

        Raises:
            UserError: raw weights, whose mean is not 1: α would mean something else each round; a method of which
                no recursion is known.
        """
        if s.target_w2 is None:
            return None
        if s.method not in METHODS:
            raise UserError(f"--target-w2: works with --method {' or '.join(METHODS)}, not {s.method}")
        if not s.normalize_weights and s.weights != "linear":
            raise UserError("--target-w2: needs normalised weights; leave out --no-normalize-weights")
        return cls(s.target_w2)

    def alpha(self) -> float:
        """α of the coming round."""
        assert self.drive is not None
        return max((self.w2 + self.drive) / self.target - 1, 0.0)

    def see(self, alpha: float, w2: float) -> None:
        """Learn from a round that was taken with this α and left this W2."""
        seen = max((1 + alpha) * w2 - self.w2, 0.0)
        self.drive = seen if self.drive is None else (self.drive + seen) / 2
        self.w2 = w2

    def foresee(self, rollout: Rollout, tau: float, s: Finetune) -> None:
        """The first round's drive: forecast from its own rollout at α = 0.

        No sample moves to another prompt's, so W2² is the mean of each prompt's own, those of fewer samples than
        PER_PROMPT left out; where all have fewer, they are taken for one, which moves too far: α begins too high.
        """
        from orwcfm_fast.theory.forecast import forecast

        x, r, weighting = rollout.x1[:FORECAST_SAMPLES], rollout.reward[:FORECAST_SAMPLES], s.weights
        rows = torch.zeros(len(x)) if rollout.condition is None else rollout.condition[:FORECAST_SAMPLES]
        prompts, counts = rows.unique(return_counts=True)
        if len(prompts) > 1 and weighting == "advantage" and s.group == 1:  # standardised over all prompts
            r, weighting = standardize(r), "exp"
        known = [
            (int(n), prompt)
            for n, prompt in zip(counts, prompts, strict=True)
            if n >= min(PER_PROMPT, len(x))
        ]
        if not known:
            rows, known = torch.zeros_like(rows), [(len(x), torch.tensor(0))]
        squares = 0.0
        for n, prompt in known:
            of = rows == prompt
            if weighting == "linear" and not bool(r[of].any()):
                continue  # the prompt's samples weigh nothing
            found = forecast(
                x[of], r[of], 0.0, tau, 1, weighting=weighting, exact_w2=False, parts=False, seed=s.seed
            )
            squares += n * found.final.w2_coupled**2
        self.drive = math.sqrt(squares / sum(n for n, _ in known))

    def to_state(self) -> dict[str, Any]:
        return {"w2": self.w2, "drive": self.drive}

    def restore(self, state: Any, where: str) -> None:
        """Go on with what `to_state` wrote.

        Raises:
            UserError: it is not that.
        """
        try:
            self.w2 = float(state["w2"])
            self.drive = (
                None if state["drive"] is None else float(state["drive"])
            )  # None: left in the first rollout
            if not (0 <= self.w2 < math.inf and 0 <= (self.drive or 0.0) < math.inf):
                raise ValueError
        except (TypeError, KeyError, ValueError, OverflowError):
            raise UserError(f"{where}: state.json: steering is damaged") from None
