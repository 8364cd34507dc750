"""A step replayed from a CUDA graph does what a step does: the buffers on a CPU, all of it on a GPU."""

import json
from dataclasses import replace

import pytest
import torch

from orwcfm_fast.benchmarks.ways import bench_policy
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.errors import UserError
from orwcfm_fast.method import graph, noise
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.graph import Choice, StepGraph, VelocityGraphs
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.settings import Finetune

SETTINGS = Finetune(batch=8, warmup=4, steps_per_round=6)
AUTO = SETTINGS  # measured, where there is a GPU


def batch_of(step, n=8, device="cpu", alpha=1.0):
    index = noise.indices(8 * step, n, device)
    x1 = noise.normal((1, 8, 8), 7, index, noise.ROLLOUT)
    w = noise.uniform((1,), 7, index, noise.T)[:, 0] + 0.5
    return replace(couple(x1, w, alpha, noise.seed_on(0, device), index), anchor=0.5 * x1)


def results(learner, batches):
    found = torch.stack([learner.step(b, noise.seed_on(0, b.x1.device)) for b in batches])
    return found, [p.detach().clone() for p in learner.parameters]


def learner_of(device, **change):
    policy = make_policy("unet-digits", "digits", (1, 8, 8), torch.device(device), "fp32")
    return PolicyOptimizer(policy, SETTINGS.model_copy(update=change))


def told(learner):
    """Steps are to be replayed, without measuring."""
    return StepGraph(Choice("steps"), learner.phases)


def recorded_late(body):
    """As `graph.record`, where there is no GPU: kernels run at replay alone, on what the buffers then hold."""
    found = torch.empty(0)

    def replay():
        now = body()
        found.set_(now.clone())

    return replay, found


def test_replayed_steps_read_their_batch_and_seed_anew(monkeypatch):
    recordings = []
    monkeypatch.setattr(graph, "record", lambda body: recordings.append(1) or recorded_late(body))
    batches = [batch_of(k, alpha=0.5 + k) for k in range(6)] + [batch_of(6, 5), batch_of(7, 5), batch_of(8)]
    plain, learner = learner_of("cpu"), learner_of("cpu")
    learner.graph = told(learner)
    for one in (plain, learner):
        group = one.optimizer.param_groups[0]
        group["lr"] = torch.tensor(group["lr"])
    torch.testing.assert_close(results(learner, batches), results(plain, batches), rtol=0, atol=0)
    assert len(recordings) == 3, "once, and once more for each change of size"


def test_a_step_is_recorded_anew_where_the_optimisers_state_becomes_another(monkeypatch):
    """A rollback, or a new start: the old recording would go on with moments that nobody reads."""
    recordings = []

    def record(body):
        recordings.append(bool(learner.optimizer.state))
        return recorded_late(body)

    monkeypatch.setattr(graph, "record", record)
    learner = learner_of("cpu")
    learner.graph = told(learner)
    state = learner.optimizer.state_dict()
    for again in (
        learner.reset,
        lambda: learner.optimizer.load_state_dict(state) or learner.go_on_from(2),
    ):
        results(learner, [batch_of(0), batch_of(1), batch_of(2)])
        assert recordings == [True], "once, when the state was there"
        recordings.clear()
        again()


def test_where_memory_runs_out_for_a_recording_half_is_run_once_and_then_recorded(monkeypatch):
    """Recording a size whose kernels are not loaded yet would load them in the middle of it."""
    sizes = []

    def record(body):
        sizes.append(learner.sizes.micro_batch)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("no room")
        return recorded_late(body)

    monkeypatch.setattr(graph, "record", record)
    learner = learner_of("cpu")
    learner.graph = told(learner)
    results(learner, [batch_of(0), batch_of(1)])
    assert sizes == [8] and learner.sizes.micro_batch == 4, "the second step was run as it is, in halves"
    results(learner, [batch_of(2)])
    assert sizes == [8, 4]


