"""A step replayed from a CUDA graph does what a step does: the buffers on a CPU, all of it on a GPU."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from orwcfm_fast.benchmarks.ways import bench_policy
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.distributed import SINGLE_PROCESS
from orwcfm_fast.errors import UserError
from orwcfm_fast.method import graph, noise
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.graph import GraphChoices, StepGraph, VelocityGraphs, can_record
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.settings import Finetune

SETTINGS = Finetune(batch=8, warmup=4, steps_per_round=6)


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
    return StepGraph(GraphChoices(), learner.phases)


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


def measuring(trainer):
    """As with --graph auto on a GPU."""
    choices = GraphChoices(told=False)
    trainer.optimizer.graph = StepGraph(choices, trainer.optimizer.phases)
    trainer.graphs = VelocityGraphs(choices)
    return choices


@pytest.mark.parametrize("replaying, replayed", [(0.5, True), (0.97, False), (2.0, False)])
def test_the_way_that_is_measured_to_be_faster_stays_and_a_recording_that_is_not_used_goes(
    monkeypatch, replaying, replayed
):
    clock, recorded_after = Clock(monkeypatch), []

    def record(body):
        recorded_after.append(clock.now)
        replay, found = recorded_late(body)
        return clock.lasting(replaying - 1, replay), found  # the body itself takes 1

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(Policy, "run", clock.lasting(1.0, Policy.run))  # in a velocity and in a step
    trainer = trained(0)
    choices, said = measuring(trainer), []
    choices.on_choice = said.append
    for _ in trainer.train(4):
        pass
    labels = ["velocities of 4", "velocities of 2", "velocities of 6", "steps of 6 in parts of 6"]
    assert sorted(choices.chosen) == sorted(labels) and {*choices.chosen.values()} == {replayed}
    assert len(said) == 4 and all(f"{1 / replaying:.2f} times as fast" in text for text in said)
    assert min(recorded_after) >= 4, (
        "one call that loads kernels and three that are timed, before any recording"
    )
    assert any(trainer.graphs.recordings.values()) is (trainer.optimizer.graph.replay is not None) is replayed
    same_rounds(trained(4), trainer)


def test_of_two_ways_the_fastest_of_three_calls_each_counts(monkeypatch):
    clock, choices = Clock(monkeypatch), GraphChoices(told=False)
    for replayed, seconds in ((False, (5, 2, 3)), (True, (9, 2.5, 9))):
        for lasting in seconds:
            assert choices.records("steps") is replayed
            choices.take("steps", replayed, clock.lasting(lasting, lambda: None))
    assert choices.chosen == {"steps": False}


@pytest.mark.parametrize("fails_at, without", [(1, 4), (3, 3)])
def test_without_a_recording_that_fails_the_loop_goes_on(monkeypatch, fails_at, without):
    clock, count = Clock(monkeypatch), []
    monkeypatch.setattr(Policy, "run", clock.lasting(1.0, Policy.run))

    def record(body):
        count.append(1)
        if len(count) >= fails_at:
            raise torch.OutOfMemoryError("out of memory\nmore")
        replay, found = recorded_late(body)
        return clock.lasting(-0.5, replay), found

    monkeypatch.setattr(graph, "record", record)
    trainer, shown = trained(0), []
    choices = measuring(trainer)
    controller = RunController(trainer)
    controller.report_to(shown.append)
    assert len([*trainer.train(4)]) == 4
    reason = "are not replayed from CUDA graphs: out of memory"
    assert sum(text.endswith(reason) for text in shown) == without, (
        "the third is of minibatches, as the second"
    )
    assert len(choices.chosen) == 4 and [*choices.chosen.values()].count(False) == without
    assert trainer.sizes.chunk == 4 and trainer.sizes.micro_batch == 6, "nothing is halved for a recording"
    same_rounds(trained(4), trainer)


@pytest.mark.parametrize("told", [True, False])
def test_a_recording_that_fails_for_another_reason_than_memory_ends_the_run(monkeypatch, told):
    def record(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "record", record)
    with pytest.raises(RuntimeError, match="not permitted"):
        trained(4, graphs=VelocityGraphs(GraphChoices(told)))


def test_a_recording_that_breaks_gives_its_cause_and_the_stream_back(monkeypatch):
    class Capture:
        def __init__(self, *args, **kwargs):
            streams.append("capture")

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("capture_end fails in its turn")

    def body():
        raise torch.OutOfMemoryError("the cause")

    streams = ["own"]
    for name, stand_in in {
        "CUDAGraph": object, "graph": Capture, "set_stream": streams.append, "current_stream": lambda: streams[-1],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(torch.OutOfMemoryError, match="the cause"):
        graph.record(body)
    assert streams == ["own", "capture", "own"]
    with pytest.raises(RuntimeError, match="in its turn"):
        graph.record(lambda: torch.zeros(1))


def test_what_was_chosen_is_kept_for_a_resumed_run():
    def controlled():
        trainer = trained(0)
        choices = measuring(trainer)
        return RunController(trainer), choices

    controller, choices = controlled()
    choices.choose("velocities of 4", False, "0.9 times as fast")
    state = json.loads(json.dumps(controller.to_state()))
    resumed, choices = controlled()
    resumed.restore(state, "a checkpoint")
    assert choices.refused("velocities of 4") and not choices.refused("velocities of 2")
    elsewhere, choices = controlled()
    elsewhere.restore(
        state | {"graphs": state["graphs"] | {"measured": ["another GPU", False]}}, "a checkpoint"
    )
    assert not choices.chosen
    for damaged in ({"chosen": {"velocities of 4": "yes"}}, {}, []):
        with pytest.raises(UserError, match="graphs are damaged"):
            resumed.restore(state | {"graphs": damaged}, "a checkpoint")


def test_what_was_chosen_after_a_round_that_is_rolled_back_stays_chosen():
    trainer = trained(0)
    choices = measuring(trainer)
    controller = RunController(trainer)
    state = json.loads(json.dumps(controller.to_state()))
    choices.choose("steps of 6 in parts of 6", True, "2.00 times as fast")
    controller.restore(state, "a checkpoint")
    assert choices.chosen == {"steps of 6 in parts of 6": True}


def test_nothing_is_recorded_where_it_cannot_be():
    on, auto, off = (Finetune(graph=how) for how in ("on", "auto", "off"))
    cpu, gpu, pipeline = (
        SimpleNamespace(device=torch.device(device), pipeline=pipeline)
        for device, pipeline in (("cpu", None), ("cuda", None), ("cuda", object()))
    )
    assert can_record(on, gpu, SINGLE_PROCESS) and can_record(auto, gpu, SINGLE_PROCESS)
    assert not can_record(off, gpu, SINGLE_PROCESS)
    assert not any(can_record(auto, policy, SINGLE_PROCESS) for policy in (cpu, pipeline))
    two = SimpleNamespace(world=2)
    assert not can_record(auto, gpu, two)
    for policy, ranks, reason in (
        (gpu, two, "no more than one"),
        (pipeline, SINGLE_PROCESS, "not for pipelines"),
    ):
        with pytest.raises(UserError, match=f"--graph on: .*{reason}; use --graph off"):
            can_record(on, policy, ranks)


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
        expected = results(learner_of("cuda", micro_batch=micro_batch), batches)
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
    plain, replayed = trained(**change), trained(graphs=VelocityGraphs(GraphChoices()), **change)
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
    trainer = trained(1, graphs=VelocityGraphs(GraphChoices()))
    assert trainer.sizes.chunk == 2 and sizes[:2] == [4, 2]
    assert {x.found.shape[0] for x in trainer.graphs.recordings.values() if x} == {2, 6}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("change", [{}, {"lora": 2}, {"method": "nft"}], ids=str)
def test_recorded_rounds_are_those_of_a_run_without(change):
    same_order = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with same_order, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain, replayed = trained(3, "cuda", **change), trained(3, "cuda", graph="on", **change)
    same_rounds(plain, replayed)
