"""Rewards that are computed elsewhere are called while the next chunk of a rollout is drawn."""

import threading
import time

import pytest
import torch

from orwcfm_fast.errors import RewardError
from orwcfm_fast.method import rollout
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.rewards import decode_and_score, make_reward, rollouts
from orwcfm_fast.settings import Finetune

CHUNKS, CHUNK = 10, 8
SETTINGS = Finetune(rollout=CHUNKS * CHUNK, chunk=CHUNK, batch=16, steps_per_round=2, probe=8, nfe=4)


class Elsewhere:
    """The coordinate of each sample, computed as on a server; `during` is called with the number of the call."""

    concurrent = True

    def __init__(self, during=lambda k: None) -> None:
        self.during, self.sizes, self.spans = during, [], []

    def __call__(self, samples, seed):
        began = time.perf_counter()
        self.sizes.append(len(samples))
        self.during(len(self.sizes) - 1)
        self.spans.append((began, time.perf_counter()))
        return samples[:, 0]


class Drawn(Callback):
    """Notes when each chunk was drawn and handed over; `then` is called with its number."""

    def __init__(self, then=lambda k: None) -> None:
        self.then, self.at = then, []

    def on_boundary(self, trainer):
        if trainer.current is None:
            self.at.append(time.perf_counter())
            self.then(len(self.at) - 1)


def test_a_chunk_is_scored_while_the_next_is_drawn_and_few_wait(two_gaussians):
    handed_over = [threading.Event() for _ in range(CHUNKS)]
    in_time, waiting = [], []
    reward = Elsewhere(lambda k: in_time.append(k + 1 == CHUNKS or handed_over[k + 1].wait(20)))

    def then(k):
        waiting.append(k + 1 - len(reward.spans))
        handed_over[k].set()

    trainer = Trainer(two_gaussians, reward, SETTINGS, callbacks=[Drawn(then)])
    trainer.draw_and_score()
    assert in_time == [True] * CHUNKS, "the next chunk was not drawn before one was scored"
    assert max(waiting) <= rollouts.WAITING, "chunks pile up"


def test_a_round_takes_little_longer_than_the_longer_of_drawing_and_scoring(two_gaussians, monkeypatch):
    solve, spans = rollout.solve, []

    def slow(*args):
        began = time.perf_counter()
        time.sleep(0.15)
        found = solve(*args)
        spans.append((began, time.perf_counter()))
        return found

    monkeypatch.setattr(rollout, "solve", slow)
    reward = Elsewhere(lambda k: time.sleep(0.15))
    began = time.perf_counter()
    Trainer(two_gaussians, reward, SETTINGS).draw_and_score()
    took = time.perf_counter() - began
    drawing, scoring = (sum(end - begin for begin, end in log) for log in (spans, reward.spans))
    assert len(spans) == len(reward.spans) == CHUNKS
    assert took <= 1.2 * max(drawing, scoring), (
        f"{took:.2f} s, drawing {drawing:.2f} s, scoring {scoring:.2f} s"
    )


