"""Memory of the two evaluations of a run: of the probe samples after each round, and of held-out samples at the end."""

from collections.abc import Callable
from dataclasses import dataclass

from orwcfm_fast.evaluation.evaluate import DIVERSITY_SAMPLES, EXACT_W2_SAMPLES
from orwcfm_fast.evaluation.held_out import FLOAT64_CHUNK
from orwcfm_fast.evaluation.probe import probe_size
from orwcfm_fast.reporting.pictures import PAIRS
from orwcfm_fast.settings import Finetune

ROLLOUT_DIVERSITY_SAMPLES = 512  # samples of a rollout that its diversity is measured on


@dataclass(frozen=True)
class EvaluationMemory:
    """Peak memory of evaluation on one of `ranks`, in bytes.

    Args:
        sample, image, feature: bytes of one sample, of one decoded sample, and of the features of one.
        sampling, decoding: number of samples → peak bytes; that of decoding without the images themselves.
        in_chunks: images are decoded a chunk at a time, not a rank's whole share at once.
        on_host: the device is the CPU, on which the exact W2 is solved.
    """

    s: Finetune
    ranks: int
    sample: int
    image: int
    feature: int
    sampling: Callable[[int], int]
    decoding: Callable[[int], int]
    in_chunks: bool
    on_host: bool

    @property
    def stored_probe_samples(self) -> int:
        """Bytes kept for the whole run: the probe's noise, the policy's samples and the reference's."""
        return 3 * probe_size(self.s) * self.sample

    def _decoding(self, n: int, chunk: int) -> int:
        n = min(n, chunk) if self.in_chunks else n
        return max(self.decoding(min(n, self.s.vae_chunk)) + n * self.image, 2 * n * self.image)

    def probe(self, chunk: int) -> dict[str, int]:
        """Peak after each round, by part, with `chunk` samples drawn at once."""
        probed, spread = probe_size(self.s), min(ROLLOUT_DIVERSITY_SAMPLES, self.s.rollout)
        mine = -(-probed // self.ranks)
        sampled = self.sampling(min(mine, chunk)) + 2 * mine * self.sample
        decoded = self._decoding(-(-max(spread, probed) // self.ranks), chunk)
        return {"sampling or decoding": max(sampled, decoded), "features": max(spread, probed) * self.feature}

    def evaluation(self, chunk: int) -> dict[str, int]:
        """Peak of the evaluation at the end, by part, with `chunk` samples drawn at once."""
        n = self.s.eval_n
        mine, most, pictured = (
            -(-n // self.ranks),
            min(n, DIVERSITY_SAMPLES),
            min(probe_size(self.s), PAIRS),
        )
        values = self.feature // 4
        sampled = self.sampling(min(mine, chunk)) + 3 * min(mine, chunk) * self.sample
        decoded = (
            self._decoding(mine, chunk) + 4 * self.image + 16 * min(FLOAT64_CHUNK, mine * self.image // 4)
        )
        figures = 16 * most * values + 24 * min(most, values) ** 2
        exact = min(n, EXACT_W2_SAMPLES)
        transport = exact * (4 * self.sample + 16 * exact) if self.on_host else 0
        pictures = self.decoding(min(pictured, self.s.vae_chunk)) + 3 * pictured * self.image
        return {
            "samples": (3 * n + mine) * self.sample,
            "features": 2 * n * self.feature,
            "sampling, decoding or figures": max(sampled, decoded, figures, transport, pictures),
        }
