"""PNG pictures: grids of samples, curves of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GAP = 2


def grid_image(images: Tensor, columns: int = 8, zoom: int | None = None):
    """Images [N, C, H, W] in [-1, 1] as one PIL image, enlarged to whole multiples (about 64 pixels each)."""
    from PIL import Image

    n, channels, height, width = images.shape
    zoom = zoom or max(1, 64 // height)
    rows = -(-n // columns)
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    canvas = torch.full((channels, rows * cell_h + GAP, columns * cell_w + GAP), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = GAP + i // columns * cell_h, GAP + i % columns * cell_w
        canvas[:, top : top + height * zoom, left : left + width * zoom] = image
    array = canvas.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def _figure(columns: int, width: float = 4.2, height: float = 3.2):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save_samples(path: Path, samples: dict[str, Tensor]) -> Path:
    """Samples of one shape under titles, side by side: image grids, a scatter in 2-D, histograms in 1-D."""
    first = next(iter(samples.values()))
    if first.dim() == 4 and len(samples) == 1:
        grid_image(first).save(path)
        return path
    if first.dim() == 4:
        figure, axes = _figure(len(samples), 4.6, 4.9)
        for axis, (title, images) in zip(axes, samples.items(), strict=True):
            axis.imshow(grid_image(images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(title=title, xticks=[], yticks=[])
    elif first.shape[1] == 1:
        figure, axes = _figure(1, 6)
        low, high = (float(f(torch.cat([*samples.values()]))) for f in (torch.min, torch.max))
        for title, x in samples.items():
            axes[0].hist(
                x[:, 0].cpu().numpy(), bins=60, range=(low, high), density=True, alpha=0.5, label=title
            )
        axes[0].set(xlabel="x", ylabel="density")
        axes[0].legend(frameon=False, loc="upper right")
    else:
        figure, axes = _figure(len(samples), 4.2, 4.6)
        reach = float(torch.cat([*samples.values()])[:, :2].abs().max()) * 1.05
        for axis, (title, x) in zip(axes, samples.items(), strict=True):
            axis.scatter(*x[:, :2].cpu().numpy().T, s=9, alpha=0.6, linewidths=0)
            axis.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    figure.savefig(path, dpi=120)
    return path


def save_curves(path: Path, records: Sequence[dict[str, Any]], reward: float, diversity: float) -> Path:
    """Reward, W2 to the reference and diversity by rounds trained; `reward` and `diversity` after the last.

    A round's rollout shows the policy as it was before the round, its W2 as it is after.
    """
    figure, axes = _figure(3)
    titles = ("mean reward", "coupled W2 to the reference", "diversity (mean pairwise distance)")
    curves = (
        [*(r["reward_mean"] for r in records), reward],
        [0.0, *(r["w2_coupled"] for r in records)],
        [*(r["diversity"] for r in records), diversity],
    )
    for axis, title, values in zip(axes, titles, curves, strict=True):
        axis.plot(values, marker="o", markersize=3)
        axis.set(xlabel="rounds trained", title=title)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    return path
