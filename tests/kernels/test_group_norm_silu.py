import pytest
import torch
from torch.nn import functional as F

from orwcfm_fast.kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_backward_reference,
    group_norm_silu_reference,
    launch_group_norm_silu,
    launch_group_norm_silu_backward,
)

# one channel a group; widths that are no power of two; groups left over; one pixel; more pixels than fit at once
CASES = [
    ((2, 32, 8, 8), 32),
    ((2, 96, 3, 5), 32),
    ((1, 12, 4, 4), 2),
    ((3, 6, 1, 1), 3),
    ((2, 20, 7, 6), 5),
    ((1, 64, 40, 41), 4),
]


def arguments(shape, dtype=torch.float32, device="cpu"):
    """A map far from zero mean; dy and the parameters as they come."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=g).to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=g).to(device) for _ in range(2))
    return (3 * x + 5).to(device, dtype), dy.to(device, dtype), weight, bias


def torchs(x, weight, bias, groups, silu):
    h = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype))
    return F.silu(h) if silu else h


def torchs_gradients(dy, x, weight, bias, groups, silu):
    leaves = [p.detach().to(x.dtype).requires_grad_() for p in (x, weight, bias)]
    return torch.autograd.grad(torchs(*leaves, groups, silu), leaves, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_kernel_matches_float64_forward_and_backward(shape, groups, dtype, device, assert_as_good_as_torch):
    x, dy, weight, bias = arguments(shape, dtype, device)
    silu = groups != 5
    y, mean, rstd = launch_group_norm_silu(x, weight, bias, groups, silu)
    assert y.dtype == dtype and y.stride() == x.stride() and mean.dtype == rstd.dtype == torch.float32
    exact = group_norm_silu_reference(x.double(), weight.double(), bias.double(), groups, silu)
    tiny = 2e-6 * exact[0].abs().max()
    assert_as_good_as_torch(y, torchs(x, weight, bias, groups, silu), exact[0], tiny)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), exact[2], rtol=1e-5, atol=0)
    found = launch_group_norm_silu_backward(dy, x, weight, bias, mean, rstd, silu)
    wide = [p.double() for p in (dy, x, weight, bias)]
    expected = torchs_gradients(*wide, groups, silu)
    for one, theirs, best in zip(
        found, torchs_gradients(dy, x, weight, bias, groups, silu), expected, strict=True
    ):
        assert_as_good_as_torch(one, theirs, best, 4e-6 * best.abs().max())


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_op_is_torchs_group_norm_and_silu(shape, groups, dtype, silu, assert_as_good_as_torch):
    x, dy, weight, bias = arguments(shape, dtype)
    leaves = [p.requires_grad_() for p in (x, weight, bias)]
    y = group_norm_silu(*leaves, groups, silu)[0]
    wide = [p.detach().double() for p in (x, weight, bias)]
    tiny = 2e-6 * float(y.detach().abs().max())
    assert_as_good_as_torch(
        y.detach(), torchs(x, weight, bias, groups, silu).detach(), torchs(*wide, groups, silu), tiny
    )
    y.backward(dy)
    theirs = torchs_gradients(dy, x, weight, bias, groups, silu)
    exact = torchs_gradients(dy.double(), *wide, groups, silu)
    for p, one, best in zip(leaves, theirs, exact, strict=True):
        assert p.grad.dtype == p.dtype
        assert_as_good_as_torch(p.grad, one, best, 4e-6 * best.abs().max())


@pytest.mark.parametrize("silu", [True, False])
def test_gradient_is_the_derivative(silu):
    x, _, weight, bias = arguments((2, 6, 3, 2), torch.float64)
    leaves = [p.double().requires_grad_() for p in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *p: group_norm_silu(*p, 3, silu)[0], leaves)


def test_second_derivative_raises():
    x, _, weight, bias = arguments((2, 4, 2, 2))
    y = group_norm_silu(x.requires_grad_(), weight, bias, 2, True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_gradient_of_another_layout_is_the_same_gradient():
    x, dy, weight, bias = arguments((2, 4, 3, 5))
    found = []
    for g in (dy, dy.contiguous()):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        group_norm_silu(leaf, weight, bias, 2, True)[0].backward(g)
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("grad", [False, True])
def test_survives_opcheck(grad):
    x, dy, weight, bias = arguments((2, 6, 5, 5), torch.bfloat16)
    arguments_of_backward = (dy, x, weight, bias, *group_norm_silu(x, weight, bias, 3, True)[1:], True)
    torch.library.opcheck(group_norm_silu_backward, arguments_of_backward)
    torch.library.opcheck(
        group_norm_silu, (x.requires_grad_(grad), weight.requires_grad_(grad), bias, 3, True)
    )


def test_reference_in_pieces_is_the_reference_at_once():
    x, dy, weight, bias = arguments((6, 32, 64, 64))
    y, mean, rstd = group_norm_silu_reference(x, weight, bias, 32, True)
    dx, *_ = group_norm_silu_backward_reference(dy, x, weight, bias, mean, rstd, True)
    alone = group_norm_silu_reference(x[4:5], weight, bias, 32, True)
    assert torch.equal(y[4:5], alone[0])
    assert torch.equal(
        dx[4:5], group_norm_silu_backward_reference(dy[4:5], x[4:5], weight, bias, *alone[1:], True)[0]
    )


BAD = {
    "x dtype": {"x": torch.zeros(2, 4, 2, 2, dtype=torch.int64)},
    "x shape": {"x": torch.zeros(2, 4, 2)},
    "x strides": {"x": torch.zeros(2, 4, 2, 2)},
    "weight": {"weight": torch.zeros(5)},
    "bias": {"bias": torch.zeros(4, dtype=torch.float64)},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    x, _, weight, bias = arguments((2, 4, 2, 2))
    with pytest.raises(ValueError, match=rf"^{case.split()[0]} "):
        group_norm_silu(**{"x": x, "weight": weight, "bias": bias} | BAD[case], groups=2, silu=True)
