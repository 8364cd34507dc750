"""The reward ocr on real pictures of text, read by the models that RapidOCR's wheel carries."""

import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rewards.ocr import quoted, similarity

# drawn, wanted, what RapidOCR 3.10 read, the reward
PICTURES = (
    ("OPEN", "OPEN", "OPEN", 1.0),
    ("Hello world", "Hello world", "Hello world", 1.0),
    ("Flow 2025", "flow 2025", "Flow 2025", 1.0),
    ("coffee", "coffee", "coffee", 1.0),
    ("No entry", "NO ENTRY", "No entry", 1.0),
    ("42", "42", "42", 1.0),
    ("Gate B7", "Gate B7", "Gate B7", 1.0),
    ("STOP", "STOP", "STOP", 1.0),
    ("A quick fox", "A quick fox", "A quick fox", 1.0),
    ("music", "music", "music", 1.0),
    ("river", "river", "river", 1.0),
    ("north-west", "north-west", "north-west", 1.0),
    ("two\nlines", "two lines", "two lines", 1.0),
    ("orwcfm", "orwcfm", "orwcfm", 1.0),
    ("OPEN", "CLOSED", "OPEN", 1 / 3),
    ("kitten", "sitting", "kitten", 4 / 7),
    ("Gate B7", "Gate C12", "Gate B7", 4 / 7),
    ("exit", "entry", "exit", 1 / 5),
    ("left", "left and right", "left", 4 / 12),
    ("", "nothing here", "", 0.0),
)
PAPERS = ((255, 255, 255), (20, 30, 60), (240, 230, 180))
INKS = ((0, 0, 0), (255, 240, 200), (120, 20, 30))


def rendered(number: int, text: str) -> torch.Tensor:
    """A picture [3, 96, 192] in [-1, 1] of the text in Pillow's own font, in one of three colours and five sizes."""
    picture = Image.new("RGB", (192, 96), PAPERS[number % 3])
    font = ImageFont.load_default(22 + 2 * (number % 5))
    ImageDraw.Draw(picture).multiline_text((12, 16), text, fill=INKS[number % 3], font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def test_twenty_pictures_have_the_recorded_values_offline_and_one_by_one(monkeypatch):
    def no_network(*args, **named):
        raise OSError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    images = torch.stack([rendered(k, drawn) for k, (drawn, *_) in enumerate(PICTURES)])
    prompts = [Prompt(f'a sign that reads "{wanted}"') for _, wanted, _, _ in PICTURES]
    reward = make_reward("ocr")
    found = reward.scores(images, prompts=prompts).total
    assert len(PICTURES) == 20
    assert torch.allclose(found, torch.tensor([value for *_, value in PICTURES]), atol=1e-6), found
    for k in (0, 15):
        assert reward.scores(images[k : k + 1], prompts=prompts[k : k + 1]).total.item() == found[k]
    grey = images[:1].mean(1, keepdim=True)
    assert reward.scores(grey, prompts=prompts[:1]).total.item() == 1.0


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "OPEN"', "OPEN"),
        ("“Grand Hotel” over the door", "Grand Hotel"),
        ('"one" and "two"', "one two"),
        ("a mug with 'tea time' on it", "tea time"),
        ("the dogs' mug, 'tea'", "tea"),
    ],
)
def test_the_wanted_text_is_what_stands_in_quotes(prompt, text):
    assert quoted(prompt) == text


@pytest.mark.parametrize("prompt", ["a cat", "the cat's mat, the dogs' mat", '""', '" "', ""])
def test_a_prompt_without_quotes_is_one_line(prompt):
    with pytest.raises(UserError, match="quotes no text; write") as error:
        quoted(prompt)
    assert "\n" not in str(error.value)


def test_similarity_is_one_less_levenshteins_share():
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("Tea  Time", "teatime") == 1.0
    assert similarity("a", "") == 0.0


def test_vectors_are_refused():
    with pytest.raises(RewardError, match=r"reward ocr: needs images \[B, 1 or 3, H, W\]"):
        make_reward("ocr").scores(torch.zeros(2, 3), prompts=[Prompt('"a"')] * 2)


@pytest.mark.parametrize("module", ["rapidocr", "rapidfuzz"])
def test_without_the_extra_it_says_which(monkeypatch, module):
    from orwcfm_fast.rewards import ocr

    ocr._reader.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module} is not installed; pip install 'orwcfm-fast\[rewards\]'"):
        make_reward("ocr")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("ocr:OPEN", "reward 'ocr:OPEN': takes no argument; the text stands in quotes in each prompt"),
        ("ocr", "reward 'ocr': needs a model with prompts, in which the wanted text stands in quotes"),
    ],
)
def test_what_ocr_cannot_use_ends_a_run_before_it_begins(run_cli, tiny_run, tmp_path, reward, message):
    result = run_cli("finetune", "--checkpoint", "base", "--reward", reward, "--out", "o")
    assert (result.code, result.err) == (2, f"error: {message}\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_prompts_without_quotes_end_a_run_before_it_begins(run_cli, pipeline_folder, prompts_file, tmp_path):
    model = ("--model", f"diffusers:{pipeline_folder('sd3')}", "--prompts", prompts_file, "--image-size", 8)
    result = run_cli("finetune", *model, "--prompt-tokens", 6, "--reward", "ocr", "--out", "o")
    assert result.code == 2 and "error: reward 'ocr': the prompt 'a cat' quotes no text" in result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "o").exists()