def test_scores_and_training_are_those_of_a_reward_that_is_called_afterwards(two_gaussians):
    beside, after = Elsewhere(), Elsewhere()
    copy = two_gaussians.trainable_copy()
    one = Trainer(two_gaussians, beside, SETTINGS)
    other = Trainer(copy, lambda x: after(x, 0), SETTINGS)
    for _ in range(2):
        records = [one.one_round(), other.one_round()]
        assert records[0]["reward_mean"] == records[1]["reward_mean"]
    assert beside.sizes == [CHUNK] * 2 * CHUNKS and after.sizes == [CHUNK * CHUNKS] * 2
    states = [policy.network.state_dict() for policy in (two_gaussians, copy)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


class Seeded(Elsewhere):
    """Notes its seeds."""

    def __init__(self):
        super().__init__()
        self.seeds = []

    def __call__(self, samples, seed):
        self.seeds.append(seed)
        return super().__call__(samples, seed)


class Latents:
    """A pipeline's policy whose decoder is the identity."""

    pipeline, device = True, torch.device("cpu")

    def decode(self, x1, rows):
        return x1

    def prompts_of(self, rows):
        return None


def test_vectors_are_scored_a_chunk_a_call_each_with_its_own_seed(two_gaussians):
    reward = make_reward(Seeded(), name="seeded")
    x1 = torch.randn(3 * CHUNK, 1)
    scoring = rollouts.RolloutScoring(two_gaussians, None, [reward], "round 1", 7)
    for part in x1.split(CHUNK):
        scoring.put(part)
    (found,) = scoring.result(x1)
    scoring.close()
    seeds = [rollouts.own_seed(7, first) for first in (0, CHUNK, 2 * CHUNK)]
    assert reward.terms[0][2].seeds == seeds and torch.equal(found.total, x1[:, 0])


def test_seeds_of_latents_are_those_of_decoding_and_scoring_afterwards():
    reward = make_reward(Seeded(), name="seeded")
    reward.sizes.chunk = CHUNK
    x1 = torch.randn(3 * CHUNK + 3, 1)
    scoring = rollouts.RolloutScoring(Latents(), None, [reward], "round 1", 7)
    for part in x1.split(CHUNK):
        scoring.put(part)
    (beside,) = scoring.result(x1)
    scoring.close()
    far = reward.terms[0][2]
    overlapped, far.seeds, far.sizes = (far.sizes, far.seeds), [], []
    (after,) = decode_and_score(Latents(), x1, None, [reward], "round 1", 7)
    assert overlapped == (far.sizes, far.seeds) and len(set(far.seeds)) == 4
    assert torch.equal(beside.total, after.total)


def test_a_chunk_that_cannot_be_scored_ends_the_round(two_gaussians):
    def fail(k):
        if k == 3:
            raise ValueError("no room on the server")

    reward, drawn = Elsewhere(fail), Drawn()
    trainer = Trainer(two_gaussians, reward, SETTINGS, callbacks=[drawn], reward_name="far")
    with pytest.raises(RewardError, match=r"reward far, round 1: ValueError: no room on the server"):
        trainer.one_round()
    assert trainer.current is None and trainer.round == 0
    assert len(drawn.at) <= 3 + rollouts.WAITING, "drawing went on"
    assert len(reward.sizes) == 4, "a chunk was scored in vain"
    assert not [t for t in threading.enumerate() if t.name.startswith("reward")]


def test_memory_that_runs_out_in_drawing_begins_the_scoring_anew(two_gaussians, monkeypatch):
    solve, calls = rollout.solve, []

    def small(velocity, x0, *args):
        calls.append(len(x0))
        if len(calls) == 3:
            raise MemoryError("no more")
        return solve(velocity, x0, *args)

    monkeypatch.setattr(rollout, "solve", small)
    trainer = Trainer(two_gaussians, reward := Elsewhere(), SETTINGS)
    state = trainer.draw_and_score()
    assert calls == [8, 8, 8] + [4] * 20 and reward.sizes[-20:] == [4] * 20
    assert torch.equal(state.rollout.reward, state.rollout.x1[:, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_scores_come_from_a_stream_of_their_own():
    device = torch.device("cuda")
    policy = make_policy("unet-digits", "digits", (1, 8, 8), device, "bf16")

    class Level(Elsewhere):
        def __call__(self, samples, seed):
            return samples.flatten(1).mean(1)

    reward = make_reward(Level(), name="level")
    scoring = rollouts.RolloutScoring(policy, None, [reward], "round 1", 7)
    x1 = torch.cat(
        [part for k in range(CHUNKS) if scoring.put(part := torch.randn(64, 1, 8, 8, device=device)) is None]
    )
    (beside,) = scoring.result(x1)
    scoring.close()
    assert torch.equal(beside.total, policy.decode(x1).flatten(1).mean(1))
