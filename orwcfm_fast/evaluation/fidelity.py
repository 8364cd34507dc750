"""How near samples come to others (FID, KID, precision, recall), and how many kinds there are among them.

Distances between feature sets are torch-fidelity's; every figure has an interval from halves of the samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.intervals import Interval, from_halves, half_sampled, halves

REPEATS = 32
NEIGHBOURS = 3
FIDELITY_MIN = 2 * (NEIGHBOURS + 1)  # a half must hold more than the neighbours looked at


@dataclass(frozen=True)
class Fidelity:
    """Of n samples against m others; FID None where there are not enough of them for it."""

    fid: Interval | None
    kid: Interval
    precision: Interval
    recall: Interval


def fidelity(x: Tensor, real: Tensor, against: str, strict: bool = False) -> Fidelity:
    """Features x [N, F] of samples against features real [M, F].

    Args:
        against: what `real` is, for messages.
        strict: refuse where FID has too few samples, instead of leaving it out.

    Raises:
        UserError: fewer samples than a figure needs.
    """
    least = min(len(x), len(real))
    if least < FIDELITY_MIN:
        raise UserError(
            f"precision and recall need {FIDELITY_MIN} samples on each side; "
            f"there are {len(x)} and {len(real)} of the {against}"
        )
    if strict and least <= x.shape[1]:
        raise UserError(
            f"FID in {x.shape[1]} features needs more than {x.shape[1]} samples on each side; there are "
            f"{len(x)} and {len(real)} of the {against}: give a larger -n, or other --features"
        )
    x, real = x.cpu().double(), real.cpu().double()
    enough = least > x.shape[1]

    def figures(a: Tensor, b: Tensor) -> list[float]:
        return [frechet_distance(a, b) if enough else 0.0, kernel_distance(a, b), *precision_recall(a, b)]

    fid, kid, precision, recall = half_sampled(figures, x, real, repeats=REPEATS)
    return Fidelity(fid if enough else None, kid, precision, recall)


def frechet_distance(x: Tensor, real: Tensor) -> float:
    """FID (Heusel et al., NeurIPS 2017): W2² of the Gaussians with the features' means and covariances."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(v if v.shape[1] > 1 else F.pad(v, (0, 1))) for v in (x, real)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def kernel_distance(x: Tensor, real: Tensor) -> float:
    """KID (Bińkowski et al., ICLR 2018): unbiased MMD² with the kernel (x·y/F + 1)³; may be below 0."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(len(x), len(real))
    found = kid_features_to_metric(x, real, kid_subsets=1, kid_subset_size=size, verbose=False)
    return float(found["kernel_inception_distance_mean"])


def precision_recall(x: Tensor, real: Tensor) -> tuple[float, float]:
    """Share of x within reach of the data, and of the data within reach of x (Kynkäänniemi et al., NeurIPS 2019)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        x, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
    )
    return float(found["precision"]), float(found["recall"])


def vendi_score(x: Tensor) -> float:
    """Effective number of different samples among x [N, F] (Friedman & Dieng, TMLR 2023), cosine similarity.

    exp of the entropy of the eigenvalues of K/N, which are those of the smaller XᵀX/N; between 1 and min(N, F).
    """
    unit = F.normalize(x.flatten(1).double(), dim=1)
    gram = unit.T @ unit if unit.shape[1] < len(unit) else unit @ unit.T
    p = torch.linalg.eigvalsh(gram / len(unit)).clamp_min(1e-300)
    return float((-(p * p.log()).sum()).exp())


def mode_coverage(x: Tensor, real: Tensor, labels: Tensor) -> tuple[Interval, Interval]:
    """How many modes of labelled data the samples hold, and the share of them that lies on the data.

    A sample is of the mode of its nearest real sample, and on the data if that is no farther than 99 % of real
    samples are from their own nearest. A mode is covered by a tenth of the share that it has in the data.

    Args:
        x: [N, D]. real: [M, D]. labels: int [M].
    """
    x, real, labels = x.cpu().double(), real.cpu().double(), labels.cpu()
    own = torch.cdist(real, real).fill_diagonal_(torch.inf).min(1).values
    distance, nearest = torch.cdist(x, real).min(1)
    near = distance <= own.quantile(0.99)
    modes = F.one_hot(labels).double()
    hits, wanted = modes[nearest] * near[:, None], 0.1 * modes.mean(0)
    half = halves(len(x), REPEATS).double()
    covered = (half @ hits / half.sum(1, keepdim=True) >= wanted).sum(1)
    return from_halves(float((hits.mean(0) >= wanted).sum()), covered, len(x)), Interval.of(near.double())
