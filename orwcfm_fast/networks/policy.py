"""A policy: a velocity network with what is needed to sample from it and to show its samples to a reward."""

import copy
import json
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
from orwcfm_fast.networks.inference import can_hold, hold
from orwcfm_fast.networks.models import build_network
from orwcfm_fast.networks.prompts import Conditions, Prompt

if TYPE_CHECKING:
    from orwcfm_fast.networks.flow.field import PipelineVelocity


OWN = "own"  # the time grid of the pipeline itself
LORA_FILES = {
    lora.TRAINED: ("pytorch_lora_weights", "pytorch_lora_weights_2"),
    lora.START: ("published_lora_weights", "published_lora_weights_2"),
}  # by adapter: of a pipeline's transformers, by their order
LORA_METADATA = "lora_adapter_metadata"  # diffusers' key in the header of such a file


@dataclass(frozen=True)
class Policy:
    """dx/dt = velocity(t, x, condition) carries noise N(0, I) at t=0 to samples at t=1.

    Attributes:
        network: v(t [B], x [B, *shape]), or of a pipeline v(t, x, rows [B]); always in eval mode here.
        shape: of one sample.
        model, data: names of the preset and of the data it was trained on.
        precision: float32, or bfloat16 by autocast.
        base_only: without the low-rank adapter that is trained: the reference that shares a policy's weights.
        conditions: the prompts that samples are drawn for, where there are some.
        decode_chunk: samples that a pipeline decodes at once.
        options: the settings of a pipeline, for checkpoints: guidance, image_size, prompt_tokens.
        replay: computes `run` on tensors in another way, as from a recording of it; called as replay(policy, tensors).
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
    replay: "Callable[[Policy, tuple[Tensor, ...]], Tensor] | None" = None

    @property
    def pipeline(self) -> "PipelineVelocity | None":
        """The network, where it is a pipeline of diffusers."""
        return None if self.options is None else cast("PipelineVelocity", self.network)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must say of it so that it can be built again."""
        found: dict[str, Any] = {"model": self.model, "data": self.data, "shape": list(self.shape)}
        if headers := self._lora_headers():
            found["metadata"] = headers
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
        tensors = (t, x) if condition is None else (t, x, condition)
        return self.replay(self, tensors) if self.replay else self.run(*tensors)

    def run(self, *tensors: Tensor) -> Tensor:
        """The network on t [B], x [B, *shape] and, where there are prompts, rows [B]; at its precision."""
        adapters = lora.base_only(self.network) if self.base_only else nullcontext()
        with adapters, self.autocast():
            return self.network(*tensors)

    def compile(self) -> None:
        """Let torch.compile fuse the network from now on, in place: the same velocities but for rounding.

        Each form of its input is compiled at its first call, which takes seconds to minutes.

        Raises:
            UserError: nothing can be compiled on this machine.
        """
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=self.device))
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"--compile: torch.compile does not work here ({why}); leave it out") from error
        for part in self.pipeline.denoisers.values() if self.pipeline else [self.network]:
            part.compile()

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

    def frozen_copy(self, exact: bool = False) -> "Policy":
        """The reference: this policy with weights that never train, its own or those under its adapters.

        Args:
            exact: its weights are those of the policy; else they are held in its precision, with the same velocities.
        """
        if lora.has_adapter(self.network):
            return replace(self, base_only=True)
        network = copy.deepcopy(self.network).requires_grad_(False).eval()
        return replace(
            self, network=network if exact or not can_hold(self) else hold(network, self.precision)
        )

    def trainable_copy(self) -> "Policy":
        """The same policy with weights of its own, to be trained."""
        return replace(self, network=copy.deepcopy(self.network))

    def weights(self) -> dict[str, Tensor]:
        """State dict of a network without adapters that has this velocity."""
        return lora.plain_state(self.network, merged=not self.base_only)

    def _lora_files(self) -> dict[str, tuple[str, str]]:
        """Adapter and prefix of its keys by stem of file.

        `load_lora_weights` of diffusers reads each file of a pipeline, with the first transformer's keys.
        """
        if not self.pipeline:
            return {"lora": (lora.TRAINED, "")}
        return {
            stem: (name, prefix)
            for name, stems in LORA_FILES.items()
            for stem, prefix in zip(stems, lora.parts(self.network), strict=False)
        }

    def _lora_headers(self) -> dict[str, dict[str, str]]:
        """By stem of file, the metadata that diffusers reads from its header: alpha and kind of its adapter."""
        first = next(iter(lora.parts(self.network)))
        return {
            stem: {LORA_METADATA: json.dumps({first + key: value for key, value in record.items()})}
            for stem, (name, prefix) in self._lora_files().items()
            if not (self.base_only and name == lora.TRAINED)
            and (record := lora.records(self.network, name).get(prefix))
        }

    def adapters_from(
        self, tensors: dict[str, dict[str, Tensor]], name: str = lora.TRAINED
    ) -> dict[str, Tensor]:
        """An adapter in a checkpoint's tensors, by the network's own keys; nothing where it has none."""
        first = next(iter(lora.parts(self.network)))
        return {
            prefix + key.removeprefix(first): value
            for file, (adapter, prefix) in self._lora_files().items()
            for key, value in tensors.get(file, {}).items()
            if adapter == name
        }

    def add_adapters(
        self, tensors: dict[str, dict[str, Tensor]], metadata: dict[str, dict[str, str]], where: str
    ) -> None:
        """Add the adapters that a checkpoint's tensors hold; metadata: of the files' headers, by stem.

        Raises:
            UserError: they are of another network.
        """
        first, files = next(iter(lora.parts(self.network))), self._lora_files()
        for name in (lora.START, lora.TRAINED):
            if state := self.adapters_from(tensors, name):
                known = {
                    prefix: {
                        key.removeprefix(first): value
                        for key, value in json.loads(metadata.get(file, {}).get(LORA_METADATA, "{}")).items()
                    }
                    for file, (adapter, prefix) in files.items()
                    if adapter == name
                }
                lora.add_saved(self.network, name, state, known, where)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of it, by file; of a pipeline under adapters no weights of its own."""
        first = next(iter(lora.parts(self.network)))
        files: dict[str, dict[str, Tensor]] = {}
        for file in self._lora_headers():
            name, prefix = self._lora_files()[file]
            state = lora.lora_state(self.network, name)
            files[file] = {
                first + key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
        return (
            files if self.pipeline and lora.has_adapter(self.network) else {"model": self.weights(), **files}
        )

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
