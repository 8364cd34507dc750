"""The plan of a run whose network can be built here: its step, rollout and reward are measured at small sizes."""

from dataclasses import replace

import torch
from torch import Tensor

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.data.datasets import source
from orwcfm_fast.device import resolve_device
from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.probe import probe_size
from orwcfm_fast.method import noise
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.method.rollout import draw, start_noise
from orwcfm_fast.method.samplers import times as solver_times
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.networks.inference import InferenceCopy
from orwcfm_fast.networks.lora import add_lora
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.planning.allocations import profile_allocations
from orwcfm_fast.planning.evaluation_memory import EvaluationMemory
from orwcfm_fast.planning.plan import (
    HEADROOM,
    Plan,
    TrainedMemory,
    available_bytes,
    held_by_method,
    largest_fitting,
    resident_bytes,
)
from orwcfm_fast.planning.scaling import velocity_flops
from orwcfm_fast.rewards import RewardSum, make_reward
from orwcfm_fast.rewards.rollouts import WAITING
from orwcfm_fast.runs.load import DEFAULT, FOREIGN_DATA, Loader
from orwcfm_fast.runs.resolve import with_model_defaults
from orwcfm_fast.settings import Finetune


def plan_run(s: Finetune, ranks: int = 1) -> Plan:
    """Plan `orwcfm finetune` with these settings; a model preset is planned with random weights.

    Raises:
        UserError: there is no such model, data or reward.
    """
    device = resolve_device(s.device)
    solver_times(s.nfe, s.solver, s.grid)
    if s.checkpoint:
        policy = Loader(device, s.precision, s.model, s.data).load(s.checkpoint).policy
        if policy.pipeline:
            raise UserError(f"--plan: of a pipeline, name it alone: --model {policy.model}")
    else:
        model = s.model or DEFAULT
        data = s.data or FOREIGN_DATA.get(model, "")
        if not data:
            raise UserError(f"model '{model}': say for which data with --data (orwcfm list data)")
        policy = make_policy(model, data, source(data)[0].shape or (3, 32, 32), device, s.precision)
    reward = make_reward(s.reward or [source(policy.data)[0].reward], s)
    return make_plan(policy, reward, with_model_defaults(s, policy.model), ranks=ranks)


def _size(policy: Policy) -> int:
    return sum(x.nbytes for x in policy.network.state_dict().values())


def _stop_halving(text: str) -> None:
    raise MemoryError(text)


