"""Draws the pictures of method.md into docs/pictures/: python docs/pictures.py (half a minute, no training).

Every number in them is computed here: by quadrature (orwcfm_fast.theory) on the mixture of the tests,
q_0 = ½N(−1.5, 0.3²) + ½N(1.5, 0.3²) with the reward 1[x > 0], or by counting draws from it.
"""

from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from orwcfm_fast.theory import GaussianMixture, Recursion, exact_recursion

FOLDER = Path(__file__).parent / "pictures"
BLUE, ORANGE, GREY, GREEN = "#1f5fd0", "#c2540a", "#8a94a3", "#0f8a6c"
TAU = 0.5
MIXTURE = GaussianMixture([0.5, 0.5], [-1.5, 1.5], 0.3)


def reward(x: Tensor) -> Tensor:
    """1 on the right side, else 0; x [n, 1] → [n]."""
    return (x[:, 0] > 0).double()


def solve(alpha: float, rounds: int) -> Recursion:
    return exact_recursion(MIXTURE, reward, alpha, TAU, rounds, check=False)


def save(figure: Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def draw_path() -> None:
    """A flow from noise to data: the exact velocity carries noise along to one of two modes."""
    velocity = solve(1.0, 1).rounds[0].velocity
    noise = torch.linspace(-2.2, 2.2, 24, dtype=torch.float64)[:, None]
    times = torch.linspace(0, 1, 101).tolist()
    path = [noise]
    for t, t_next in pairwise(times):
        half = path[-1] + (t_next - t) / 2 * velocity(t, path[-1])
        path.append(path[-1] + (t_next - t) * velocity((t + t_next) / 2, half))
    x = torch.cat(path, 1)
    grid = torch.linspace(-3, 3, 301, dtype=torch.float64)[:, None]
    normal = torch.exp(-(grid[:, 0] ** 2) / 2) / (2 * torch.pi) ** 0.5
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(9, 3.4), sharey=True, gridspec_kw={"width_ratios": [1, 4, 1], "wspace": 0.05}
    )
    left.fill_betweenx(grid[:, 0], -normal, 0, color=GREY, alpha=0.5)
    left.set_title("noise x0, t = 0", fontsize=10)
    for row in x:
        middle.plot(times, row, color=ORANGE if row[-1] > 0 else BLUE, linewidth=1)
    middle.set_title("dx = v(t, x) dt", fontsize=10)
    middle.set_xlabel("t")
    right.fill_betweenx(grid[:, 0], 0, MIXTURE.log_prob(grid).exp(), color=GREY, alpha=0.5)
    right.set_title("samples x1, t = 1", fontsize=10)
    for axes in (left, right):
        axes.axis("off")
    middle.set_xlim(0, 1)
    bare(middle)
    middle.spines["left"].set_visible(False)
    middle.tick_params(left=False)
    save(figure, "path")


def draw_round() -> None:
    """One round as boxes: what is computed, in order, and from what."""
    boxes = [
        ("draw", "samples x1 of the\ncurrent policy"),
        ("score", "r = reward(x1)"),
        ("weigh", "w = exp(τ·r)\nover its mean, less 1"),
        ("blend", "anchor velocity of\nv_old and α·v_ref"),
        ("step", "gradient steps on\nthe round's draws"),
    ]
    figure, axes = pyplot.subplots(figsize=(9, 2.3))
    for k, (name, what) in enumerate(boxes):
        axes.add_patch(
            FancyBboxPatch(
                (k * 2.1, 0), 1.7, 1.1, boxstyle="round,pad=0.05", facecolor="#eef3fc", edgecolor=BLUE
            )
        )
        axes.text(k * 2.1 + 0.85, 0.85, name, ha="center", va="center", weight="bold", fontsize=11)
        axes.text(k * 2.1 + 0.85, 0.38, what, ha="center", va="center", fontsize=7.5)
        if k:
            axes.annotate(
                "",
                (k * 2.1 - 0.05, 0.55),
                (k * 2.1 - 0.35, 0.55),
                arrowprops={"arrowstyle": "->", "color": BLUE},
            )
    last = 2.1 * (len(boxes) - 1) + 0.85
    axes.plot([last, last, 0.85], [-0.06, -0.5, -0.5], color=BLUE, linewidth=1)
    axes.annotate("", (0.85, -0.06), (0.85, -0.5), arrowprops={"arrowstyle": "->", "color": BLUE})
    axes.text((last + 0.85) / 2, -0.72, "record and save the round; the next one draws from the new policy",
              ha="center", va="center", fontsize=9)  # fmt: skip
    axes.set_xlim(-0.2, 10.3)
    axes.set_ylim(-0.9, 1.25)
    axes.axis("off")
    save(figure, "round")


