"""Aesthetic score: a linear head on CLIP features (the LAION-Aesthetics predictor and its like)."""

import re

import torch
from torch import Tensor

from orwcfm_fast.checkpoints.torch_files import read_weights
from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.clip import clip_of
from orwcfm_fast.rewards.hub import hub_file
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
"""LAION's sac+logos+ava1-l14-linearMSE on the Hub, and the model whose features it takes."""
HEADS_MODEL = ("ViT-L-14", "openai")


def affine_map(weights: dict[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """A chain of linear layers with nothing between them, as the one affine map that it is: weight [F], bias [].

    LAION's sac+logos+ava1-l14-linearMSE (layers.0, 2, 4, 6, 7; dropout between them in training) and a plain
    nn.Linear(F, 1) are such chains; layers are taken in the order of the numbers in their names.

    Args:
        where: they are from, for the message.

    Raises:
        UserError: they are no chain ending in one number.
    """
    names = [name.removesuffix("weight") for name, value in weights.items() if name.endswith("weight")]
    names.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    total, offset = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for name in reversed(names):
        layer = weights[name + "weight"].double()
        bias = weights.get(name + "bias", torch.zeros(layer.shape[:1])).double()
        if layer.dim() != 2 or layer.shape[0] != total.shape[1] or bias.shape != layer.shape[:1]:
            names = []
            break
        offset = offset + total @ bias
        total = total @ layer
    if not names or len(weights) > 2 * len(names):
        keys = ", ".join(list(weights)[:4])
        raise UserError(f"{where}: not linear layers that end in one number (has: {keys} …)")
    return total[0].float(), offset[0].float()


@reward_factory("aesthetic")
def aesthetic(argument: str, options: RewardOptions) -> Reward:
    """LAION's aesthetic score, about 1 to 10; or aesthetic:FILE, a linear head on the unit features of --clip-model"""
    if not argument:
        argument = hub_file("aesthetic", *HEAD, f"aesthetic:FOLDER/{HEAD[1]} --clip-model {HEADS_MODEL[0]}")
        own = dict(zip(("clip_model", "clip_weights"), HEADS_MODEL, strict=True))
        options = options.model_copy(update=own)
    where = f"aesthetic head {argument}"
    weight, bias = affine_map(read_weights(argument, "aesthetic head"), where)
    model = clip_of(options)
    width = model.image_features(torch.zeros(1, 3, 8, 8)).shape[1]
    if len(weight) != width:
        raise UserError(
            f"{where}: for {len(weight)} features, {options.clip_model} gives {width}; "
            "name its model with --clip-model"
        )
    return lambda images: model.image_features(images) @ weight.to(images.device) + bias.to(images.device)
