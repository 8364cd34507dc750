"""Low-rank adapters (Hu et al., ICLR 2022): policy and reference share one base in memory.

An adapted layer computes base(x) + scale · B(A(x)); A is drawn, B starts at zero, so the policy starts as its
reference. Keys are diffusers' and PEFT's: "<layer>.lora_A.weight" and "<layer>.lora_B.weight".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from orwcfm_fast.errors import UserError

KEYS = (".lora_A.weight", ".lora_B.weight")


class Adapters:
    """The adapters of one network: their names, their scale, and whether they are on.

    It is also each adapted layer's forward hook, so that the layers keep their class and their keys.
    """

    def __init__(self, rank: int, scale: float) -> None:
        self.rank, self.scale, self.on = rank, scale, True
        self.rows: int | None = None  # they act on the first rows of a batch; None: on all
        self.names: list[str] = []

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.on:
            return output
        low = cast(Any, layer).lora_B(cast(Any, layer).lora_A(inputs[0][: self.rows]))
        if self.rows is None:
            return output.add_(low, alpha=self.scale)
        return torch.cat([output[: self.rows].add(low, alpha=self.scale), output[self.rows :]])


def add_lora(network: nn.Module, rank: int, scale: float = 1.0, seed: int = 0) -> None:
    """Adapt every linear and convolution layer of more than `rank` inputs and outputs; freeze all the rest.

    Grouped convolutions have no low-rank form of this kind and are passed over.

    Raises:
        UserError: no layer is that large, or the network has adapters already.
    """
    if adapters_of(network):
        raise UserError("this network has low-rank adapters already")
    adapters = Adapters(rank, scale)
    generator = torch.Generator().manual_seed(seed % 2**63)
    network.requires_grad_(False)
    for name, layer in [*network.named_modules()]:
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            continue
        if min(layer.weight.shape[0], layer.weight[0].numel()) <= rank:
            continue
        down, up = _pair(layer, rank)
        with torch.no_grad():
            bound = layer.weight[0].numel() ** -0.5
            down.weight.copy_((2 * torch.rand(down.weight.shape, generator=generator) - 1) * bound)
            up.weight.zero_()
        # in float32 over a base of any precision: their steps are small
        layer.lora_A, layer.lora_B = down.to(layer.weight.device), up.to(layer.weight.device)
        layer.register_forward_hook(adapters)
        adapters.names.append(name)
    if not adapters.names:
        raise UserError(f"--lora {rank}: no layer of this network is larger than that; use a lower rank")
    network.lora = adapters  # type: ignore[assignment]


def _pair(layer: nn.Linear | nn.Conv1d | nn.Conv2d, rank: int) -> tuple[Any, Any]:
    """A with the layer's inputs, kernel and stride, B pointwise onto its outputs."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    kind, geometry = type(layer), (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    down = kind(layer.in_channels, rank, *geometry, bias=False)  # type: ignore[arg-type]
    return down, kind(rank, layer.out_channels, 1, bias=False)


def adapters_of(network: nn.Module) -> Adapters | None:
    return cast("Adapters | None", getattr(network, "lora", None))


@contextmanager
def base_only(network: nn.Module) -> Iterator[None]:
    """Inside, the network is what it was before `add_lora`."""
    adapters = adapters_of(network)
    assert adapters
    before, adapters.on = adapters.on, False
    try:
        yield
    finally:
        adapters.on = before


@contextmanager
def first_half(network: nn.Module, rows: int) -> Iterator[None]:
    """Inside, the adapters act on the first `rows` of a batch alone: the rest passes through the base."""
    adapters = adapters_of(network)
    assert adapters
    adapters.rows = rows
    try:
        yield
    finally:
        adapters.rows = None


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, by diffusers' keys."""
    return {key: value for key, value in network.state_dict().items() if key.endswith(KEYS)}


def load_lora(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Inverse of `lora_state`.

    Raises:
        UserError: adapters of another network or rank.
    """
    own = lora_state(network)
    for key in sorted(own.keys() | state.keys()):
        if key not in own or key not in state or own[key].shape != state[key].shape:
            raise UserError(f"{where}: adapters of another network or rank (at '{key}')")
    network.load_state_dict(state, strict=False)


def plain_state(network: nn.Module, merged: bool = True) -> dict[str, Tensor]:
    """The state dict of a network without adapters: theirs added to the weights, or left out."""
    state = {key: value for key, value in network.state_dict().items() if not key.endswith(KEYS)}
    adapters = adapters_of(network)
    if adapters and merged:
        for name in adapters.names:
            layer = cast(Any, network.get_submodule(name))
            low = layer.lora_B.weight.detach().flatten(1) @ layer.lora_A.weight.detach().flatten(1)
            key = f"{name}.weight"
            state[key] = state[key] + adapters.scale * low.view(state[key].shape)
    return state


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What fine-tuning trains: the adapters where there are some, else everything."""
    if not adapters_of(network):
        network.requires_grad_(True)
    return [p for p in network.parameters() if p.requires_grad]
