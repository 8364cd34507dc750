"""The round on many ranks, on paper."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.planning.scaling import (
    Cluster,
    RoundWork,
    ladder,
    round_time,
    stops_at,
    velocity_flops,
    why_it_stops,
)

ROOT = Path(__file__).parents[2]
WORK = RoundWork(
    forward=1e12, backward=2e12, weights=2e9, gradients=4e9, rollout=256, batch=64, steps=4, nfe=10, chunk=8,
    micro_batch=64, anchors=2,
)  # fmt: skip


def test_one_rank_takes_what_there_is_to_compute():
    t = round_time(WORK, Cluster(1, tflops=100))
    assert t.rollout == pytest.approx(256 * 10 / 100)
    assert t.anchors == pytest.approx(4 * 2 * 64 / 100)
    assert t.steps == pytest.approx(4 * 64 * 3 / 100)
    assert (t.exchange, t.bytes) == (0, 0)


def test_sum_over_two_nodes_is_that_of_the_formula():
    """A reduce-scatter and a gather: 7/8 of the bytes within a node, half of a GPU's eighth over its link."""
    cluster = Cluster(16, gpus_per_node=8, link_gbit=80)
    within, across = 7 / 8 * 8e9 / 450e9, 8e9 / 8 / 2 / 10e9
    assert cluster.sum_seconds(8e9) == pytest.approx(2 * (within + across + 4 * 20e-6))


def test_a_gradient_is_waited_for_only_where_the_backward_pass_does_not_hide_it():
    slow = round_time(WORK, Cluster(16, link_gbit=0.1, tflops=100))
    fast = round_time(WORK, Cluster(16, link_gbit=1e6, tflops=100))
    assert slow.exchange > slow.steps and fast.exchange < 0.01 * fast.steps
    assert slow.bytes == pytest.approx(4 * 2 * 4e9 * 15 / 16)


def test_shards_are_gathered_for_every_call():
    t = round_time(replace(WORK, sharded=True), Cluster(16, tflops=100))
    calls = 2 * 10 + 4 * (2 + 2)  # two chunks of eight, anchors, forward and backward pass
    assert t.bytes == pytest.approx((calls * 2e9 + 4 * 4e9) * 15 / 16)


def test_parts_of_a_minibatch_gather_and_reduce_each_for_itself():
    whole = replace(WORK, sharded=True)
    in_parts = round_time(replace(whole, micro_batch=1), Cluster(16, tflops=100))  # four of one sample
    calls = 2 * 10 + 4 * 4 * (2 + 2)
    assert in_parts.bytes == pytest.approx((calls * 2e9 + 4 * 4 * 4e9) * 15 / 16)
    kept = round_time(replace(whole, micro_batch=1, accumulates=True), Cluster(16, tflops=100))
    assert kept.bytes == pytest.approx((calls * 2e9 + 4 * 4e9) * 15 / 16)
    slow = Cluster(16, link_gbit=1, tflops=100)
    alone, parts = (round_time(replace(WORK, micro_batch=n), slow).exchange for n in (4, 1))
    assert parts > alone  # the sum hides behind the last part's backward pass alone


def test_more_ranks_than_samples_do_not_pay():
    times = ladder(WORK, Cluster(1024, tflops=100))
    assert [t.ranks for t in times] == [2**k for k in range(11)]
    here, there = stops_at(times)
    assert here.ranks == 64 and here.total / there.total < 1.5
    assert "minibatch of 64" in why_it_stops(WORK, there)
    assert ladder(WORK, Cluster(48))[-1].ranks == 48


def test_reward_servers_keep_up_with_the_rollout():
    t = round_time(replace(WORK, reward_seconds=1.0), Cluster(8, tflops=100))
    assert t.rollout == pytest.approx(3.2) and t.reward_servers == 80


def test_work_of_a_velocity_is_that_of_its_matrix_products():
    policy = make_policy("mlp", "two-gaussians", (2,), torch.device("cpu"))
    sizes = [m.weight.numel() for m in policy.network.modules() if isinstance(m, torch.nn.Linear)]
    assert velocity_flops(policy) == 2 * sum(sizes)


def test_attention_is_counted_by_its_products():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.none = torch.nn.Parameter(torch.zeros(()))

        def forward(self, t, x):
            q = x.view(1, 2, 8, 4)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q).view_as(x)

    policy = Policy(Attention(), (64,), "", "")
    assert velocity_flops(policy) == 2 * 2 * 2 * 8 * 8 * 4


@pytest.mark.slow
def test_the_committed_rounds_on_paper_are_what_the_model_says():
    pytest.importorskip("diffusers")
    from orwcfm_fast.benchmarks.scaling import rows

    kept_rows = json.loads((ROOT / "benchmarks/results/scaling-on-paper.json").read_text("utf-8"))["rows"]
    for own, kept in zip(rows(), kept_rows, strict=True):
        assert own["model"] == kept["model"] and own["pays_to"] == kept["pays_to"]
        assert own["rounds"][-1]["total"] == pytest.approx(kept["rounds"][-1]["total"], rel=0.02)
