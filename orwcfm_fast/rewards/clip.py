"""Text alignment by CLIP (Radford et al., ICML 2021) through open_clip, and a linear head on its features."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.checkpoints.headers import check_pt, check_safetensors
from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards.pixels import Transform
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

CHUNK = 256
KNOWN_TEXTS = 4096
"""Texts whose features are kept."""


@dataclass(frozen=True)
class Clip:
    """An open_clip model in eval mode with its own image transform; goes to where its images are."""

    network: Any
    tokenizer: Any
    transform: Transform
    dtype: torch.dtype

    def embedding(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] → features [B, F] as the model gives them, float32."""
        network = self.network.to(images.device)
        with torch.no_grad():
            parts = [
                network.encode_image(self.transform(part).to(self.dtype)).float()
                for part in images.split(CHUNK)
            ]
            return torch.cat(parts)

    def image_features(self, images: Tensor) -> Tensor:
        """The same, scaled to unit length."""
        return F.normalize(self.embedding(images), dim=-1)

    def text_features(self, texts: tuple[str, ...], device: torch.device) -> Tensor:
        """Unit features [len(texts), F], float32."""
        with torch.no_grad():
            found = self.network.to(device).encode_text(self.tokenizer(list(texts)).to(device))
            return F.normalize(found.float(), dim=-1)


def clip_of(options: RewardOptions) -> Clip:
    """The model of --clip-model, --clip-weights and --clip-precision.

    Raises:
        UserError: unknown architecture; weights of another model, not on disk and not downloadable.
    """
    return _load(options.clip_model, options.clip_weights, options.clip_precision)


@functools.lru_cache(maxsize=2)
def _load(model: str, weights: str, precision: str) -> Clip:
    import open_clip

    whole = model.startswith(("local-dir:", "hf-hub:"))  # bring their own weights
    if not whole and model not in open_clip.list_models():
        raise UserError(str(unknown("clip-model", model, open_clip.list_models(), "or local-dir:FOLDER")))
    tag = {} if whole else open_clip.get_pretrained_cfg(model, weights) or {}
    _check_files(model, weights)
    try:
        network = open_clip.create_model(
            model, pretrained=None if whole else weights, precision=precision, require_pretrained=True,
            force_quick_gelu=bool(tag.get("quick_gelu")),  # OpenAI's weights are wrong without
        )  # fmt: skip
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if whole:
            raise UserError(f"clip-model '{model}' could not be loaded ({reason})") from None
        where = "" if Path(weights).is_file() else f"; not a file; tags: {_tags(model)}"
        raise UserError(
            f"clip-weights '{weights}' for {model} could not be loaded ({reason}){where}"
        ) from None
    own = open_clip.get_model_preprocess_cfg(network)
    size, fill = own["size"], own.get("fill_color", 0)
    transform = Transform(
        size if isinstance(size, tuple) else tuple(size) if isinstance(size, list) else (size, size),
        tuple(own["mean"]), tuple(own["std"]), own.get("interpolation", "bicubic"),
        own.get("resize_mode", "shortest"), fill[0] if isinstance(fill, list | tuple) else fill,
    )  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Clip(network.eval().requires_grad_(False), tokenizer, transform, dtype)


def _check_files(model: str, weights: str) -> None:
    """Weights of the user's own, before they are opened; open_clip itself loads with weights_only=True."""
    folder = Path(model.removeprefix("local-dir:"))
    files = [*folder.iterdir()] if model.startswith("local-dir:") and folder.is_dir() else [Path(weights)]
    for path in files:
        check = {".safetensors": check_safetensors, ".pt": check_pt, ".bin": check_pt, ".pth": check_pt}
        try:
            if path.is_file() and path.suffix in check:
                check[path.suffix](path)
        except (OSError, ValueError) as error:
            raise UserError(f"clip-weights '{path}': {error}") from None


def _tags(model: str) -> str:
    import open_clip

    return ", ".join(open_clip.list_pretrained_tags_by_model(model)[:4])


@reward_factory("clip")
def clip(argument: str, options: RewardOptions) -> Reward:
    """probability of the --prompt texts minus that of the --negative ones, by CLIP; or clip:PROMPT|NEGATIVE; of a
    pipeline, without either, the cosine of each image with its own prompt"""
    given = [text.strip() for text in argument.split("|")] if argument else []
    positive, negative = given[:1] or options.prompt, given[1:] or options.negative
    texts = (*positive, *negative)
    if not texts and options.has_prompts:
        model = clip_of(options)
        return own_prompt(lambda device: model)
    if not positive or not all(text.strip() for text in texts):
        raise UserError(
            "reward 'clip': no prompt; give it --prompt TEXT (and --negative TEXT), or clip:TEXT|TEXT"
        )
    if not negative and options.clip_score == "probability":
        raise UserError(
            "reward 'clip': a probability is of --prompt against --negative; give it one, or --clip-score cosine"
        )
    model = clip_of(options)
    shares = torch.tensor([1.0] * len(positive) + [-1.0] * len(negative))
    if options.clip_score == "cosine":  # means, so that the number of prompts does not matter
        shares[: len(positive)] /= len(positive)
        shares[len(positive) :] /= max(len(negative), 1)
    text_features = functools.cache(lambda device: model.text_features(texts, device))

    def score(images: Tensor) -> Tensor:
        with torch.no_grad():
            cosine = model.image_features(images) @ text_features(images.device).T
            if options.clip_score == "cosine":
                return cosine @ shares.to(images.device)
            logits = model.network.logit_scale.float().exp() * cosine
            return logits.softmax(-1) @ shares.to(images.device)

    return score


def own_prompt(model_on: Callable[[torch.device], Any]) -> Callable[[Tensor, list[str]], Tensor]:
    """Cosine [B] of each image with the prompt that it was made for.

    Args:
        model_on: a device → a model there with `image_features` and `text_features`, as `Clip` has them.
    """
    known: dict[tuple[str, torch.device], Tensor] = {}

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        model, device = model_on(images.device), images.device
        if len(known) > KNOWN_TEXTS:
            known.clear()
        new = [text for text in dict.fromkeys(prompts) if (text, device) not in known]
        for part in (tuple(new[k : k + CHUNK]) for k in range(0, len(new), CHUNK)):
            known.update(
                zip(((text, device) for text in part), model.text_features(part, device), strict=True)
            )
        texts = torch.stack([known[text, device] for text in prompts])
        return (model.image_features(images) * texts).sum(1)

    return score
