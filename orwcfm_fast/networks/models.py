"""Network presets: velocity networks v(t, x), built for a sample shape."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.flow.library import PIPELINE_DEFAULTS, is_pipeline
from orwcfm_fast.registry import Registry

MODELS = Registry("model", group="orwcfm.models")
Shape = tuple[int, ...]
F = TypeVar("F", bound=Callable[..., nn.Module])


def defaults(**settings: Any) -> Callable[[F], F]:
    """Decorator of a preset: defaults of fine-tuning and sampling in place of those that settings/ declares."""

    def add(preset: F) -> F:
        preset.defaults = settings  # type: ignore[attr-defined]
        return preset

    return add


def defaults_of(model: str) -> dict[str, Any]:
    """The defaults that a preset or a pipeline brings, by setting.

    Raises:
        UserError: no such preset.
    """
    return dict(PIPELINE_DEFAULTS) if is_pipeline(model) else getattr(MODELS.get(model), "defaults", {})


class VelocityMLP(nn.Module):
    """MLP on x and Fourier features of t, for vectors.

    Args:
        dim: D of a sample [D].
        width: hidden units of its three layers.
    """

    frequencies: Tensor
    leaves_casts_to_autocast = True

    def __init__(self, dim: int, width: int = 128, features: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * torch.arange(1, features + 1), persistent=False)
        sizes = [dim + 2 * features, width, width, width]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """t [B], x [B, D] → velocity [B, D]."""
        phase = t[:, None] * self.frequencies
        return self.net(torch.cat([x, phase.cos(), phase.sin()], 1))


def build_network(name: str, shape: Sequence[int]) -> nn.Module:
    """The preset `name` for samples of `shape`.

    Raises:
        UserError: no such preset, or one made for another shape.
    """
    return MODELS.get(name)(tuple(shape))


def _unet(name: str, made_for: Shape, shape: Shape, patch: int = 1, **arguments) -> nn.Module:
    if shape != made_for:
        raise UserError(f"model '{name}' is made for samples {_by(made_for)}, these are {_by(shape)}")
    from orwcfm_fast.networks.fast_unet import FastUNet, PatchUNet

    unet = FastUNet(dim=shape, **arguments) if patch == 1 else PatchUNet(shape, patch, **arguments)
    return unet.to(memory_format=torch.channels_last)


def _by(shape: Shape) -> str:
    return "×".join(map(str, shape))


@MODELS.register("mlp")
def mlp(shape: Shape) -> nn.Module:
    """three layers of 128, for vectors of any length"""
    if len(shape) != 1:
        raise UserError(f"model 'mlp' is made for vectors, these samples are {_by(shape)}")
    return VelocityMLP(shape[0])


@MODELS.register("unet-digits")
def unet_digits(shape: Shape) -> nn.Module:
    """torchcfm's UNet at 1×8×8, 0.7 M parameters"""
    return _unet(
        "unet-digits", (1, 8, 8), shape,
        num_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions="4",
    )  # fmt: skip


@MODELS.register("unet-mnist")
@defaults(lr=2e-4, chunk=256)
def unet_mnist(shape: Shape) -> nn.Module:
    """torchcfm's MNIST UNet at 1×28×28 (its example notebooks: 32 channels, one block a level)"""
    return _unet("unet-mnist", (1, 28, 28), shape, num_channels=32, num_res_blocks=1)


@MODELS.register("unet-mnist-small")
@defaults(lr=5e-4, chunk=512)
def unet_mnist_small(shape: Shape) -> nn.Module:
    """torchcfm's UNet on the 2×2 patches of 1×28×28, 1.4 M parameters: learns MNIST on a laptop"""
    return _unet(
        "unet-mnist-small", (1, 28, 28), shape, patch=2,
        num_channels=32, num_res_blocks=1, channel_mult=(1, 3), attention_resolutions="7",
    )  # fmt: skip


@MODELS.register("unet-cifar10")
@defaults(lr=2e-4, chunk=128)
def unet_cifar10(shape: Shape) -> nn.Module:
    """the paper's UNet at 3×32×32, 35.7 M parameters (torchcfm's CIFAR-10 script)"""
    return _unet(
        "unet-cifar10", (3, 32, 32), shape,
        num_channels=128, num_res_blocks=2, channel_mult=(1, 2, 2, 2), num_heads=4, num_head_channels=64,
        attention_resolutions="16", dropout=0.1,
    )  # fmt: skip
