"""Points of one and two dimensions, drawn with a fixed seed."""

import math
from pathlib import Path

import torch

from orwcfm_fast.data.datasets import dataset

SAMPLES = 50_000


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataset("two-gaussians", (1,), "mlp", "right")
def two_gaussians(data_dir: Path, argument: str):
    """½N(−1.5, 0.3²) + ½N(1.5, 0.3²) in one dimension"""
    g = _generator()
    side = torch.randint(0, 2, (SAMPLES, 1), generator=g)
    return (3.0 * side - 1.5) + 0.3 * torch.randn(SAMPLES, 1, generator=g), side[:, 0]


@dataset("8gaussians", (2,), "mlp", "right")
def eight_gaussians(data_dir: Path, argument: str):
    """eight Gaussians of deviation 0.2 on a circle of radius 2"""
    g = _generator()
    mode = torch.randint(0, 8, (SAMPLES,), generator=g)
    angle = mode * (math.pi / 4)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.2 * torch.randn(SAMPLES, 2, generator=g), mode


@dataset("moons", (2,), "mlp", "right")
def moons(data_dir: Path, argument: str):
    """two interleaved half circles, centred, noise 0.05"""
    from sklearn.datasets import make_moons

    x, y = make_moons(SAMPLES, noise=0.05, random_state=0)
    x = torch.as_tensor(x, dtype=torch.float32)
    return 2 * (x - torch.tensor([0.5, 0.25])), torch.as_tensor(y)


@dataset("checkerboard", (2,), "mlp", "right")
def checkerboard(data_dir: Path, argument: str):
    """the eight dark squares of a 4×4 board over [−2, 2]²"""
    g = _generator()
    square = torch.randint(0, 8, (SAMPLES,), generator=g)
    row = square // 2
    corner = torch.stack([2 * (square % 2) + row % 2, row], 1) - 2.0
    return corner + torch.rand(SAMPLES, 2, generator=g), square
