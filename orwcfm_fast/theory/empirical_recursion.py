"""The recursion on one empirical measure: masses by round, from trajectories that share their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from orwcfm_fast.method.weighting import centre, weigh
from orwcfm_fast.theory.empirical import Empirical, EmpiricalVelocity, Stage
from orwcfm_fast.theory.parallel import in_parallel

MASS_FLOOR = 1e-8
TILTS = (0.6, 1.5, 3.0)  # λ of the known flows, in inverse standard deviations of the reward


@dataclass(frozen=True)
class Outcome:
    """After one round.

    masses: [S]. reward: E[r], and reward_error, its standard error that the number of trajectories leaves.
    w2_coupled: √E‖x − x_ref‖² along common noise, and w2_error, likewise.
    """

    masses: Tensor
    reward: float
    reward_error: float
    w2_coupled: float
    w2_error: float


@dataclass(frozen=True)
class Tilt:
    """A flow whose law is known: its exact gain in mean reward, the one seen, and that of each trajectory [n]."""

    exact: float
    seen: float
    gains: Tensor


@dataclass(frozen=True)
class Landing:
    """Where trajectories end: ends [n, D], the mean reward there [n], and the masses [S] that they leave."""

    ends: Tensor
    rewards: Tensor
    masses: Tensor


class EmpiricalRecursion:
    """q_0 → q_1 → … of `exact_recursion`, q_0 = Σ p_j δ(s_j).

    Every sample, noised to the resolved time, is followed back to noise by v_ref: a stratified draw of N(0, I),
    one trajectory to each sample's share of it. Each round carries that same noise forward by its own velocity.
    What more lands at a sample than under v_ref is added to its first mass, and motion is measured against the same
    trajectories under v_ref: at τ = 0 nothing moves, and errors do not add up over the rounds. (In many dimensions
    the flow of an empirical measure is chaotic: on noise of their own, two rounds differ where nothing has changed.)

    Args:
        samples: [S, D] float32. rewards: [S] float64. start: p_0 [S] float64, sums to 1.
        draws: least number of trajectories, a multiple of S.
    """

    def __init__(
        self, samples: Tensor, rewards: Tensor, start: Tensor, draws: int, seed: int, threads: int
    ) -> None:
        self.rewards, self.start, self.threads = rewards, start, threads
        self.measure = Empirical(samples, rewards, torch.Generator().manual_seed(seed))
        index = torch.arange(len(samples)).repeat(math.ceil(draws / len(samples))).to(samples.device)
        self.carried = start[index] * (len(samples) / len(index))
        still = self.velocity([], False)
        self.noise = still.flow(self.measure.noised(self.measure.end, index), forward=False, threads=threads)
        self.still = self._landing(still)

    def velocity(self, stages: list[Stage], centred: bool) -> EmpiricalVelocity:
        return EmpiricalVelocity(self.measure, self.start, stages, centred)

    def _landing(self, velocity: EmpiricalVelocity) -> Landing:
        """Where the common noise lands."""
        x = velocity.flow(self.noise, threads=self.threads)
        shares = in_parallel(velocity.landing, x, self.threads)
        rewards = (shares @ self.rewards.float()).double()
        return Landing(velocity.mean(self.measure.end, x), rewards, (self.carried.float() @ shares).double())

    def run(
        self, alpha: float, tau: float, rounds: int, weighting: str, normalize: bool, centred: bool
    ) -> list[Outcome]:
        """Rounds 0 … N of one setting."""
        masses = self.start
        stages: list[Stage] = []
        grown = torch.ones_like(masses[0])
        # v_ref by the sums of this setting: rounding alone can send a trajectory to another sample
        rest = self._landing(self.velocity([Stage(masses, torch.ones_like(masses), alpha)], centred))
        found = [Outcome(masses, float(masses @ self.rewards), 0.0, 0.0, 0.0)]
        for _ in range(rounds):
            weights = weigh(self.rewards, tau, weighting, normalize, masses)
            c, grown = centre(weights, masses @ weights, alpha, grown)
            stage = Stage(masses, weights, alpha, float(c))
            stages = [*stages, stage] if centred else [stage]
            landing = self._landing(self.velocity(stages, centred))
            if alpha == 0:  # what the flow makes of the masses is known
                masses, error = self._normalised(masses * weights), 0.0
            else:
                masses, error = self._carried_masses(landing, rest)
            squares = (landing.ends - rest.ends).square().sum(1).double()
            mean = float(self.carried @ squares)
            spread = float((self.carried * (squares - mean)).square().sum().sqrt())
            w2 = math.sqrt(mean)
            found.append(Outcome(masses, float(masses @ self.rewards), error, w2, spread / (2 * w2 + 1e-12)))
        return found

    def _carried_masses(self, landing: Landing, rest: Landing) -> tuple[Tensor, float]:
        """Masses [S] that a round's flow leaves, and the standard error of their mean reward.

        Control variate: under a flow whose law is known, the same trajectories miss its reward by so much; these
        are taken to miss theirs by as much, where both move the reward as far.
        """
        gains = landing.rewards - rest.rewards
        masses = self._normalised((self.start + landing.masses - rest.masses).clamp_min(0))
        seen = float(self.carried @ gains)
        below, above = self._around(seen)
        share = 0.0 if above.seen == below.seen else (seen - below.seen) / (above.seen - below.seen)
        share = min(max(share, 0.0), 1.0)
        miss = (1 - share) * (below.exact - below.seen) + share * (above.exact - above.seen)
        unexplained = gains - (1 - share) * below.gains - share * above.gains
        error = float((self.carried * (unexplained - self.carried @ unexplained)).square().sum().sqrt())
        return tilted(self.rewards, float(self.start @ self.rewards) + seen + miss, masses), error

    def _around(self, seen: float) -> tuple[Tilt, Tilt]:
        below = [tilt for tilt in self.known if tilt.seen <= seen]
        above = [tilt for tilt in self.known if tilt.seen >= seen]
        low = below[-1] if below else self.known[0]
        return low, above[0] if above else low

    @cached_property
    def known(self) -> list[Tilt]:
        """Gains under the velocities of q_0·exp(λ·r), whose laws are known, by rising λ."""
        at_start, scale = float(self.start @ self.rewards), float(self.rewards.std(correction=0))
        nothing = Tilt(0.0, 0.0, torch.zeros_like(self.carried))
        if scale == 0:
            return [nothing]
        found = []
        for power in TILTS:
            masses = self._normalised(self.start * torch.softmax(power / scale * self.rewards, 0))
            landing = self._landing(self.velocity([Stage(masses, torch.ones_like(masses), 0.0)], False))
            gains = landing.rewards - self.still.rewards
            found.append(Tilt(float(masses @ self.rewards) - at_start, float(self.carried @ gains), gains))
        return sorted([*found, nothing], key=lambda tilt: tilt.seen)

    @staticmethod
    def _normalised(masses: Tensor) -> Tensor:
        masses = (masses / masses.sum()).clamp_min(MASS_FLOOR / len(masses))
        return masses / masses.sum()


def tilted(rewards: Tensor, mean: float, start: Tensor | None = None) -> Tensor:
    """Masses ∝ start·exp(λ·r) [S] whose mean reward is `mean`: the least change (in KL) that gets there.

    start: [S], equal where None, and given back where no λ does: rewards all alike, or a mean beyond them.
    """
    if start is None:
        start = torch.full_like(rewards, 1 / len(rewards), dtype=torch.float64)
    scale = float(rewards.std(correction=0))
    if scale == 0 or not float(rewards.min()) < mean < float(rewards.max()):
        return start
    low, high = -50 / scale, 50 / scale
    for _ in range(60):
        middle = (low + high) / 2
        masses = torch.softmax(middle * rewards + start.log(), 0)
        low, high = (middle, high) if float(masses @ rewards) < mean else (low, middle)
    return masses
