"""Text rendering: what an optical character recognition reads in a picture against the words that its prompt quotes."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.library import library
from orwcfm_fast.rewards.pixels import check_images, to_levels
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|(?<!\w)'([^']+)'(?!\w)")
"""Text in straight or typographic double quotes, or in single ones that are no apostrophes."""

SIDE = 320
"""Pixels to which the shorter side of a smaller picture is enlarged; RapidOCR's own 736 takes four times as long."""


def quoted(prompt: str) -> str:
    """The texts in quotes of a prompt, one space between them.

    Raises:
        UserError: it has none.
    """
    found = " ".join("".join(groups).strip() for groups in QUOTED.findall(prompt))
    if not found.strip():
        raise UserError(
            f"reward 'ocr': the prompt {prompt[:80]!r} quotes no text; write e.g. a sign that reads \"OPEN\""
        )
    return found


def similarity(wanted: str, read: str) -> float:
    """1 − Levenshtein's edit distance / length of the longer text, in [0, 1], whatever the blanks and the case."""
    distance = library("rapidfuzz.distance.Levenshtein", "ocr").normalized_distance
    a, b = ("".join(text.split()).casefold() for text in (wanted, read))
    return 1.0 - distance(a, b)


@functools.cache
def _reader() -> Any:
    """RapidOCR with the models that its wheel carries; nothing is downloaded."""
    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    settings = {threads: torch.get_num_threads(), "Det.limit_side_len": SIDE, "Global.use_cls": False}
    return library("rapidocr", "ocr").RapidOCR(params={"Global.log_level": "error", **settings})


def read_text(image: Tensor) -> str:
    """The lines of text in a picture [1 or 3, H, W] in [-1, 1], from top to bottom, one space between them."""
    levels = to_levels(image).to(torch.uint8).expand(3, -1, -1)
    blue_first = levels.flip(0).permute(1, 2, 0).contiguous().cpu().numpy()  # as OpenCV has colours
    return " ".join(_reader()(blue_first).txts or ())


class OcrReward:
    """How much of the text that a prompt quotes can be read in its picture."""

    concurrent = True

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] and their B prompts → scores [B] in [0, 1]."""
        check_images(images)
        pairs = zip(images, prompts, strict=True)
        return torch.tensor([similarity(quoted(prompt), read_text(image)) for image, prompt in pairs])

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Every prompt must quote a text.

        Raises:
            UserError: one does not, or there is none; names the first.
        """
        if not prompts:
            raise UserError(
                "reward 'ocr': needs a model with prompts, in which the wanted text stands in quotes"
            )
        for prompt in prompts:
            quoted(prompt)


@reward_factory("ocr")
def ocr(argument: str, options: RewardOptions) -> Reward:
    """text read in the image against the text in quotes of its prompt: 1 − edit distance / length"""
    if argument:
        raise UserError(
            f"reward 'ocr:{argument}': takes no argument; the text stands in quotes in each prompt"
        )
    library("rapidfuzz", "ocr")
    _reader()
    return OcrReward()
