import pytest
import torch
from scipy.stats import kstest

from orwcfm_fast.kernels.interpolate import (
    interpolate,
    interpolate_at_random_times,
    interpolate_at_random_times_reference,
    interpolate_reference,
    launch_interpolate,
)
from orwcfm_fast.kernels.philox import X0, T
from orwcfm_fast.kernels.random_numbers import normal, uniform

SHAPES = [(1, 1), (3,), (3, 7), (5, 1023), (2, 4097), (2, 3072), (2, 9000), (7, 3, 5, 5)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(shape, dtype=torch.float32, layout=torch.contiguous_format, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x1 = torch.randn(shape, generator=g).to(device, dtype, memory_format=layout)
    t = torch.rand(shape[0], generator=g).to(device)
    index = torch.arange(shape[0], device=device) + 2**32 - 1
    return x1, t, torch.tensor(-7, device=device), index


CASES = [(shape, torch.contiguous_format) for shape in SHAPES] + [((7, 3, 5, 5), torch.channels_last)]
CASES = [(*case, kind) for case in CASES for kind in DTYPES]
CASES += [  # ten seconds each in the interpreter
    pytest.param((64, 3072), torch.contiguous_format, kind, marks=pytest.mark.soak if k else pytest.mark.slow)
    for k, kind in enumerate(reversed(DTYPES))
]


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES, ids=str)
def test_kernel_matches_float64(shape, layout, dtype, device, assert_as_good_as_torch):
    x1, t, seed, index = arguments(shape, dtype, layout, device)
    exact = interpolate_reference(x1.double(), t.double(), seed, index)
    ours, _ = launch_interpolate(x1, t, seed, index)
    assert ours.stride() == x1.stride() and ours.dtype == dtype
    assert_as_good_as_torch(ours, interpolate_reference(x1, t, seed, index), exact, 3e-6)


def test_is_the_formula_with_counted_noise():
    x1, t, seed, index = arguments((3, 2, 5))
    x0 = normal((2, 5), seed, index, X0)
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t = interpolate(x1, t, seed, index)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], x1[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * x1[1])


@pytest.mark.parametrize("shape", [(3,), (2, 9000), (7, 3, 5, 5)], ids=str)
def test_kernel_draws_t_as_the_reference_does(shape, device, assert_as_good_as_torch):
    x1, _, seed, index = arguments(shape, device=device)
    x_t, t = launch_interpolate(x1, None, seed, index)
    assert torch.equal(t, uniform((), seed, index, T))
    exact, _ = interpolate_at_random_times_reference(x1.double(), seed, index)
    assert_as_good_as_torch(x_t, interpolate_reference(x1, t, seed, index), exact, 3e-6)


def test_kernel_draws_late_times_as_the_reference_does(device):
    x1, _, seed, index = arguments((5, 1023), device=device)
    x_t, t = launch_interpolate(x1, None, seed, index, late=True)
    torch.testing.assert_close(t, uniform((), seed, index, T).sqrt(), rtol=3e-7, atol=0)
    torch.testing.assert_close(x_t, interpolate_reference(x1, t, seed, index), rtol=0, atol=3e-6)


def test_late_times_have_density_2t():
    x1, _, seed, index = arguments((20_000, 1))
    x_t, t = interpolate_at_random_times(x1, seed, index, late=True)
    assert kstest(t.numpy(), lambda at: at**2).pvalue > 1e-3
    assert torch.equal(x_t, interpolate(x1, t, seed, index))


def test_random_times_are_uniform_numbers_of_their_own_purpose():
    x1, _, seed, index = arguments((1000, 2))
    x_t, t = interpolate_at_random_times(x1, seed, index)
    assert torch.equal(t, uniform((), seed, index, T))
    assert torch.equal(x_t, interpolate(x1, t, seed, index))
    with pytest.raises(ValueError, match=r"^x1 requires grad"):
        interpolate_at_random_times(x1.requires_grad_(), seed, index)


def test_channels_last_has_the_same_noise():
    x1, t, seed, index = arguments((7, 3, 5, 5))
    last = x1.to(memory_format=torch.channels_last)
    assert torch.equal(interpolate(x1, t, seed, index), interpolate(last, t, seed, index))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_survives_opcheck(layout):
    x1, t, seed, index = arguments((4, 3, 5, 5), layout=layout)
    torch.library.opcheck(interpolate, (x1, t, seed, index))
    for late in (False, True):
        torch.library.opcheck(interpolate_at_random_times, (x1, seed, index, late))


BAD = {
    "x1": {"x1": torch.zeros(3, 4, dtype=torch.float64)},
    "x1 shape": {"x1": torch.zeros(0, 4), "t": torch.zeros(0)},
    "x1 strides": {"x1": torch.zeros(4, 3).T},
    "x1 requires grad": {"x1": torch.zeros(3, 4, requires_grad=True)},
    "t": {"t": torch.zeros(4)},
    "t dtype": {"t": torch.zeros(3, dtype=torch.bfloat16)},
    "t requires grad": {"t": torch.zeros(3, requires_grad=True)},
    "seed": {"seed": torch.zeros(1, dtype=torch.int64)},
    "index": {"index": torch.zeros(3, dtype=torch.int32)},
    "index device": {"index": torch.zeros(3, dtype=torch.int64, device="meta")},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    x1, t, seed, index = arguments((3, 4))
    with pytest.raises(ValueError, match=rf"^{case.split()[0]} "):
        interpolate(**{"x1": x1, "t": t, "seed": seed, "index": index} | BAD[case])
