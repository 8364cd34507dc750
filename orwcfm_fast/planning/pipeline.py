"""Memory of fine-tuning a diffusers pipeline, by part, from its configuration alone: no weights are loaded.

Its step, rollout and decoding run on fake tensors, which have shapes but no memory. Every storage that is created or
freed is recorded at two batch sizes, from which `AllocationProfile` extrapolates to any other.
"""

import copy
import functools
import json
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.device import resolve_device, resolve_precision
from orwcfm_fast.distributed import bucket_bytes
from orwcfm_fast.evaluation.features import SIDE
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.method.rollout import sample
from orwcfm_fast.method.samplers import SOLVERS
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.networks.diffusers import Pipeline, embedding_widths
from orwcfm_fast.networks.lora import add_lora
from orwcfm_fast.networks.pipeline_files import Description, describe_pipeline, telling
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.networks.prompts import Conditions, Prompt, read_prompts
from orwcfm_fast.planning.allocations import AllocationProfile
from orwcfm_fast.planning.cuda_autocast import CudaAutocastRules, recompute
from orwcfm_fast.planning.evaluation_memory import EvaluationMemory
from orwcfm_fast.planning.plan import HEADROOM, Plan, available_bytes, largest_fitting
from orwcfm_fast.planning.torch_private import FakeTensorMode, TorchDispatchMode, tree_leaves
from orwcfm_fast.settings import Finetune