def make_plan(
    policy: Policy, reward: RewardSum, s: Finetune, limit: int | None = None, ranks: int = 1
) -> Plan:
    """Plan a run of `policy`, which is trained on noise for it and must not be used afterwards.

    Args:
        limit: bytes of memory to plan for; None reads it from the device.
        ranks: number of processes that share a batch; the plan is that of one of them.
    """
    batch, rollout = (-(-n // ranks) for n in (s.batch, s.rollout))
    device = policy.device
    limit = available_bytes(device) if limit is None else limit
    if s.lora:
        add_lora(policy.network, s)
    reference = policy.frozen_copy(exact=s.shard)
    optimizer = PolicyOptimizer(policy, s)
    inference = InferenceCopy(policy, off=s.shard)
    recorded = optimizer.graph is not None and ranks == 1
    optimizer.graph = None  # it would hold what its step allocates
    seed = noise.seed_on(s.seed, device)

    def step(size: int, parts: int = 1) -> None:
        index = noise.indices(0, size * parts, device)
        x1 = start_noise(policy, size * parts, s.seed)
        batch = couple(x1, torch.ones(len(x1), device=device), s.alpha, seed, index, s.coupling)
        batch = replace(batch, anchor=torch.zeros_like(x1, dtype=policy.precision))
        optimizer.sizes.micro_batch = size
        optimizer.step(batch, seed)

    least = 2 if s.coupling == "ot" else 1
    step(least)  # creates the optimizer's state
    reward(policy.decode(draw(inference.refresh(), 2, 0, s.seed, s, 2).x1))
    weights = _size(policy)
    anchor = (
        0 if reference.network is policy.network else _size(reference)
    )  # adapters share the policy's network
    copied = 0 if inference.policy is policy else _size(inference.policy)
    moments = sum(
        x.numel() * x.element_size()
        for v in optimizer.optimizer.state.values()
        for x in v.values()
        if isinstance(x, Tensor)
    )
    # measured before recording, which takes memory of its own
    process = 0 if device.type == "cuda" else max(0, resident_bytes() - weights - anchor - copied - moments)
    one = profile_allocations(lambda size: step(max(size, least)), batch, device)
    several = profile_allocations(lambda size: step(size, 2), batch // 2, device) if batch > 1 else one
    drawn = profile_allocations(
        lambda size: draw(inference.policy, size, 0, s.seed, s, size), min(s.chunk, rollout), device
    )
    noised = profile_allocations(lambda size: start_noise(policy, size, s.seed), rollout, device)
    samples = policy.decode(start_noise(policy, max(2, rollout // 2), s.seed))
    wanted = min(s.reward_batch or rollout, rollout)
    undivided = replace(reward, sizes=BatchSizes(on_change=_stop_halving))
    scored = profile_allocations(lambda size: undivided(samples[:size]), wanted, device)

    one_sample = 4 * start_noise(policy, 1, s.seed).numel()
    training = TrainedMemory.of(s, ranks, policy.network, policy.precision)
    held = {
        "weights": training.shard(weights),
        "reference": training.shard(anchor),
        "bf16 copy of the policy": copied,
        "optimizer": training.shard(moments),
        "stored rollout": s.rollout * one_sample,
    }
    gradients = sum(p.numel() * p.element_size() for p in optimizer.parameters)
    velocity = one_sample * policy.precision.itemsize // 4
    if device.type == "cpu":  # with a GPU what follows lies in host memory, which this plan does not count
        held["initial weights"] = 0 if s.lora or not copied else weights
        saved = sum(x.numel() * x.element_size() for file in policy.tensors().values() for x in file.values())
        held["checkpoint being written"] = (
            moments + saved + (gradients if METHODS.get(s.method).averages else 0)
        )
    held |= held_by_method(s, s.steps_per_round * batch, velocity, training.shard(gradients))
    held |= training.held

    def step_at(size: int) -> dict[str, int]:
        top = one.peak(size) if size >= batch else several.peak(size)
        return training.step(top, -(-batch // size))

    def rollout_at(chunk: int, recorded: bool = False) -> dict[str, int]:
        others = 2 * (rollout - chunk) * one_sample
        waiting = min(WAITING * chunk, rollout) * one_sample if reward.concurrent else 0
        own = 0 if recorded else drawn.peak(chunk)
        return {"sampling": max(own + others + waiting, noised.peak(rollout))}

    def scoring_at(size: int) -> dict[str, int]:
        return {"scoring": scored.peak(size) + rollout * one_sample}

    memory = EvaluationMemory(
        s, ranks, one_sample, one_sample, one_sample, drawn.peak, lambda size: 0, False, device.type == "cpu"
    )
    held["stored probe samples"] = memory.stored_probe_samples
    room = int(HEADROOM * limit) - process - sum(held.values())
    micro_batch = largest_fitting(min(s.micro_batch or batch, batch), room, step_at)
    stepping = step_at(micro_batch)
    method = METHODS.get(s.method)
    velocities = method.old + method.has_reference(s.alpha)  # of each draw, before the first step
    if recorded:  # where chosen, their memory is kept: of a step, of velocities of a minibatch and of a chunk
        held["CUDA graphs"] = sum(stepping.values()) + velocities * drawn.peak(micro_batch)
        room, stepping = room - held["CUDA graphs"], dict.fromkeys(stepping, 0)
    chunk = largest_fitting(min(s.chunk, rollout), room, rollout_at)
    if recorded:
        held["CUDA graphs"] += drawn.peak(chunk)
        room -= drawn.peak(chunk)
    reward_batch = largest_fitting(wanted, room, scoring_at)
    per_step = (
        one.time(batch) if micro_batch == batch else several.time(micro_batch) * batch / (2 * micro_batch)
    )
    per_sample, probed = drawn.time(chunk) / chunk, probe_size(s)
    seconds = {
        "rollout": per_sample * rollout,
        "reference": velocities * per_sample / s.nfe * batch * s.steps_per_round,
        "reward": scored.time(reward_batch) * rollout / reward_batch,
        "steps": per_step * s.steps_per_round,
        "probe": 2 * drawn.time(min(probed, chunk)) * max(1.0, probed / chunk),
    }
    return Plan(
        str(device), micro_batch, chunk, held, stepping, rollout_at(chunk, recorded),
        scoring_at(reward_batch), process, limit, seconds,
        probe=memory.probe(chunk), evaluation=memory.evaluation(chunk),
        reward_batch=reward_batch if reward_batch < rollout else 0, flops=velocity_flops(policy),
        weights=policy.precision.itemsize * sum(p.numel() for p in policy.network.parameters()), gradients=gradients,
    )  # fmt: skip
