"""PNG pictures: samples, pairs of samples before and after training, curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orwcfm_fast.evaluation.intervals import Interval
from orwcfm_fast.reporting.images import GAP, grid_image, resized, tiled

WAVEFORMS = 8  # most of sound in one picture

DPI = 100  # a point of layout below is a pixel at this resolution
SHARPNESS = 2  # pixels written for each of them in the picture of a whole run, for dense screens
MARGIN, HEADER = 14, 50
LEAST = 460  # width that a title needs
PAIRS = 40  # most pairs of images in one picture
TOP, BELOW, BESIDE = 4, 15, 5  # room around a pair; below it for its change of class
BARS = 290  # width of the chart beside the pairs
BEFORE, AFTER, FRAME = "#9aa4b2", "#1f5fd0", "#e8590c"
Shares = Mapping[str, Interval]


def _figure(columns: int, width: float = 4.2, height: float = 3.2):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save_animation(path: Path, videos: Tensor, columns: int = 8, seconds_a_frame: float = 0.125) -> Path:
    """Videos [N, F, C, H, W] in [-1, 1] side by side, as an animated WebP."""
    first, *others = (grid_image(frame, columns) for frame in videos.unbind(1))
    first.save(path, save_all=True, append_images=others, duration=int(1000 * seconds_a_frame), loop=0)
    return path


def _waveforms(path: Path, samples: dict[str, Tensor]) -> Path:
    """Sound [N, channels, time]: the first few waveforms of each title, one below the other."""
    figure, axes = _figure(len(samples), 4.6, 4.9)
    for axis, (title, sound) in zip(axes, samples.items(), strict=True):
        for i, wave in enumerate(sound[:WAVEFORMS].float().mean(1).cpu()):
            axis.plot(wave / wave.abs().max().clamp_min(1e-6) - 2 * i, linewidth=0.5)
        axis.set(title=title, xlabel="time, in samples", yticks=[])
    figure.savefig(path, dpi=120)
    return path


def save_samples(path: Path, samples: dict[str, Tensor]) -> Path:
    """Samples of one shape under titles: one grid of images; a scatter plot each in 2-D; histograms in 1-D.

    Of videos [N, F, C, H, W] the middle frames, with an animation beside `path`; of sound [N, channels, time] the
    waveforms.
    """
    first = next(iter(samples.values()))
    if first.dim() == 3:
        return _waveforms(path, samples)
    if first.dim() == 5:
        title, videos = [*samples.items()][-1]
        save_animation(path.with_suffix(".webp"), videos)
        first = videos[:, videos.shape[1] // 2]
        samples = {title: first}
    if first.dim() == 4:
        ((title, images),) = samples.items()
        tiles, words = resized(images)
        canvas = tiled(tiles, columns=8)
        figure, _ = titled_canvas(canvas, title, words, max(LEAST, canvas.shape[1] + 2 * MARGIN))
        figure.savefig(path, dpi=DPI * SHARPNESS)
        return path
    if first.shape[1] == 1:
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


def save_pairs(
    path: Path,
    before: Tensor,
    after: Tensor,
    rounds: str,
    changes: Sequence[str] | None = None,
    shares: tuple[Shares, Shares] | None = None,
) -> Path:
    """Images of the same noise before and after training, in pairs; those that changed class are framed.

    Args:
        before, after: images [N, C, H, W] in [-1, 1], at most PAIRS of them.
        rounds: what lies between them, such as "8 rounds".
        changes: for each pair the change of class, such as "3→8", or an empty text; None without a classifier.
        shares: the share of each class before and after, for a bar chart beside the pairs.
    """
    from matplotlib.patches import Rectangle

    left, words = resized(before)
    right, _ = resized(after)
    between = np.full((*left.shape[:2], 2, 3), 255, dtype=np.uint8)
    pairs = np.concatenate([left, between, right], axis=2)
    height, width = pairs.shape[1:3]
    space = ((0, 0), (TOP, BELOW), (BESIDE, BESIDE), (0, 0))
    columns = max(2, 560 // (width + 2 * BESIDE + GAP))
    canvas = tiled(np.pad(pairs, space, constant_values=255), columns)
    notes = [words]
    if changes is not None:
        notes.append(f"framed: the classifier sees another class, {sum(map(bool, changes))} of {len(pairs)}")
    total = max(LEAST, canvas.shape[1] + 2 * MARGIN) + (BARS if shares else 0)
    title = f"From the same noise: before (left) and after {rounds} (right)"
    figure, axis = titled_canvas(canvas, title, "; ".join(filter(None, notes)), total)
    for i, change in enumerate(changes or []):
        if change:
            x = GAP + BESIDE + i % columns * (width + 2 * BESIDE + GAP)
            y = GAP + TOP + i // columns * (height + TOP + BELOW + GAP)
            frame = Rectangle((x - 3.5, y - 3.5), width + 6, height + 6, fill=False, edgecolor=FRAME)
            axis.add_patch(frame)
            axis.text(x + width / 2, y + height + 13, change, color=FRAME, fontsize=7.5, ha="center")
    if shares:
        _bars(figure, shares, total, canvas.shape[0] + HEADER + MARGIN, total - BARS)
    figure.savefig(path, dpi=DPI * (SHARPNESS if shares else 1))
    return path


def titled_canvas(pixels: np.ndarray, title: str, note: str, width: int):
    """A figure of `width` that shows pixels [h, w, 3] at their own size under a title and a note; and its axes."""
    from matplotlib.figure import Figure

    height = pixels.shape[0] + HEADER + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(MARGIN / width, 1 - 20 / height, title, fontsize=10.5, weight="bold")
    figure.text(MARGIN / width, 1 - 38 / height, note, fontsize=8, color="#5a6675")
    box = (
        MARGIN / width,
        MARGIN / height,
        pixels.shape[1] / width,
        pixels.shape[0] / height,
    )
    axis = figure.add_axes(box)
    axis.imshow(pixels, interpolation="bilinear", aspect="auto")
    axis.set_axis_off()
    return figure, axis


def _bars(figure, shares: tuple[Shares, Shares], width: int, height: int, left: int) -> None:
    """The share of each class before and after, with 95 % intervals, from `left` to the right margin."""
    box = (left + 30, MARGIN + 18, BARS - 30 - MARGIN, height - HEADER - MARGIN - 18)
    axis = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    names, place = [*shares[0]], np.arange(len(shares[0]))
    styles = ((-0.2, "before", BEFORE), (0.2, "after", AFTER))
    for (offset, label, colour), of in zip(styles, shares, strict=True):
        values = [100 * of[name].mean for name in names]
        errors = [100 * (of[name].high - of[name].mean) for name in names]
        axis.barh(
            place + offset, values, 0.38, xerr=errors, color=colour, label=label,
            error_kw={"elinewidth": 0.8, "ecolor": "#4a5563"},
        )  # fmt: skip
    axis.set_yticks(place, names)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.text(
        left / width + 30 / width, 1 - 20 / height, "Share of each class, %", fontsize=10.5, weight="bold"
    )
    figure.legend(
        loc="upper left",
        bbox_to_anchor=((left + 22) / width, 1 - 22 / height),
        ncols=2,
        frameon=False,
        fontsize=8,
    )


def save_curves(path: Path, records: Sequence[dict[str, Any]], reward: float, diversity: float) -> Path:
    """Reward, W2 to the reference and diversity over the rounds trained.

    A round's rollout comes from the policy as it was before the round, and its W2 from the policy after it.

    Args:
        reward, diversity: of the policy after the last round.
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
