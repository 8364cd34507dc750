"""Memory of fine-tuning a diffusers pipeline, by part, from its configuration alone: no weights are loaded.

The pipeline is called once, for one sample, with parts that give zeros; that shows with what its denoisers and its VAE
are called. Step, rollout and decoding then make these calls on fake tensors, which have shapes but no memory; every
storage that comes and goes is noted, for two batch sizes. From these `AllocationProfile` has the course at any size.
"""

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from orwcfm_fast.device import resolve_device, resolve_precision
from orwcfm_fast.evaluation.features import FRAMES, SIDE, SOUND
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.method.rollout import sample
from orwcfm_fast.method.samplers import SOLVERS
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.networks.flow.description import Description, describe_pipeline, telling
from orwcfm_fast.networks.flow.inputs import common_arguments, read_files
from orwcfm_fast.networks.flow.loading import inputs_of, requested, sizes_explained
from orwcfm_fast.networks.flow.published import load_published
from orwcfm_fast.networks.lora import add_lora, settings_of
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.networks.prompts import Conditions, Prompt
from orwcfm_fast.planning.allocations import AllocationProfile
from orwcfm_fast.planning.cuda_autocast import CudaAutocastRules, recompute
from orwcfm_fast.planning.evaluation_memory import EvaluationMemory
from orwcfm_fast.planning.plan import (
    HEADROOM,
    Plan,
    TrainedMemory,
    available_bytes,
    held_by_method,
    largest_fitting,
)
from orwcfm_fast.planning.recorded import RecordedVelocity, recorded
from orwcfm_fast.planning.scaling import velocity_flops
from orwcfm_fast.rewards.rollouts import WAITING
from orwcfm_fast.settings import Finetune
from orwcfm_fast.torch_private import FakeTensorMode, TorchDispatchMode, tree_leaves

RANK = 16  # of the adapters in the second plan, unless --lora gives one
EVALUATIONS = (
    6  # velocity evaluations of a rollout: enough to fill every solver's history; Euler's method has none
)
CPU = torch.device("cpu")


class Meter(TorchDispatchMode):
    """Records in `changes` the bytes of every storage that is created (+) or freed (−) by operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[int] = []
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in self._storages((args, kwargs)):
            self._known[x] = True  # existed before, or was recorded when it was created
        found = func(*args, **(kwargs or {}))
        for x in self._storages(found):
            if x not in self._known:
                self._known[x] = True
                self.changes.append(x.nbytes())
                weakref.finalize(x, self.changes.append, -x.nbytes())
        return found

    @staticmethod
    def _storages(values: Any) -> list[Any]:
        return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]


def changes(work: Callable[[], object]) -> list[int]:
    """Bytes of every storage that `work` creates (+) or frees (−), in order."""
    with Meter() as meter:
        work()
    return meter.changes


def plan_pipeline(s: Finetune, gpu_gib: float | None = None, ranks: int = 1) -> dict[str, Plan]:
    """Plans of `orwcfm finetune` with these settings, training all weights and training adapters.

    Args:
        gpu_gib: memory of the GPU to plan for, in bf16 unless a precision is set; None plans for this device.
        ranks: number of processes that share a batch; the plan is that of one of them.

    Raises:
        UserError: there is no such pipeline, prompts file or image size.
    """
    (plans,) = plan_pipeline_for(s, (gpu_gib,), ranks)
    return plans


def plan_pipeline_for(
    s: Finetune, gpus: Sequence[float | None], ranks: int = 1, all_weights: bool = True
) -> list[dict[str, Plan]]:
    """`plan_pipeline` for devices of several sizes: for GPUs alone, or for this device alone.

    Args:
        all_weights: plan training all weights too, not adapters alone.
    """
    found = describe_pipeline(s.model, weights=False)
    saved = {} if s.prompts else {"prompts": [Prompt("").to_json()]}
    prompts, options = requested(found, s, saved)
    arguments = common_arguments(found.kind, **options)
    devices = {f"a GPU of {gib:g} GiB": int(gib * 2**30) for gib in gpus if gib}
    where = "cuda"
    if devices:
        precision = torch.float32 if s.precision == "fp32" else torch.bfloat16
    else:
        device = resolve_device(s.device)
        where, devices = device.type, {device.type: available_bytes(device)}
        precision = resolve_precision(s.precision, device, found.parameters)
    width = 2 if where == "cuda" else 4  # the encoders are there only while prompts are encoded
    encoding = {
        name: width * sum(p.numel() for p in shell.parameters()) for name, shell in found.encoders.items()
    }
    with telling(found.model, "cannot be planned"), sizes_explained(found, arguments, prompts[0], options):
        network = recorded(found, arguments, read_files(inputs_of(prompts[0])))
    plans: list[dict[str, Plan]] = [{} for _ in devices]
    for rank in (0, s.lora or RANK) if all_weights else (s.lora or RANK,):
        own = s.model_copy(update={"lora": rank})
        with telling(found.model, "cannot be planned"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slower kernels on a CPU
            held = network.held_in(precision if rank else torch.float32)
            policy = Policy(
                held, network.shape, found.model, "prompts", precision, conditions=Conditions(prompts, CPU),
                decode_chunk=s.vae_chunk, options=options,
            )  # fmt: skip
            weights = _size(held)
            if rank and s.lora_init:
                load_published(policy, s.lora_init)
                own = own.model_copy(update=(brought := settings_of(held)))
                rank = brought["lora"]
            name = f"adapters of rank {rank}" if rank else "all weights"
            own_plans = _plans(found, policy, own, devices, encoding, ranks, weights)
            for on_device, plan in zip(plans, own_plans, strict=True):
                on_device[name] = plan
    return plans


def _feature(decoded: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what decoded samples, images, videos or sound, are compared in."""
    if len(decoded) == 2:
        return decoded[0], min(SOUND, decoded[1])
    *frames, channels, height, width = decoded
    return *(min(FRAMES, n) for n in frames), channels, min(SIDE, height), min(SIDE, width)


