"""Composition: objects by number and colour, as GenEval (Ghosh et al., NeurIPS 2023) asks for them in its metadata."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards.clip import clip_of
from orwcfm_fast.rewards.hub import from_hub
from orwcfm_fast.rewards.pixels import to_levels
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's."""
THRESHOLD = 0.3
"""Least score of a detected object; GenEval's."""
CHUNK = 16
FORM = (
    '{"include": [{"class": "dog", "count": 2, "color": "red"}], "exclude": [{"class": "cat", "count": 1}]}'
)


@dataclass(frozen=True)
class Wanted:
    """So many objects of a class, of a colour where one is named."""

    name: str
    count: int
    colour: str = ""


@dataclass(frozen=True)
class Found:
    """A detected object: its class and its box (left, top, right, bottom) in pixels."""

    name: str
    box: tuple[float, float, float, float]


def requirements(metadata: dict[str, Any], key: str, classes: Sequence[str]) -> list[Wanted]:
    """The objects under "include" or "exclude" of a prompt's metadata.

    Raises:
        UserError: they are not written as GenEval writes them, or are of no class of the detector.
    """
    found = []
    for item in metadata.get(key, []) if isinstance(metadata.get(key, []), list) else [None]:
        name, count = (item.get("class"), item.get("count", 1)) if isinstance(item, dict) else (None, 0)
        colour = item.get("color", "") if isinstance(item, dict) else ""
        if not isinstance(name, str) or type(count) is not int or count < 1:
            raise UserError(f"reward 'geneval': metadata {metadata}: write it as {FORM}")
        if name not in classes:
            raise unknown("class", name, classes, "of the detector")
        if colour and colour not in COLOURS:
            raise unknown("color", str(colour), COLOURS)
        found.append(Wanted(name, count, colour))
    return found


def satisfaction(wanted: Wanted, found: Sequence[Found], right_colour: Sequence[bool]) -> float:
    """1 − |number found − number wanted| / number wanted, at least 0; times the share of the right colour.

    Args:
        found: objects of the class. right_colour: of each of them; of no account where no colour is wanted.
    """
    number = max(0.0, 1 - abs(len(found) - wanted.count) / wanted.count)
    return number * (sum(right_colour) / len(found) if wanted.colour and found else 1.0)


@functools.lru_cache(maxsize=1)
def load_detector(name: str) -> tuple[Any, Any]:
    """A detector of transformers, and its image processor."""
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    def load() -> tuple[Any, Any]:
        network = AutoModelForObjectDetection.from_pretrained(name).eval().requires_grad_(False)
        return network, AutoImageProcessor.from_pretrained(name)

    return from_hub("geneval", name, "geneval:FOLDER, as save_pretrained writes it", load)


def detect(name: str, levels: Tensor) -> list[list[Found]]:
    """The objects in each of images uint8 [B, 3, H, W], those of the highest score first."""
    network, processor = load_detector(name)
    network.to(levels.device)
    found = []
    for part in levels.split(CHUNK):
        inputs = processor(images=[*part.cpu()], return_tensors="pt").to(levels.device)
        with torch.no_grad():
            outputs = network(**inputs)
        sizes = [tuple(part.shape[-2:])] * len(part)
        for one in processor.post_process_object_detection(outputs, THRESHOLD, sizes):
            order = one["scores"].argsort(descending=True, stable=True)
            labels, boxes = one["labels"][order].tolist(), one["boxes"][order].tolist()
            pairs = zip(labels, boxes, strict=True)
            found.append([Found(network.config.id2label[label], tuple(box)) for label, box in pairs])
    return found


def colours_of(image: Tensor, name: str, found: Sequence[Found], options: RewardOptions) -> list[str]:
    """The colour of each object, by CLIP on its box."""
    model = clip_of(options)
    texts = model.text_features(tuple(f"a photo of a {colour} {name}" for colour in COLOURS), image.device)
    height, width = image.shape[-2:]
    colours = []
    for left, top, right, bottom in (one.box for one in found):
        x, y = min(max(int(left), 0), width - 1), min(max(int(top), 0), height - 1)
        crop = image[None, :, y : max(int(bottom), y + 1), x : max(int(right), x + 1)]
        colours.append(COLOURS[int((model.image_features(crop) @ texts.T).argmax())])
    return colours


@reward_factory("geneval")
def geneval(argument: str, options: RewardOptions) -> Reward:
    """geneval:DETECTOR, share of the objects in the prompt's metadata that are there in number and colour"""
    if not argument:
        raise UserError(
            "reward 'geneval': write geneval:DETECTOR, a folder or repository of a detector of transformers"
        )
    if not options.has_prompts:
        raise UserError("reward 'geneval': the model has no prompts, whose metadata says what to count")
    classes = [*load_detector(argument)[0].config.id2label.values()]

    def one(image: Tensor, found: list[Found], metadata: dict[str, Any]) -> float:
        parts = []
        for wanted in requirements(metadata, "include", classes):
            own = [f for f in found if f.name == wanted.name]
            seen = colours_of(image, wanted.name, own, options) if wanted.colour else []
            parts.append(satisfaction(wanted, own, [colour == wanted.colour for colour in seen]))
        for forbidden in requirements(metadata, "exclude", classes):
            parts.append(float(sum(f.name == forbidden.name for f in found) < forbidden.count))
        if not parts:
            raise UserError(f"reward 'geneval': metadata {metadata}: write it as {FORM}")
        return sum(parts) / len(parts)

    def score(images: Tensor, metadata: list[dict[str, Any]]) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        found = detect(argument, to_levels(images).to(torch.uint8))
        return torch.tensor([one(*each) for each in zip(images, found, metadata, strict=True)])

    return score
