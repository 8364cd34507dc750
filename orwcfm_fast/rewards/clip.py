"""Text alignment by CLIP (Radford et al., ICML 2021) through open_clip."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.errors import UserError
from orwcfm_fast.headers import check_pt, check_safetensors
from orwcfm_fast.rewards.registry import Score, reward_factory
from orwcfm_fast.settings import RewardOptions


@functools.lru_cache(maxsize=2)
def load_clip(model: str, weights: str, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """An open_clip model in eval mode, and the mean and deviation [3, 1, 1] that its images are scaled by.

    Raises:
        UserError: unknown architecture; weights that are neither on disk nor downloadable.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise UserError(f"clip model '{model}': not one of open_clip's (e.g. ViT-B-32, ViT-L-14)")
    _check_file(Path(weights))
    try:
        network = (
            open_clip.create_model(model, pretrained=weights, device=device).eval().requires_grad_(False)
        )
    except Exception as error:
        where = "" if Path(weights).is_file() else f" and not a file; tags: {_tags(model)}"
        reason = str(error).split("\n")[0]
        raise UserError(
            f"clip weights '{weights}' for {model} could not be loaded ({reason}){where}"
        ) from None
    visual = network.visual
    mean, std = (
        torch.tensor(getattr(visual, name, None) or getattr(open_clip, default), device=device).view(3, 1, 1)
        for name, default in (("image_mean", "OPENAI_DATASET_MEAN"), ("image_std", "OPENAI_DATASET_STD"))
    )
    return network, mean, std


def _check_file(path: Path) -> None:
    """A weights file of the user's; open_clip itself loads with weights_only=True."""
    if not path.is_file() or path.suffix in (".npz", ".npy"):
        return
    try:
        (check_safetensors if path.suffix == ".safetensors" else check_pt)(path)
    except (OSError, ValueError) as error:
        raise UserError(f"clip weights '{path}': {error}") from None


def _tags(model: str) -> str:
    import open_clip

    return ", ".join(open_clip.list_pretrained_tags_by_model(model)[:4])


@functools.lru_cache(maxsize=8)
def encode_prompts(model: str, weights: str, device: torch.device, prompts: tuple[str, ...]) -> Tensor:
    """Unit text features [P, F]."""
    import open_clip

    network = load_clip(model, weights, device)[0]
    with torch.inference_mode():
        return F.normalize(
            network.encode_text(open_clip.get_tokenizer(model)(list(prompts)).to(device)), dim=-1
        )


def preprocess(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [-1, 1] as open_clip's transform would give them from 8-bit pictures."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).expand(-1, 3, -1, -1)
    scale = size / min(pixels.shape[-2:])
    shape = [max(size, round(side * scale)) for side in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return (pixels[..., top : top + size, left : left + size] / 255 - mean) / std


@reward_factory("clip")
def clip(argument: str, options: RewardOptions) -> Score:
    """probability of the --prompt texts minus that of the --negative ones, by CLIP; or clip:PROMPT|NEGATIVE"""
    given = [text.strip() for text in argument.split("|")] if argument else []
    positive, negative = (given[:1], given[1:]) if given else (options.prompt, options.negative)
    if not positive or not negative or not all([*positive, *negative]):
        raise UserError("reward 'clip': give it --prompt TEXT and --negative TEXT, or clip:TEXT|TEXT")
    texts = (*positive, *negative)
    sign = torch.tensor([1.0] * len(positive) + [-1.0] * len(negative))
    model, weights = options.clip_model, options.clip_weights
    load_clip(model, weights, torch.device("cpu"))  # fail before any work

    def score(images: Tensor) -> Tensor:
        network, mean, std = load_clip(model, weights, images.device)
        size = network.visual.image_size
        size = size[0] if isinstance(size, tuple) else size
        text = encode_prompts(model, weights, images.device, texts)
        with torch.inference_mode():
            parts = []
            for part in images.split(256):
                features = F.normalize(network.encode_image(preprocess(part, size, mean, std)), dim=-1)
                probability = (network.logit_scale.exp() * features @ text.T).softmax(-1)
                parts.append(probability @ sign.to(images.device))
            return torch.cat(parts).clone()

    return score