RANK = 16  # of the adapters in the second plan, unless --lora gives one
EVALUATIONS = 6  # velocity evaluations of a rollout: enough to fill every solver's history
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
    found = describe_pipeline(s.model, weights=False)
    shape = found.shape(s.image_size)
    where, limit = ("cuda", int(gpu_gib * 2**30)) if gpu_gib else (None, 0)
    if where is None:
        device = resolve_device(s.device)
        where, limit = device.type, available_bytes(device)
        parameters = sum(p.numel() for p in found.transformer.parameters())
        precision = resolve_precision(s.precision, device, parameters)
    else:
        precision = torch.float32 if s.precision == "fp32" else torch.bfloat16
    label = f"a GPU of {gpu_gib:g} GiB" if gpu_gib else str(where)
    prompts = read_prompts(s.prompts) if s.prompts else [Prompt("")]
    with telling(found.model):
        encoding = _encoders(found, 2 if where == "cuda" else 4)
    plans = {}
    for name, rank in (("all weights", 0), (f"adapters of rank {s.lora or RANK}", s.lora or RANK)):
        own = s.model_copy(update={"lora": rank})
        with telling(found.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about slower kernels on a CPU
            plans[name] = _plan(found, shape, own, prompts, precision, label, limit, encoding, ranks)
    return plans


def _encoders(found: Description, width: int) -> dict[str, int]:
    """Bytes of the text encoders, which are in memory only while the prompts are embedded."""
    import transformers

    sizes = {}
    index = json.loads((found.folder / "model_index.json").read_bytes())
    for name, value in index.items():
        if name.startswith("text_encoder") and isinstance(value, list) and value[1]:
            kind = getattr(transformers, value[1])
            with torch.device("meta"):
                encoder = kind(kind.config_class.from_pretrained(found.folder / name))
            sizes[name] = width * sum(p.numel() for p in encoder.parameters())
    return sizes


def _size(module: torch.nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _plan(
    found: Description,
    shape: tuple[int, int, int],
    s: Finetune,
    prompts: Sequence[Prompt],
    precision: torch.dtype,
    label: str,
    limit: int,
    encoding: dict[str, int],
    ranks: int,
) -> Plan:
    batch, rolled = (-(-n // ranks) for n in (s.batch, s.rollout))
    policy = _policy(found, shape, s, prompts, precision)
    assert policy.pipeline and policy.conditions
    weights = _size(policy.network)
    if s.gradient_checkpointing:
        policy.checkpoint_gradients(None if label == "cpu" else recompute)
    if s.lora:
        add_lora(policy.network, s.lora)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    as_there = nullcontext if label == "cpu" else CudaAutocastRules
    with fake, as_there():
        for part in (policy.network, policy.pipeline.vae):
            part.to_empty(device=CPU)
        optimizer = PolicyOptimizer(policy, s)
        adapters = _size(policy.network) - weights
        trained = sum(p.nbytes for p in optimizer.parameters)

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
            how = s.model_copy(update={"solver": name, "nfe": EVALUATIONS, "grid": "uniform"})
            rows = torch.zeros(size, dtype=torch.int64)
            sample(policy, torch.empty(size, *shape), how, size, condition=rows)

        def decode(size: int) -> None:
            policy.decode(torch.empty(size, *shape))

        one, drawn, decoded = _course(step), _course(rollout), _course(decode)

    @functools.cache
    def several() -> AllocationProfile:
        with fake, as_there():
            return _course(lambda size: step(size, 2))

    one_latent = 4 * shape[0] * shape[1] * shape[2]
    one_image = 4 * 3 * (shape[1] * found.scale) * (shape[2] * found.scale)
    one_feature = 4 * 3 * min(SIDE, shape[1] * found.scale) * min(SIDE, shape[2] * found.scale)
    memory = EvaluationMemory(
        s, ranks, one_latent, one_image, one_feature, drawn.peak, decoded.peak, True, label == "cpu"
    )
    exchange = bucket_bytes(trained) if ranks > 1 else 0  # allocated when the activations are freed
    held = {
        "transformer": weights,
        "adapters and their initial values": 2 * adapters,
        "reference": 0 if s.lora else weights,
        "optimizer": 2 * trained,
        "VAE": _size(policy.pipeline.vae),
        "prompt embeddings": policy.conditions.nbytes,
        "stored rollout": s.rollout * one_latent,
        "stored probe samples": memory.stored_probe_samples,
    }

    def step_at(size: int) -> dict[str, int]:
        top = one.peak(size) if size >= batch else several().peak(size)
        return {"gradients": min(trained, top), "activations": max(top - trained, exchange)}

    def rollout_at(chunk: int) -> dict[str, int]:
        return {"sampling": drawn.peak(chunk) + 2 * (rolled - chunk) * one_latent}

    chunked = min(s.vae_chunk, rolled)
    decoding = decoded.peak(chunked)  # of the last chunk; after it all images are concatenated
    images = max((rolled - chunked) * one_image, 2 * rolled * one_image - decoding)
    reward = {"decoding": decoding, "images": images}
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
    )


def _course(work: Callable[[int], object]) -> AllocationProfile:
    """Measured at batch sizes 2 and 3, because at 1 some tensors share a shape that differs at larger sizes."""
    return AllocationProfile((2, 3), (changes(lambda: work(2)), changes(lambda: work(3))), (0.0, 0.0))


def _policy(
    found: Description,
    shape: tuple[int, int, int],
    s: Finetune,
    prompts: Sequence[Prompt],
    precision: torch.dtype,
) -> Policy:
    """The policy that `load_pipeline` would make, on the meta device."""
    family = found.family
    held = precision if s.lora else torch.float32
    network = family(copy.deepcopy(found.transformer).to(held), s.guidance or 1.0)
    vae = copy.deepcopy(found.vae).requires_grad_(False)
    around = Pipeline(family, vae, None, 0, s.vae_chunk, precision, {})
    widths = embedding_widths(found.transformer.config)
    tokens = s.prompt_tokens or family.own_tokens
    if family.clip_tokens:
        tokens += json.loads((found.folder / "tokenizer" / "tokenizer_config.json").read_bytes())[
            "model_max_length"
        ]
    table = [torch.empty(len(prompts) + 1, *rest) for rest in ((tokens, widths[0]), (widths[1],))]
    guidance = 1.0 if family.embeds_guidance(found.transformer.config) else s.guidance or 1.0
    return Policy(
        network, shape, found.model, "prompts", precision, pipeline=around,
        conditions=Conditions(prompts, table, CPU), guidance=guidance,
    )  # fmt: skip
