"""Nothing in a rollout or a step makes the host wait for the GPU: held on fake CUDA tensors, and on a real one."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orwcfm_fast.distributed import SINGLE_PROCESS
from orwcfm_fast.method import noise, step
from orwcfm_fast.method.anchors import compute_anchors, velocities
from orwcfm_fast.method.minibatches import Minibatches
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.method.rollout import draw
from orwcfm_fast.networks.lora import add_lora
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.networks.prompts import Conditions, Prompt
from orwcfm_fast.settings import Finetune

LOOKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
SETTINGS = {"batch": 4, "rollout": 8, "chunk": 4, "steps_per_round": 3, "nfe": 5}


class Waited(AssertionError):
    """The host looked into the GPU's memory, or copied pageable memory of its own there."""


class Event:
    """Stands for a CUDA event, which needs a GPU; counts how often the host waits for one."""

    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


class NoLooking(TorchDispatchMode):
    """Refuses the ops whose result on the host depends on a tensor's values."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in LOOKS:
            raise Waited(op._schema.name)
        return op(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses the ops that CUDA's sync debug mode would."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        before = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if "cuda" in before and name in LOOKS:
            raise Waited(name)
        found = op(*args, **(kwargs or {}))
        after = {x.device.type for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        if name in ("aten::_to_copy", "aten::copy_") and {"cpu", "cuda"} <= before | after:
            raise Waited(f"{name} between host and GPU")
        return found


def parts_of_a_round(policy, settings):
    """Everything between a round's first draw and its last step but the rewards, ready to be run."""
    learner = step.PolicyOptimizer(policy, settings)
    reference, row = policy.frozen_copy(), METHODS.get(settings.method)
    seed = noise.seed_on(settings.seed, policy.device)

    def run():
        rollout = draw(policy, settings.rollout, 0, settings.seed, settings, settings.chunk)
        w = torch.ones(settings.rollout, device=policy.device)
        batches = Minibatches(
            rollout, w, settings.alpha, 0, row, settings, seed, SINGLE_PROCESS, torch.ones(())
        )
        old, anchor = ((lambda b, p=p: velocities(p, b, learner.sizes)) for p in (policy, reference))
        anchors = compute_anchors(batches, old, anchor, blended=not row.reads_velocity)
        steps = ((k, replace(batches[k], **anchors.of_step(k, policy.device))) for k in range(len(batches)))
        return torch.stack([learner.step(batch, seed) for k, batch in steps])

    return run, learner


def give_gradients(v, dv, policy):
    """Not those of v, but as autograd's engine would leave them."""
    assert v.shape == dv.shape and v.requires_grad
    for p in policy.network.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.add_(0)


class Prompted(torch.nn.Module):
    """A network that takes the rows of a table of prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = torch.nn.Linear(64 + 4, 64), torch.nn.Embedding(3, 4)

    def forward(self, t, x, rows):
        return self.inner(torch.cat([x.flatten(1), self.table(rows)], 1)).view_as(x)


def prompted_policy() -> Policy:
    """Three prompts, weights and table on the GPU."""
    with torch.device("cuda"):
        network = Prompted().requires_grad_().eval()
    prompts = [Prompt(text, weight) for text, weight in (("a", 1.0), ("b", 2.0), ("c", 1.0))]
    conditions = Conditions(prompts, torch.device("cuda"))
    return Policy(network, (1, 8, 8), "prompted", "none", conditions=conditions)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # torch's own deepcopy does
@pytest.mark.parametrize(
    "change",
    [{}, {"group": 4}, {"lora": 4}, {"micro_batch": 3}, {"method": "orw"}, {"method": "nft"}],
    ids=str,
)
def test_a_round_never_waits_for_the_device(monkeypatch, change):
    # without a GPU there are no events, no memory to ask for, and autograd's engine has no thread for the device
    memory = []
    monkeypatch.setattr(Event, "waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: memory.append(device) or (1 << 40, 1 << 40)
    )
    monkeypatch.setattr(torch.Tensor, "backward", lambda v, dv: give_gradients(v, dv, policy))
    settings = Finetune(**SETTINGS | change)
    policy = make_policy("unet-digits", "digits", (1, 8, 8), torch.device("meta"), "fp32")
    if settings.lora:
        add_lora(policy.network, settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        if settings.group > 1:
            policy = prompted_policy()
        else:
            policy.network.to_empty(device="cuda")
        run, learner = parts_of_a_round(policy, settings)
        with NoWaiting():
            losses = run()
    assert losses.shape == (settings.steps_per_round, 3) and losses.device.type == "cuda"
    assert len(memory) <= 1, "the driver is asked once a round"
    assert Event.waits == 0 and learner.phases.read()["policy"] > 0 and Event.waits == 1


@pytest.mark.parametrize("change", [{}, {"lora": 4}, {"micro_batch": 3}, {"method": "nft"}], ids=str)
def test_a_backward_pass_and_its_step_depend_on_no_value(change):
    """On a CPU, with autograd's own engine: what reads no value there cannot wait for one on a GPU."""
    settings = Finetune(**SETTINGS | change)
    policy = make_policy("unet-digits", "digits", (1, 8, 8), torch.device("cpu"), "fp32")
    if settings.lora:
        add_lora(policy.network, settings)
    run, _ = parts_of_a_round(policy, settings)
    with NoLooking():
        losses = run()
    assert bool(losses.isfinite().all())


def test_what_waits_is_seen():
    with FakeTensorMode(), NoWaiting():
        x, there = torch.zeros(3, device="cuda"), {"device": "cuda"}
        for wait in (
            lambda: x.sum().item(),
            lambda: x[x > 0],
            lambda: x.cpu(),
            lambda: torch.zeros(3).to(**there),
        ):
            with pytest.raises((Waited, DynamicOutputShapeException)):
                wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_round_runs_with_synchronising_forbidden():
    device = torch.device("cuda")
    policy = make_policy("unet-digits", "digits", (1, 8, 8), device, "bf16")
    run, _ = parts_of_a_round(policy, Finetune(**SETTINGS))
    run()  # kernels compile, the optimiser makes its state
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(losses.isfinite().all())
