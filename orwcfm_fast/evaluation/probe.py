"""The probe: samples from the same noise after every round, which drift and diversity are followed on."""

from collections.abc import Callable

from torch import Tensor

from orwcfm_fast.control.controller import RunController
from orwcfm_fast.control.target_w2 import probe_size
from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.evaluation.drift import coupled_w2, pairwise_distance, sample_with_gap
from orwcfm_fast.evaluation.features import decoded_features
from orwcfm_fast.method.rollout import sample, start_conditions, start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune


class Probe:
    """A policy beside its reference, on one noise; each rank draws its share, all know the whole.

    Args:
        policy, reference: that are compared.
        features: decoded samples → features [B, F] in which diversity is measured.
        oversight: knows how many samples fit at once.

    Attributes:
        noise: x0 [n, *shape].
        of_reference, samples: what the reference makes of it, and the policy when it was last looked at.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy,
        settings: Finetune,
        features: Callable[[Tensor], Tensor],
        oversight: RunController,
        ranks: ProcessGroup,
    ) -> None:
        self.policy, self.reference, self.settings, self.features = policy, reference, settings, features
        self.oversight, self.ranks = oversight, ranks
        self.noise = start_noise(policy, probe_size(settings), settings.seed)
        self.samples = self.of_reference = self._draw(reference)
        self._spread = self.diversity(self.of_reference)
        oversight.guard.spread = pairwise_distance(self.of_reference)

    def look(self) -> None:
        """Draw the policy's samples as it is now."""
        self.samples = self._draw(self.policy)

    def look_along(self) -> float:
        """`look`, and the mean velocity gap along the way."""
        x0, condition = self._part()
        with self.ranks.together():
            part, gap = self.oversight.in_chunks(
                lambda chunk: sample_with_gap(
                    self.policy, self.reference, x0, self.settings, chunk, condition
                )
            )
        self.samples = self.ranks.gather(part, len(self.noise))
        return sum(self.ranks.all(gap * len(x0))) / len(self.noise)

    def start_over(self) -> None:
        """The policy is its reference again."""
        self.samples = self.of_reference

    def w2(self) -> float:
        """Coupled W2 of the two."""
        return coupled_w2(self.samples, self.of_reference)

    def share(self) -> float:
        """The policy's diversity over the reference's."""
        return self.diversity(self.samples) / max(self._spread, 1e-12)

    def diversity(self, x: Tensor) -> float:
        """Mean distance of two of any samples x [N, *shape], the same on all ranks, in features."""
        mine = x[self.ranks.share(len(x))]
        with self.ranks.together():
            part = self.oversight.in_chunks(
                lambda chunk: decoded_features(self.policy, self.features, mine, chunk)
            )
        return pairwise_distance(self.ranks.gather(part, len(x)))

    def _draw(self, policy: Policy) -> Tensor:
        x0, condition = self._part()
        with self.ranks.together():
            part = self.oversight.in_chunks(
                lambda chunk: sample(policy, x0, self.settings, chunk, condition=condition)
            )
        return self.ranks.gather(part, len(self.noise))

    def _part(self) -> tuple[Tensor, Tensor | None]:
        """This rank's share: its noise [n, *shape] and rows [n] of the prompts, where there are some."""
        mine = self.ranks.share(len(self.noise))
        x0 = self.noise[mine]
        return x0, start_conditions(self.policy, len(x0), self.settings, mine.start)
