"""A policy: a velocity network with what is needed to sample from it and to show its samples to a reward."""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from orwcfm_fast.device import resolve_precision
from orwcfm_fast.errors import UserError
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.models import build_network
from orwcfm_fast.networks.prompts import Conditions, Prompt

if TYPE_CHECKING:
    from orwcfm_fast.networks.flow.field import PipelineVelocity


OWN = "own"  # the time grid of the pipeline itself
LORA_FILES = (
    "pytorch_lora_weights",
    "pytorch_lora_weights_2",
)  # of a pipeline's transformers, by their order


@dataclass(frozen=True)
class Policy:
    """dx/dt = velocity(t, x, condition) carries noise N(0, I) at t=0 to samples at t=1.

    Attributes:
        network: v(t [B], x [B, *shape]), or of a pipeline v(t, x, rows [B]); always in eval mode here.
        shape: of one sample.
        model, data: names of the preset and of the data it was trained on.
        precision: float32, or bfloat16 by autocast.
        base_only: with the network's low-rank adapters off: the reference that shares a policy's weights.
        conditions: the prompts that samples are drawn for, where there are some.
        decode_chunk: samples that a pipeline decodes at once.
        options: the settings of a pipeline, for checkpoints: guidance, image_size, prompt_tokens.
    """

    network: nn.Module
    shape: tuple[int, ...]
    model: str
    data: str
    precision: torch.dtype = torch.float32
    base_only: bool = False
    conditions: Conditions | None = None
    decode_chunk: int = 1
    options: dict[str, Any] | None = None

    @property
    def pipeline(self) -> "PipelineVelocity | None":
        """The network, where it is a pipeline of diffusers."""
        return None if self.options is None else cast("PipelineVelocity", self.network)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must say of it so that it can be built again."""
        found = {"model": self.model, "data": self.data, "shape": list(self.shape)}
        return found if self.pipeline is None else found | {"pipeline": self.pipeline_state()}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def velocity(self, t: Tensor | float, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Velocity at (t, x) in float32 or the autocast dtype.

        Args:
            t: [B] or one number for the whole batch.
            condition: rows [B] of the table of prompts, where the policy has one.
        """
        if not isinstance(t, Tensor):
            t = torch.full((1,), t, device=x.device, dtype=torch.float32).expand(x.shape[0])
        adapters = lora.base_only(self.network) if self.base_only else nullcontext()
        with adapters, self.autocast():
            return self.network(t, x) if condition is None else self.network(t, x, condition)

    def prompts_of(self, condition: Tensor | None) -> list[Prompt] | None:
        """The prompts of samples with those conditions, for rewards that take them."""
        return None if self.conditions is None or condition is None else self.conditions.of(condition)

    def grid(self, name: str) -> str | Callable[[int], list[float]]:
        """A time grid by name; 'own' is the pipeline's.

        Raises:
            UserError: it has none of its own.
        """
        if name != OWN:
            return name
        if self.pipeline is None:
            raise UserError(f"grid '{OWN}': only a diffusers pipeline has one; use uniform or power:1.3")
        return self.pipeline.times

    def autocast(self) -> torch.autocast:
        """The context in which the network runs at its precision."""
        on = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision if on else torch.bfloat16, enabled=on)

    def decode(self, x1: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the reward sees of samples [B, *shape]: images in [-1, 1], vectors as they are.

        Args:
            condition: rows [B] of the table of prompts, where the policy has one; its first where None.
        """
        if self.pipeline:
            if condition is None:
                condition = torch.zeros(len(x1), dtype=torch.int64)
            with self.autocast():
                return self.pipeline.decode(x1, condition, self.decode_chunk)
        return x1.clamp(-1, 1) if len(self.shape) == 3 else x1

    def checkpoint_gradients(self, how: Callable[..., Any] | None = None) -> None:
        """Compute activations again in the backward pass from now on, for less memory.

        Args:
            how: calls a module so, how(module, *args); torch's own way where None.

        Raises:
            UserError: its network knows no such thing.
        """
        if self.pipeline is None:
            raise UserError("--gradient-checkpointing: only for a diffusers pipeline; leave it out")
        with self.autocast():
            off = self.pipeline.enable_gradient_checkpointing(how)
        for name in off:
            print(
                f"warning: the {name}'s own gradient checkpointing is wrong; it is left off", file=sys.stderr
            )

    def frozen_copy(self) -> "Policy":
        """The reference: this policy with weights that never train, its own or those under its adapters."""
        if lora.adapters_of(self.network):
            return replace(self, base_only=True)
        return replace(self, network=copy.deepcopy(self.network).requires_grad_(False).eval())

    def trainable_copy(self) -> "Policy":
        """The same policy with weights of its own, to be trained."""
        return replace(self, network=copy.deepcopy(self.network))

    def weights(self) -> dict[str, Tensor]:
        """State dict of a network without adapters that has this velocity."""
        return lora.plain_state(self.network, merged=not self.base_only)

    def _adapter_files(self) -> dict[str, str]:
        """Prefix of keys by stem of file; `load_lora_weights` of diffusers reads each, with the first one's keys."""
        if not self.pipeline:
            return {"lora": ""}
        return dict(zip(LORA_FILES, (f"{name}." for name in self.pipeline.denoisers), strict=False))

    def adapters_from(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The adapters in a checkpoint's tensors, by the network's own keys; none where it has none."""
        files = self._adapter_files()
        first = next(iter(files.values()))
        return {
            prefix + key.removeprefix(first): value
            for file, prefix in files.items()
            for key, value in tensors.get(file, {}).items()
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of it, by file; of a pipeline under adapters no weights of its own."""
        adapters: dict[str, dict[str, Tensor]] = {}
        if lora.adapters_of(self.network):
            state, files = lora.lora_state(self.network), self._adapter_files()
            first = next(iter(files.values()))
            for file, prefix in files.items():
                own = {first + k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                adapters |= {file: own} if own else {}
        return adapters if self.pipeline and adapters else {"model": self.weights(), **adapters}

    def pipeline_state(self) -> dict[str, Any]:
        """The settings of its pipeline, and its prompts, as JSON values."""
        assert self.options is not None and self.conditions
        return {**self.options, "prompts": [p.to_json() for p in self.conditions.prompts]}


def make_policy(
    model: str,
    data: str,
    shape: tuple[int, ...],
    device: torch.device,
    precision: str = "auto",
    seed: int = 0,
) -> Policy:
    """A policy with fresh weights drawn from `seed`, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build_network(model, shape).to(device).eval()
    parameters = sum(p.numel() for p in network.parameters())
    return Policy(network, tuple(shape), model, data, resolve_precision(precision, device, parameters))
