"""What a picture shows is what its caption says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orwcfm_fast.evaluation.evaluate import class_shares
from orwcfm_fast.evaluation.intervals import Interval
from orwcfm_fast.reporting import pictures
from orwcfm_fast.reporting.charts import Series, bar_chart
from orwcfm_fast.reporting.images import grid_image, resized
from orwcfm_fast.reporting.output import write_samples

FRAME = tuple(int(pictures.FRAME[i : i + 2], 16) for i in (1, 3, 5))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_only_pairs_that_changed_class_are_framed_and_before_stands_left_of_after(tmp_path):
    before, after = torch.full((7, 1, 8, 8), -1.0), torch.ones(7, 1, 8, 8)
    changes = ["", "3→8", "", "", "", "", "1→0"]
    plain = pixels(pictures.save_pairs(tmp_path / "plain.png", before, after, "2 rounds"))
    framed = pixels(pictures.save_pairs(tmp_path / "framed.png", before, after, "2 rounds", changes))
    columns, starts = np.flatnonzero((plain[60] < 9).all(-1)), []
    for x in columns:
        if not starts or x - starts[-1] > 60:
            starts.append(int(x))
    assert len(starts) == 5, "five pairs in the first row, each with its black image first"
    assert (plain[70, starts[0] + 55 : starts[0] + 90] > 250).all(), "and its white one beside it"
    found = np.argwhere((abs(framed.astype(int) - FRAME) < 12).all(-1))
    pitch = starts[1] - starts[0]
    cells = {(int(y > 125), int((x - starts[0] + 8) // pitch)) for y, x in found}
    assert cells == {(0, 1), (1, 1)}


def test_small_images_are_enlarged_and_large_ones_reduced_and_the_caption_says_so():
    tiles, words = resized(torch.zeros(2, 1, 8, 8))
    assert tiles.shape == (2, 48, 48, 3) and words == "enlarged ×6 and smoothed (bicubic)"
    tiles, words = resized(torch.zeros(1, 3, 512, 256))
    assert tiles.shape == (1, 128, 64, 3) and words == "reduced to 128 pixels"
    assert resized(torch.zeros(1, 3, 64, 64))[1] == ""


def test_sampled_files_hold_the_very_pixels(tmp_path):
    images = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
    expected = ((images + 1) * 127.5).round().to(torch.uint8).numpy()
    write_samples(images, tmp_path / "folder")
    for i in range(2):
        assert (np.asarray(Image.open(tmp_path / "folder" / f"{i}.png")) == expected[i, 0]).all()
    grid = np.asarray(grid_image(images, columns=2))
    assert grid.shape == (2 + 66, 2 + 2 * 66)
    assert (grid[2:66:8, 2:66:8] == expected[0, 0]).all() and (grid[9:66:8, 75:134:8] == expected[1, 0]).all()


def test_shares_of_classes_add_up_and_have_binomial_intervals():
    probabilities = torch.eye(4)[[0, 0, 0, 1, 1, 2, 2, 2, 2, 2]]
    shares = class_shares(probabilities)
    assert [shares[k].mean for k in "0123"] == pytest.approx([0.3, 0.2, 0.5, 0])
    half = 1.96 * (0.3 * 0.7 / 9) ** 0.5
    assert shares["0"].high - shares["0"].mean == pytest.approx(half, rel=1e-6)
    assert Interval(**vars(shares["3"])) == Interval(0, 0, 0)


def test_bars_are_as_high_as_their_values_and_texts_are_escaped():
    groups = [Series(name, [0, 1], y, style, y, y) for name, y, style in
              (("<before>", [10, 20], "before"), ("after", [5, 40], "a"))]  # fmt: skip
    svg = str(bar_chart("share", groups, ["0", "1"]))
    heights = [
        float(part.split('"')[0]) for part in svg.split("<rect ")[1:] for part in [part.split('height="')[1]]
    ]
    assert np.array(heights) / heights[0] == pytest.approx([1, 2, 0.5, 4], rel=0.01)
    assert "&lt;before&gt;" in svg and "<before>" not in svg