class Clock:
    """Seconds that calls take, told by themselves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(graph, "time", self)

    def perf_counter(self):
        return self.now

    def lasting(self, seconds, call):
        def timed(*args):
            found = call(*args)
            self.now += seconds
            return found

        return timed


@pytest.mark.parametrize("replaying", [0.5, 2.0])
def test_of_calls_and_replays_that_take_turns_the_faster_way_is_chosen(monkeypatch, replaying):
    clock, ways, said = Clock(monkeypatch), [], []
    choice = Choice("steps", AUTO)
    choice.on_choice = said.append
    call = clock.lasting(1.0, lambda: ways.append("call"))
    replay = clock.lasting(replaying, lambda: ways.append("replay"))
    for key in (8, 3, 8, 8, 3, 8, 8, 8):  # those of another shape tell nothing
        choice.take(key, call, replay)
    assert ways == ["call", "call", "replay", "call", "call", "replay", "call", "replay"]
    assert choice.replays is (replaying < 1) and len(said) == 1 and f"{1 / replaying:.2g} times" in said[0]
    choice.take(3, call, replay)
    assert ways[-1] == ("replay" if replaying < 1 else "call")


@pytest.mark.parametrize("replaying", [0.5, 2.0])
def test_steps_and_rounds_are_the_same_while_and_after_it_is_measured_which_way_is_faster(
    monkeypatch, replaying
):
    clock = Clock(monkeypatch)

    def record(body):
        replay, found = recorded_late(body)
        return clock.lasting(replaying - 1, replay), found  # the body itself takes 1

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(PolicyOptimizer, "update", clock.lasting(1.0, PolicyOptimizer.update))
    batches = [batch_of(k) for k in range(10)]
    plain, learner = learner_of("cpu"), learner_of("cpu")
    learner.graph = StepGraph(Choice("steps", AUTO), learner.phases)
    torch.testing.assert_close(results(learner, batches), results(plain, batches), rtol=0, atol=0)
    assert learner.graph.choice.replays is (replaying < 1)
    assert (learner.graph.replay is None) is (replaying > 1), "a recording that is not used keeps no memory"

    monkeypatch.setattr(Policy, "run", clock.lasting(1.0, Policy.run))
    plain, measured = trained(), trained(graphs=VelocityGraphs(Choice("velocities", AUTO)))
    same_rounds(plain, measured)
    assert measured.graphs.choice.replays is (replaying < 1)
    assert any(measured.graphs.recordings.values()) is (replaying < 1)


def test_where_nothing_can_be_recorded_the_loop_goes_on_without_unless_it_was_told_to(monkeypatch):
    def record(body):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph, "record", record)
    trainer = trained(0, graphs=VelocityGraphs(Choice("velocities", AUTO)))
    trainer.optimizer.graph = StepGraph(Choice("steps", AUTO), trainer.optimizer.phases)
    RunController(trainer)
    assert len([*trainer.train(2)]) == 2
    assert [choice.replays for choice in trainer.graph_choices] == [False, False]
    same_rounds(trained(), trainer)
    with pytest.raises(RuntimeError, match="not permitted"):
        trained(1, graphs=VelocityGraphs(Choice("velocities")))


def test_what_was_chosen_is_kept_for_a_resumed_run_that_is_not_told_otherwise():
    def controlled(settings=AUTO):
        trainer = trained(0, graphs=VelocityGraphs(Choice("velocities", settings)))
        return RunController(trainer), trainer.graphs.choice

    controller, choice = controlled()
    choice.settle(False, "0.9 times as fast")
    assert controller.notes == ["velocities are not replayed from CUDA graphs: 0.9 times as fast"]
    state = json.loads(json.dumps(controller.to_state()))
    for settings, expected in ((AUTO, False), (AUTO.model_copy(update={"graph": "on"}), True)):
        resumed, choice = controlled(settings)
        resumed.restore(state, "a checkpoint")
        assert choice.replays is expected
    with pytest.raises(UserError, match="graphs are damaged"):
        resumed.restore(state | {"graphs": {"velocities": "yes"}}, "a checkpoint")


def test_a_graph_is_refused_without_a_gpu():
    with pytest.raises(UserError, match="--graph on: needs an NVIDIA GPU"):
        learner_of("cpu", graph="on")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_graph_takes_the_steps_that_are_taken_without(micro_batch):
    batches = [batch_of(k, device="cuda", alpha=0.5 + k) for k in range(8)]
    same_order = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with same_order, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = results(learner_of("cuda", micro_batch=micro_batch, graph="off"), batches)
        found = results(learner_of("cuda", micro_batch=micro_batch, graph="on"), batches)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


ROUNDS = Finetune(rollout=10, chunk=4, batch=6, steps_per_round=3, warmup=2, nfe=4)


def trained(rounds=2, device="cpu", graphs=None, **change):
    """A trainer after so many rounds, from a network that is not zero anywhere."""
    trainer = Trainer(
        bench_policy("digits", "fp32", torch.device(device)), MEAN, ROUNDS.model_copy(update=change)
    )
    trainer.graphs = graphs or trainer.graphs
    for _ in trainer.train(rounds):
        pass
    return trainer


def MEAN(x):
    return x.flatten(1).mean(1)


def same_rounds(one, other):
    """To rounding, which AdamW makes larger where a gradient is nearly zero."""
    for a, b in (
        (one.last.rollout.x1, other.last.rollout.x1),
        (torch.stack(one.last.losses), torch.stack(other.last.losses)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for k, anchor in one.last.anchors.steps.items():
        torch.testing.assert_close(
            torch.cat(anchor), torch.cat(other.last.anchors.steps[k]), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("change", [{}, {"lora": 2}, {"method": "nft"}], ids=str)
def test_replayed_rollouts_and_anchors_are_those_of_a_run_without(monkeypatch, change):
    recordings = []
    monkeypatch.setattr(graph, "record", lambda body: recordings.append(1) or recorded_late(body))
    plain, replayed = trained(**change), trained(graphs=VelocityGraphs(Choice("velocities")), **change)
    same_rounds(plain, replayed)
    assert len(recordings) == 4, "chunks of 4 and of 2, minibatches of 6 of the policy and of its reference"


def test_where_memory_runs_out_for_a_recorded_velocity_all_are_given_up(monkeypatch):
    sizes = []

    def record(body):
        sizes.append(len(body()))
        if sizes == [4]:
            raise torch.OutOfMemoryError("no room")
        return recorded_late(body)

    monkeypatch.setattr(graph, "record", record)
    trainer = trained(1, graphs=VelocityGraphs(Choice("velocities")))
    assert trainer.sizes.chunk == 2 and sizes[:2] == [4, 2]
    assert {x.found.shape[0] for x in trainer.graphs.recordings.values() if x} == {2, 6}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("change", [{}, {"lora": 2}, {"method": "nft"}], ids=str)
def test_recorded_rounds_are_those_of_a_run_without(change):
    same_order = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with same_order, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain, replayed = trained(3, "cuda", graph="off", **change), trained(3, "cuda", graph="on", **change)
    same_rounds(plain, replayed)
