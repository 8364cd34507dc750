"""The most and the least rewarded samples of a round, side by side: what the reward pays for, by eye."""

from pathlib import Path

import torch
from torch import Tensor

from orwcfm_fast.reporting.images import resized, tiled
from orwcfm_fast.reporting.pictures import DPI, LEAST, MARGIN, SHARPNESS, save_samples, titled_canvas

ACROSS = 8  # images in each of the two rows
POINTS = 0.1  # share of the samples, where they are points of a scatter plot


def extreme_rows(reward: Tensor, image: bool) -> tuple[Tensor, Tensor]:
    """Numbers of the most rewarded samples, the best first, and of the least rewarded, the worst first.

    Args:
        reward: [N], N ≥ 2.
        image: whether a sample is shown as an image, or else as a point.
    """
    n = ACROSS if image else max(ACROSS, int(POINTS * len(reward)))
    order = reward.argsort(descending=True, stable=True)
    n = min(n, len(order) // 2)
    return order[:n], order.flip(0)[:n]


def save_extremes(
    path: Path, most: Tensor, least: Tensor, rewards: tuple[Tensor, Tensor], number: int
) -> Path:
    """A picture of the two groups: images, or the middle frames of videos, in two rows; others as `save_samples` does.

    Args:
        most, least: decoded samples [n, …] of each group.
        rewards: of each of them, [n].
        number: of the round.
    """
    ranges = [f"{float(r.min()):.3g} to {float(r.max()):.3g}" for r in rewards]
    if most.dim() == 5:
        most, least = (x[:, x.shape[1] // 2] for x in (most, least))
    if most.dim() != 4:
        return save_samples(
            path, {f"most rewarded, {ranges[0]}": most, f"least rewarded, {ranges[1]}": least}
        )
    tiles, words = resized(torch.cat([most, least]))
    canvas = tiled(tiles, columns=len(most))
    title = f"Round {number}: most rewarded above, least below"
    note = "; ".join(filter(None, [f"rewards {ranges[0]} and {ranges[1]}", words]))
    figure, _ = titled_canvas(canvas, title, note, max(LEAST, canvas.shape[1] + 2 * MARGIN))
    figure.savefig(path, dpi=DPI * SHARPNESS)
    return path
