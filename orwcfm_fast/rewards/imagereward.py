"""ImageReward: a BLIP and a linear head, through transformers' BLIP."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.torch_files import read_weights
from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.aesthetic import affine_map
from orwcfm_fast.rewards.hub import fast_dtype, from_hub, hub_file, with_prompts
from orwcfm_fast.rewards.pixels import Transform
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

FILE = ("THUDM/ImageReward", "ImageReward.pt")
INSTEAD = f"imagereward:FOLDER with {FILE[1]} and bert-base-uncased's tokenizer in it"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of its scores on the authors' images, which it subtracts and divides by."""
TOKENS = 35
HEAD_WIDTH = 64
CHUNK = 64
NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
"""From the vision transformer's names in BLIP's own files, which are timm's, to transformers'."""


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _layers(weights: dict[str, Tensor], of: str) -> int:
    return 1 + max(int(found[1]) for name in weights if (found := re.match(rf"{of}\.(\d+)\.", name)))


def build_blip(weights: dict[str, Tensor], where: str) -> tuple[Any, Any]:
    """The vision transformer and the text encoder with cross-attention, sized as their weights are.

    Args:
        weights: of ImageReward.pt, with the names that its authors' code gives them.

    Raises:
        UserError: they are not such weights.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision, text = _part(weights, "blip.visual_encoder."), _part(weights, "blip.text_encoder.")
    text.pop("embeddings.position_ids", None)
    try:
        width, _, patch, _ = vision["patch_embed.proj.weight"].shape
        seen = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(vision["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=_layers(vision, "blocks"),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=math.isqrt(vision["pos_embed"].shape[1] - 1) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
        read = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(text, r"encoder\.layer"),
            num_attention_heads=hidden // HEAD_WIDTH,
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        )
    except (KeyError, ValueError):
        raise UserError(f"{where}: not ImageReward's weights (has: {', '.join([*weights][:3])} …)") from None
    networks = BlipVisionModel(seen), BlipTextModel(read, add_pooling_layer=False)
    for old, new in NAMES:
        vision = {re.sub(old, new, name): value for name, value in vision.items()}
    for network, own in zip(networks, (vision, text), strict=True):
        checkpoint.load_weights(network, own, where)
        network.eval().requires_grad_(False)
    return networks


@functools.lru_cache(maxsize=1)
def load_imagereward(file: str, words: str) -> tuple[Any, Any, Any, Tensor, Tensor]:
    """Tokenizer, vision transformer, text encoder, and the head's weight [F] and bias [].

    Raises:
        UserError: as `build_blip`; no such file, or no tokenizer.
    """
    from transformers import BertTokenizer

    weights, where = read_weights(file, "imagereward"), f"imagereward {file}"
    tokenizer = from_hub("imagereward", words, INSTEAD, lambda: BertTokenizer.from_pretrained(words))
    return tokenizer, *build_blip(weights, where), *affine_map(_part(weights, "mlp."), f"{where}: its head")


@reward_factory("imagereward")
def imagereward(argument: str, options: RewardOptions) -> Reward:
    """ImageReward: preference of people for an image under its prompt, about -2 to 2; or imagereward:FOLDER

    Xu et al., NeurIPS 2023.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    file = str(Path(argument) / FILE[1]) if argument else hub_file("imagereward", *FILE, INSTEAD)
    tokenizer, vision, text, weight, bias = load_imagereward(file, argument or TOKENIZER)
    side = int(vision.config.image_size)  # type: ignore[union-attr,arg-type]
    transform = Transform((side, side), tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))

    def chunk(images: Tensor, prompts: list[str]) -> Tensor:
        device, dtype = images.device, fast_dtype(images.device)
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(device)
        seen = vision.to(device, dtype)(transform(images).to(dtype)).last_hidden_state
        found = text.to(device, dtype)(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
            is_decoder=False,
            use_cache=False,
        ).last_hidden_state[:, 0]
        return (found.float() @ weight.to(device) + bias.to(device) - MEAN) / DEVIATION

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        with torch.no_grad():
            starts = range(0, len(images), CHUNK)
            return torch.cat([chunk(images[k : k + CHUNK], prompts[k : k + CHUNK]) for k in starts])

    return with_prompts("imagereward", options, score)
