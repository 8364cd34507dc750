"""Which layers of a network low-rank adapters are given to."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.settings import Finetune

ALL = "all"
ATTENTION_OR_FEED_FORWARD = re.compile(r"(^|_)(attn\d*|attention|ff|ffn|feed_forward|mlp)(_|$)")


def parts(network: nn.Module) -> dict[str, nn.Module]:
    """What is adapted each by itself, by the prefix of its keys: a pipeline's denoisers, else the network itself."""
    denoisers = getattr(network, "denoisers", None)
    return {f"{name}.": part for name, part in denoisers.items()} if denoisers else {"": network}


def targets(network: nn.Module, s: Finetune) -> dict[str, list[str]]:
    """Names of the layers to adapt, by the prefix of their part.

    Where none are named: of a pipeline, the linear layers of attention and feed-forward modules in the repeated blocks
    of its transformers, as in diffusers' own training scripts; of any other network, "all", which is every linear layer
    and convolution. These leave out layers that are no larger than the rank.

    Raises:
        UserError: a name that no layer ends with; no layers are left.
    """
    named = [name.strip() for value in s.lora_targets for name in value.split(",")]
    layers = {
        prefix: {name: layer for name, layer in part.named_modules() if _can_be_adapted(layer, s.lora_kind)}
        for prefix, part in parts(network).items()
    }
    if named and named != [ALL]:
        return _named(layers, named)
    rule_for_blocks = not named and "" not in layers
    found: dict[str, list[str]] = {
        prefix: [
            name
            for name, layer in own.items()
            if min(layer.weight.shape[0], layer.weight[0].numel()) > s.lora
            and (_in_block(part, name) if rule_for_blocks else not isinstance(layer, nn.Conv3d))
        ]
        for (prefix, own), part in zip(layers.items(), parts(network).values(), strict=True)
    }
    if not any(found.values()):
        what = "attention or feed-forward layer" if rule_for_blocks else "layer"
        others = ", or name layers with --lora-targets" if rule_for_blocks else ""
        raise UserError(
            f"--lora {s.lora}: no {what} of this network is larger than that; use a lower rank{others}"
        )
    return found


def _can_be_adapted(layer: nn.Module, kind: str) -> bool:
    """Linear layers and convolutions; PEFT's adapters of these know no dilation.

    PEFT's dora has norms for Conv1d that fit sequences alone (the Conv1d of a U-Net get images), and rounds those of
    convolutions to the type of their weights, so that over weights in bf16 no policy would start as its reference.
    """
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    fits = kind != "dora" or (layer.weight.dtype == torch.float32 and not isinstance(layer, nn.Conv1d))
    return fits and layer.groups == 1 and {*layer.dilation} == {1}


def _in_block(part: nn.Module, name: str) -> bool:
    """Whether it is a linear layer of an attention or feed-forward module in an item of a list of blocks."""
    path = name.split(".")
    for i, step in enumerate(path):
        if step.isdigit() and isinstance(part.get_submodule(".".join(path[:i])), nn.ModuleList):
            inside = any(ATTENTION_OR_FEED_FORWARD.search(step) for step in path[i + 1 : -1])
            return inside and isinstance(part.get_submodule(name), nn.Linear)
    return False


def _named(layers: dict[str, dict[str, nn.Module]], named: Iterable[str]) -> dict[str, list[str]]:
    every = [(prefix, name) for prefix, own in layers.items() for name in own]
    for target in named:
        if not any(_ends_with(prefix + name, target) for prefix, name in every):
            short = {re.search(r"[^.]+(\.\d+)*$", name)[0] for _, name in every}  # type: ignore[index]
            raise UserError(f"--lora-targets: {unknown('layer', target, {*short, ALL})}")
    return {
        prefix: [name for name in own if any(_ends_with(prefix + name, target) for target in named)]
        for prefix, own in layers.items()
    }


def _ends_with(name: str, target: str) -> bool:
    return bool(target) and f".{name}".endswith(f".{target}")
