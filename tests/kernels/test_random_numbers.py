"""Uniform and normal numbers, choices: their distributions, and that the kernel draws what the reference does."""

import math

import pytest
import torch
from scipy import stats

from orwcfm_fast.kernels.philox import X0
from orwcfm_fast.kernels.random_numbers import (
    _choice,
    _normal,
    _uniform,
    choice,
    choice_reference,
    launch_draw,
    normal,
    normal_reference,
    uniform,
    uniform_reference,
)

SEED = 2**40 + 3


def test_an_element_depends_on_its_counter_alone():
    index = torch.tensor([5, 2**33, -1])
    z = normal((3, 5, 7), 11, index, 2)
    assert torch.equal(z[1], normal((3, 5, 7), 11, index[1:2], 2)[0])
    assert torch.equal(z.flatten(1)[:, :9], normal((9,), 11, index, 2))
    many = normal((5000,), 0, torch.arange(30), X0)  # more than one chunk
    assert torch.equal(many[29], normal((5000,), 0, torch.tensor([29]), X0)[0])
    assert normal((), 0, index, X0).shape == (3,)
    assert torch.equal(normal((8,), 0, index, X0, torch.bfloat16), normal((8,), 0, index, X0).bfloat16())


@pytest.mark.parametrize("seed", [0, -5, 2**33 + 1])
def test_draws_have_their_distributions(seed):
    index = torch.arange(1000) + 2**31 - 500
    assert stats.kstest(normal((1024,), seed, index, 3).flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(uniform((1024,), seed, index, 3).flatten().numpy(), "uniform").pvalue > 0.01


def test_draws_are_uncorrelated_across_element_index_purpose_and_seed():
    index, n = torch.arange(1000), 1000 * 1024
    z = normal((1024,), 0, index, 0)
    pairs = [(z[:, :-lag], z[:, lag:]) for lag in (1, 2, 3, 4, 8, 128)] + [(z[:-1], z[1:])]
    pairs += [(z, normal((1024,), 0, index + far, 0)) for far in (2**31, 2**32)]
    pairs += [(z, normal((1024,), 0, index, purpose)) for purpose in (1, 2)]
    pairs += [(z, normal((1024,), seed, index, 0)) for seed in (1, -1, 2**32)]
    for a, b in pairs:
        for f in (lambda x: x, torch.abs):
            correlation = torch.corrcoef(torch.stack([f(a).flatten(), f(b).flatten()]))[0, 1]
            assert abs(correlation) < 4 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_uniforms_are_never_1(dtype):
    u = uniform((2**18,), 0, torch.arange(4), 1, dtype)
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1


@pytest.mark.parametrize("shape", [(), (3,), (4,), (2, 131), (3, 4, 20)], ids=str)
def test_kernel_draws_what_the_reference_draws(shape, device):
    index = torch.arange(5, device=device) + 2**32 - 2
    seed = torch.tensor(SEED, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        ours = launch_draw("uniform", shape, seed, index, 3, dtype)
        assert ours.dtype == dtype and torch.equal(ours, uniform_reference(shape, seed, index, 3, dtype))
    ours, expected = (
        launch_draw("normal", shape, seed, index, 3, torch.float32),
        normal_reference(shape, seed, index, 3),
    )
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=1.2e-6)
    assert torch.equal(
        launch_draw("choice", (), seed, index, 3, torch.int64, 10), choice_reference(10, seed, index, 3)
    )


def test_choice_stays_below_n_where_float32_would_round_up(device):
    index, seed = torch.arange(64, device=device), torch.tensor(1, device=device)
    n = 2**31 - 1
    assert torch.equal(
        launch_draw("choice", (), seed, index, 3, torch.int64, n), choice_reference(n, seed, index, 3)
    )
    assert int(choice(n, seed, index, 3).max()) < n


def test_draws_survive_opcheck():
    seed, index = torch.tensor(SEED), torch.arange(4)
    torch.library.opcheck(_normal, ((3, 5), seed, index, 2, torch.bfloat16))
    torch.library.opcheck(_uniform, ((), seed, index, 2, torch.float32))
    torch.library.opcheck(_choice, (10, seed, index, 2))


@pytest.mark.parametrize("draw", [normal, uniform])
def test_bad_input_is_named(draw):
    seed, index = torch.tensor(SEED), torch.arange(4)
    with pytest.raises(ValueError, match=r"^index "):
        draw((2,), seed, index.int(), 0)
    with pytest.raises(ValueError, match=r"^seed "):
        draw((2,), seed.view(1), index, 0)