def _size(module: torch.nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _plans(
    found: Description,
    policy: Policy,
    s: Finetune,
    devices: dict[str, int],
    encoding: dict[str, int],
    ranks: int,
    weights: int,
) -> list[Plan]:
    """One for each device, by its name and its bytes."""
    on_cpu = "cpu" in devices
    batch, rolled = (-(-n // ranks) for n in (s.batch, s.rollout))
    shape, network = policy.shape, cast(RecordedVelocity, policy.network)
    if s.gradient_checkpointing:
        network.enable_gradient_checkpointing(None if on_cpu else recompute)
    if s.lora:
        add_lora(policy.network, s)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    as_there = nullcontext if on_cpu else CudaAutocastRules
    with fake, as_there():
        network.to_empty(device=CPU)
        optimizer = PolicyOptimizer(policy, s)
        adapters = _size(policy.network) - weights
        training = TrainedMemory.of(s, ranks, policy.network, policy.precision)
        trained = training.trained

        def step(size: int, parts: int = 1) -> None:
            n = size * parts
            one = torch.empty(n)
            index, condition = (torch.zeros(n, dtype=torch.int64) for _ in range(2))
            x1, x_t = (torch.empty(n, *shape) for _ in range(2))
            batch = Batch(x1, one, x_t, index, one, one, anchor=x1.to(policy.precision), condition=condition)
            optimizer.gradient(batch, torch.tensor(0), size)
            optimizer.optimizer.zero_grad(set_to_none=True)

        def rollout(size: int) -> None:
            # in place of an adaptive solver, which branches on values, one that stores as many slopes
            name = "rk4" if SOLVERS.get(s.solver).adaptive else s.solver
            nfe = EVALUATIONS if SOLVERS.get(name).order > 1 else 2
            how = s.model_copy(update={"solver": name, "nfe": nfe, "grid": "uniform"})
            rows = torch.zeros(size, dtype=torch.int64)
            sample(policy, torch.empty(size, *shape), how, size, condition=rows)

        def decode(size: int) -> None:
            policy.decode(torch.empty(size, *shape), torch.zeros(size, dtype=torch.int64))

        with (
            torch.no_grad()
        ):  # what modules build at their first call, e.g. tables of positions, is no part of a course
            policy.velocity(torch.empty(1), torch.empty(1, *shape), torch.zeros(1, dtype=torch.int64))
        one, drawn, decoded = _course(step), _course(rollout), _course(decode)
        flops = velocity_flops(policy)

    @functools.cache
    def several() -> AllocationProfile:
        with fake, as_there():
            return _course(lambda size: step(size, 2))

    one_latent = 4 * math.prod(shape)
    one_image, one_feature = (
        4 * math.prod(x) for x in (network.decoded_shape, _feature(network.decoded_shape))
    )
    memory = EvaluationMemory(
        s, ranks, one_latent, one_image, one_feature, drawn.peak, decoded.peak, True, on_cpu
    )
    held = {
        "transformer": training.shard(weights),
        "adapters and their initial values": training.shard(adapters + (trained if s.lora else 0)),
        "reference": 0 if s.lora else training.shard(weights),
        "optimizer": training.shard(2 * trained),
        **training.held,
        "VAE": sum(_size(part) for part in found.decoders.values()),
        "stored rollout": s.rollout * one_latent,
        "stored probe samples": memory.stored_probe_samples,
        # with a GPU the copy lies in host memory, which this plan does not count
        "checkpoint being written": 3 * trained if on_cpu else 0,
    } | held_by_method(
        s, s.steps_per_round * batch, math.prod(shape) * policy.precision.itemsize, training.shard(trained)
    )

    def step_at(size: int) -> dict[str, int]:
        top = one.peak(size) if size >= batch else several().peak(size)
        return training.step(top, -(-batch // size))

    def rollout_at(chunk: int) -> dict[str, int]:
        waiting = (
            min(WAITING * chunk, rolled) * one_image
        )  # to be scored while more are drawn, by rewards that can
        return {"sampling": drawn.peak(chunk) + 2 * (rolled - chunk) * one_latent, "waiting images": waiting}

    chunked = min(s.vae_chunk, rolled)
    decoding = decoded.peak(chunked)  # of the last chunk; after it all images are concatenated
    images = max((rolled - chunked) * one_image, 2 * rolled * one_image - decoding)
    reward = {"decoding": decoding, "images": images}

    def plan(label: str, limit: int) -> Plan:
        room = int(HEADROOM * limit) - sum(held.values())
        micro_batch = largest_fitting(min(s.micro_batch or batch, batch), room, step_at)
        chunk = largest_fitting(min(s.chunk, rolled), room, rollout_at)
        return Plan(
            label,
            micro_batch,
            chunk,
            held,
            step_at(micro_batch),
            rollout_at(chunk),
            reward,
            0,
            limit,
            {},
            encoding,
            memory.probe(chunk),
            memory.evaluation(chunk),
            flops=flops,
            weights=policy.precision.itemsize * sum(p.numel() for p in policy.network.parameters()),
            gradients=trained,
        )

    return [plan(label, limit) for label, limit in devices.items()]


def _course(work: Callable[[int], object]) -> AllocationProfile:
    """Measured at batch sizes 2 and 3, because at 1 some tensors share a shape that differs at larger sizes."""
    return AllocationProfile((2, 3), (changes(lambda: work(2)), changes(lambda: work(3))), (0.0, 0.0))