def draw_recursion() -> None:
    """The law of the samples by round for three α, and its mean reward."""
    figure, panels = pyplot.subplots(1, 4, figsize=(11, 2.9), gridspec_kw={"wspace": 0.28})
    for axes, alpha, colour in zip(panels, (1.0, 0.3, 0.0), (BLUE, GREEN, ORANGE), strict=False):
        found = solve(alpha, 8)
        x = found.grid.points[:, 0]
        for k in (0, 1, 3, 8):
            shade = GREY if k == 0 else colour
            axes.plot(x, found.rounds[k].density, color=shade, alpha=0.35 + 0.08 * k, label=f"round {k}")
        axes.set_title(f"α = {alpha:g}", fontsize=10)
        axes.set_xlim(-3, 3)
        axes.set_ylim(0, 1.4)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        panels[3].plot(
            range(9), [r.reward for r in found.rounds], color=colour, label=f"α = {alpha:g}", marker="."
        )
        bare(axes)
    panels[3].set_title("mean reward by round", fontsize=10)
    panels[3].set_ylim(0.45, 1.02)
    panels[3].set_xticks(range(0, 9, 2))
    panels[3].legend(fontsize=8, frameon=False, loc="upper left")
    bare(panels[3])
    save(figure, "recursion")


def draw_centred() -> None:
    """What each draw contributes to the gradient at the policy itself, in both forms of the objective."""
    velocity = solve(1.0, 1).rounds[0].velocity
    generator = torch.Generator().manual_seed(0)
    n, time = 20_000, 0.5
    side = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64)
    x1 = 3 * side - 1.5 + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x0 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    residual = (velocity(time, (1 - time) * x0 + time * x1) - (x1 - x0))[:, 0]
    w = (TAU * reward(x1)).exp()
    w = w / w.mean()
    figure, axes = pyplot.subplots(figsize=(7.5, 3))
    for form, values, colour in (("orw", w * residual, GREY), ("orw-centred", (w - 1) * residual, ORANGE)):
        axes.hist(values, 121, range=(-3, 3), density=True, alpha=0.65, color=colour,
                  label=f"{form}: mean {values.mean():.3f}, deviation {values.std():.2f}")  # fmt: skip
    axes.set_xlabel("w·(v_old − u) and (w − 1)·(v_old − u), one draw each, at t = 0.5")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left")
    bare(axes)
    save(figure, "centred")


def draw_distances() -> None:
    """The coupled distance follows one noise through two models; W2 may pair the samples better."""
    found = solve(0.0, 3)
    noise = torch.linspace(-1.6, 1.6, 10, dtype=torch.float64)[:, None]
    ends = []
    for k in (0, 3):
        x = noise
        for t, t_next in pairwise(torch.linspace(0, 1, 101).tolist()):
            half = x + (t_next - t) / 2 * found.rounds[k].velocity(t, x)
            x = x + (t_next - t) * found.rounds[k].velocity((t + t_next) / 2, half)
        ends.append(x[:, 0])
    figure, axes = pyplot.subplots(figsize=(7.5, 2.6))
    for height, xs, colour in ((2, noise[:, 0], GREY), (1, ends[0], BLUE), (0, ends[1], ORANGE)):
        axes.scatter(xs, torch.full_like(xs, height), color=colour, zorder=3)
    for a, b, c in zip(noise[:, 0], *ends, strict=True):
        axes.plot([a, b], [2, 1], color=GREY, linewidth=0.7)
        axes.plot([b, c], [1, 0], color=GREEN, linewidth=1.4)
    for height, label in ((2, "shared noise"), (1, "pretrained"), (0, "after 3 rounds")):
        axes.text(-3.4, height, label, va="center", ha="right", fontsize=10)
    axes.set_xlim(-3.3, 2.6)
    axes.axis("off")
    save(figure, "distances")


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "orwcfm", "font.size": 9})
    for draw in (draw_path, draw_round, draw_recursion, draw_centred, draw_distances):
        draw()


if __name__ == "__main__":
    main()
