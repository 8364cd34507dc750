"""Rewards: values, names, arguments, and what users bring."""

import io

import pytest
import torch

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.rewards import make_reward, score
from orwcfm_fast.rewards.combine import split_weight


def images(n=4, c=3, size=16):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_reward_is_the_size_of_the_file_pillow_writes(channels):
    from PIL import Image

    x = images(3, channels)
    values = make_reward("jpeg-incompressibility:80")(x)
    for image, value in zip(x, values, strict=True):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "JPEG", quality=80)
        assert float(value) == pytest.approx(len(file.getvalue()) / 1000)
    assert torch.equal(make_reward("jpeg-compressibility:80")(x), -values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_nvjpeg_files_are_those_of_pillow_at_full_colour_resolution():
    from PIL import Image

    x = images(8, 3, 128)
    values = make_reward("jpeg-incompressibility:80")(x.cuda())
    for image, value in zip(x, values, strict=True):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80, subsampling=0)
        assert float(value) == pytest.approx(len(file.getvalue()) / 1000, rel=0.1)


def test_weights_after_equals_add_up():
    x = images()
    total = make_reward(["brightness=2", "jpeg-compressibility=-0.5"])
    assert torch.allclose(
        total(x), 2 * make_reward("brightness")(x) - 0.5 * make_reward("jpeg-compressibility")(x)
    )
    assert list(total.scores(x).values) == ["brightness", "jpeg-compressibility"]


def test_2d_rewards():
    x = torch.tensor([[1.0, 3.0], [-2.0, 0.0]])
    assert make_reward("right")(x).tolist() == [1, 0]
    assert make_reward("coordinate:1")(x).tolist() == [3, 0]
    assert make_reward("radius")(x)[1] == -2


@pytest.mark.slow
def test_digit_classifier_judges_held_out_digits_and_is_cached(tmp_path, monkeypatch):
    """Also where it is first asked for while samples are scored, as by `predict` and `sweep` on a fresh machine."""
    from orwcfm_fast.data.datasets import load_data
    from orwcfm_fast.rewards.digits import digit_classifier

    monkeypatch.setenv("ORWCFM_CACHE", str(tmp_path))
    digit_classifier.cache_clear()
    with torch.inference_mode():
        classifier = digit_classifier()
    assert classifier.accuracy >= 0.97
    x, labels = load_data("digits")
    even = make_reward("even-digits")(x)
    assert float(((even > 0.5) == (labels % 2 == 0)).float().mean()) > 0.98
    assert float(make_reward("digit:3")(x)[labels == 3].mean()) > 0.97
    digit_classifier.cache_clear()
    again = digit_classifier()
    assert torch.equal(again.probabilities(x[:50]), classifier.probabilities(x[:50]))
    digit_classifier.cache_clear()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("even-digit", "did you mean 'even-digits'"),
        ("digit:12", "K from 0 to 9"),
        ("brightness:3", "takes no argument"),
        ("brightness=x", "should be a number"),
        ("brightness=inf", "finite"),
        ("jpeg-compressibility:200", "1 to 95"),
        ("nothere.py:f", "no file"),
        ("not_a_module:f", "No module named"),
    ],
)
def test_a_wrong_name_or_argument_is_one_clear_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        make_reward(spec)
    assert "\n" not in str(error.value)


def test_a_users_file_and_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_reward.py").write_text("def score(x):\n    return x.flatten(1).sum(1)\n")
    x = images()
    for spec in ("mine_reward.py:score", "mine_reward:score", "mine_reward.py:score=1"):
        assert torch.allclose(make_reward(spec)(x), x.flatten(1).sum(1))
    with pytest.raises(UserError, match=r"no function 'scor' \(has: score\)"):
        make_reward("mine_reward.py:scor")


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [("runs/a=1/mine.py:f", "runs/a=1/mine.py:f", 1.0), ("runs/a=1/mine.py:f=0.5", "runs/a=1/mine.py:f", 0.5),
     ("aesthetic:lr=2.safetensors", "aesthetic:lr=2.safetensors", 1.0), ("brightness=-1e-3", "brightness", -1e-3),
     (r"C:\a=b\mine.py:f", r"C:\a=b\mine.py:f", 1.0), ("classifier:x:w=3.pt:0,2", "classifier:x:w=3.pt:0,2", 1.0)],
)  # fmt: skip
def test_an_equals_sign_within_a_path_is_no_weight(spec, name, weight):
    assert split_weight(spec) == (name, weight)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.mean(), r"shape \(\), should be \(4,\)"),
        (lambda x: x.flatten(1)[:, :2], r"shape \(4, 2\)"),
        (lambda x: torch.tensor([1.0, float("nan"), 2.0, float("nan")]), "2 of 4 values are NaN"),
        (lambda x: torch.tensor([1.0, float("inf"), 2.0, 1.0]), "1 of 4 values are not finite"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_round_and_count(function, message):
    with pytest.raises(RewardError, match=message) as error:
        make_reward(function, name="mine").scores(images(), "round 3")
    assert "mine, round 3" in str(error.value)


def test_rewards_may_answer_lists_and_numpy_of_any_dtype():
    for answer in ([1, 2, 3, 4], torch.arange(1, 5, dtype=torch.float64).numpy()):
        values = score(make_reward(lambda x, answer=answer: answer), images(), "mine")
        assert values.dtype == torch.float32 and values.tolist() == [1, 2, 3, 4]
