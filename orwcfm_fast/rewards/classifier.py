"""Probability of target classes by an image classifier of torchvision or timm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.torch_files import describe_weights, named_for, read_weights
from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards.pixels import Transform
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

FORM = "write classifier:ARCHITECTURE:FILE:CLASSES, e.g. classifier:resnet18:weights.safetensors:0,2,4"
CHUNK = 256


@reward_factory("classifier")
def classifier(argument: str, options: RewardOptions) -> Reward:
    """classifier:ARCHITECTURE:FILE:CLASSES, probability of those classes; torchvision's or timm's, your weights"""
    architecture, _, rest = argument.partition(":")
    file, _, listed = rest.rpartition(":")
    if not (architecture and file and listed):
        raise UserError(f"reward 'classifier:{argument}': {FORM}")
    targets = parse_classes(listed)
    build = find_architecture(architecture)
    weights = read_weights(file, f"classifier {architecture}")
    names = list(without_memory(build).state_dict())
    weights, last = named_for(weights, names, file), names[-1]  # the head's bias, in both libraries
    if last not in weights:
        raise UserError(
            f"classifier {architecture} {file}: weights of another architecture: {describe_weights(weights)}; "
            f"needs {len(names)} with '{last}'"
        )
    classes = len(weights[last])
    if max(targets) >= classes:
        raise UserError(
            f"classifier {architecture} {file}: has {classes} classes, 0 to {classes - 1}; requested {max(targets)}"
        )
    network = build(classes)
    checkpoint.load_weights(network, weights, f"classifier {architecture} {file}")
    network.eval().requires_grad_(False)
    transform = own_transform(architecture, network, options)

    def score(images: Tensor) -> Tensor:
        network.to(images.device)
        with torch.no_grad():
            parts = [network(transform(part)).softmax(1)[:, targets].sum(1) for part in images.split(CHUNK)]
            return torch.cat(parts)

    return score


def parse_classes(text: str) -> list[int]:
    """'0,2,4-6' to [0, 2, 4, 5, 6].

    Raises:
        UserError: no whole numbers, or none at all.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(
                f"reward 'classifier': classes '{text}': should be whole numbers, e.g. 0,2,4 or 0-4"
            )
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise UserError(f"reward 'classifier': classes '{text}': none in it")
    return sorted(set(found))


def find_architecture(name: str) -> Callable[[int], nn.Module]:
    """(number of classes) → network with fresh weights, of torchvision, else of timm where it is installed."""
    from torchvision import models

    if name in (known := models.list_models(module=models)):
        return lambda classes: models.get_model(name, weights=None, num_classes=classes)
    try:
        import timm
    except ImportError:
        raise unknown("architecture", name, known, "torchvision's; pip install timm for more") from None
    if name not in timm.list_models():
        raise unknown("architecture", name, [*known, *timm.list_models()], "torchvision's and timm's")
    return lambda classes: timm.create_model(name, pretrained=False, num_classes=classes)


def without_memory(build: Callable[[int], nn.Module]) -> nn.Module:
    """A network to read names and shapes from."""
    try:
        with torch.device("meta"):
            return build(2)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        return build(2)


def own_transform(name: str, network: nn.Module, options: RewardOptions) -> Transform:
    """The architecture's own evaluation transform, or what --classifier-size and --classifier-pixels say."""
    found: dict[str, Any] = {"size": (224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    if (timms := getattr(network, "pretrained_cfg", None)) is not None:
        size = tuple(timms["input_size"][1:])
        found |= {"size": size, "mean": tuple(timms["mean"]), "std": tuple(timms["std"])}
        found |= {"interpolation": timms["interpolation"], "resize_to": int(size[0] / timms["crop_pct"])}
    else:
        from torchvision.models import get_model_weights

        own = get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
        found |= {"size": (own.crop_size[0],) * 2, "mean": tuple(own.mean), "std": tuple(own.std)}
        found |= {"interpolation": own.interpolation.value, "resize_to": own.resize_size[0]}
    if options.classifier_size:
        found |= {"size": (options.classifier_size,) * 2, "resize_to": 0}
    if options.classifier_pixels == "half":
        found |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    elif options.classifier_pixels == "unit":
        found |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return Transform(**found)
