"""Videos and sound are shown as images and vectors are: a picture, an animation, waveforms."""

import pytest
import torch
from PIL import Image

from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.features import features_for
from orwcfm_fast.reporting.output import write_samples


def test_videos_are_shown_by_their_middle_frames_and_as_an_animation(tmp_path):
    videos = torch.linspace(-1, 1, 5).view(1, 5, 1, 1, 1).expand(3, 5, 3, 16, 16)
    write_samples(videos, tmp_path / "x.png")
    with Image.open(tmp_path / "x.webp") as animation:
        assert animation.n_frames == 5
    write_samples(videos, tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["0.webp", "1.webp", "2.webp"]


def test_sound_is_shown_by_its_waveforms(tmp_path):
    sound = torch.sin(torch.arange(400) / 5).expand(3, 2, 400)
    write_samples(sound, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert len(picture.convert("L").getcolors()) > 2
    with pytest.raises(UserError, match=r"sound; write a \.png or \.npz"):
        write_samples(sound, tmp_path / "folder")


def test_features_of_videos_and_sound_are_of_bounded_size():
    pixels = features_for("pixels", "prompts")
    assert pixels(torch.rand(2, 33, 3, 200, 100)).shape == (2, 8 * 3 * 64 * 64)
    assert pixels(torch.rand(2, 2, 100_000)).shape == (2, 2 * 4096)
