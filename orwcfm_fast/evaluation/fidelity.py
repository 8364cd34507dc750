"""Fidelity to other samples (FID, KID, precision, recall) and diversity (Vendi score, covered modes).

Distances between sets of features are torch-fidelity's. Every figure has an interval from random halves of the samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.intervals import Interval, from_halves, half_sampled, halves

REPEATS = 32
NEIGHBOURS = 3
FIDELITY_MIN = 2 * (NEIGHBOURS + 1)  # half of the samples must be more than the neighbours of one


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of n samples to m others; `fid` is None where there are too few samples for it."""

    fid: Interval | None
    kid: Interval
    precision: Interval
    recall: Interval


def fidelity(x: Tensor, real: Tensor, against: str, strict: bool = False) -> Fidelity:
    """Fidelity of samples with features x [N, F] to others with features real [M, F].

    Args:
        against: what `real` is, for messages.
        strict: raise where there are too few samples for FID, instead of leaving it out.

    Raises:
        UserError: there are fewer samples than a figure needs.
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
    """Precision: share of x on the data's manifold; recall: the reverse (Kynkäänniemi et al., NeurIPS 2019)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        x, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
    )
    return float(found["precision"]), float(found["recall"])


def vendi_score(x: Tensor) -> float:
    """Effective number of different samples among x [N, F] by cosine similarity (Friedman & Dieng, TMLR 2023).

    The exponential of the entropy of the eigenvalues of K/N, which are those of the smaller XᵀX/N; between 1 and
    min(N, F).
    """
    unit = F.normalize(x.flatten(1).double(), dim=1)
    gram = unit.T @ unit if unit.shape[1] < len(unit) else unit @ unit.T
    p = torch.linalg.eigvalsh(gram / len(unit)).clamp_min(1e-300)
    return float((-(p * p.log()).sum()).exp())


def mode_coverage(x: Tensor, real: Tensor, labels: Tensor) -> tuple[Interval, Interval]:
    """Number of modes of labelled data that the samples cover, and the share of the samples on the data.

    A sample belongs to the mode of its nearest real sample. It is on the data if that distance is at most the one
    within which 99 % of the real samples have a neighbour. A mode is covered if its share of the samples is at least
    a tenth of its share of the data.

    Args:
        x: samples [N, D].
        real: real samples [M, D].
        labels: their modes, int [M].
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
