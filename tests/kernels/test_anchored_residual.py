import pytest
import torch

from orwcfm_fast.kernels.anchored_residual import (
    _sum_chunks_kernel,
    anchored_residual,
    anchored_residual_reference,
    launch_anchored_residual,
)
from orwcfm_fast.kernels.interpolate import interpolate
from orwcfm_fast.kernels.philox import X0
from orwcfm_fast.kernels.random_numbers import normal

SHAPES = [(1, 1), (3,), (3, 7), (5, 1023), (2, 4097), (2, 3072), (6, 9000), (7, 3, 5, 5)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


def arguments(shape, dtype=torch.float32, x1_dtype=None, layout=torch.contiguous_format, device="cpu"):
    """w has both signs and a zero, a has zeros."""
    g = torch.Generator().manual_seed(1)
    v, v_ref, x1 = (torch.randn(shape, generator=g).to(device, memory_format=layout) for _ in range(3))
    w, a = torch.randn(shape[0], generator=g).to(device), torch.rand(shape[0], generator=g).to(device)
    w[1::3], a[::2] = 0, 0
    index = torch.arange(shape[0], device=device) + 2**31 - 2
    seed = torch.tensor(2**40 + 3, device=device)
    return v.to(dtype), v_ref.to(dtype), x1.to(x1_dtype or dtype), seed, index, w, a


def exactly(v, v_ref, x1, seed, index, w, a):
    return anchored_residual_reference(
        v.double(), v_ref.double(), x1.double(), seed, index, w.double(), a.double()
    )


CASES = [(shape, torch.contiguous_format) for shape in SHAPES] + [((7, 3, 5, 5), torch.channels_last)]
CASES = [(*case, kind) for case in CASES for kind in DTYPES]
CASES += [  # ten seconds each in the interpreter
    pytest.param((64, 3072), torch.contiguous_format, kind, marks=pytest.mark.soak if k else pytest.mark.slow)
    for k, kind in enumerate(reversed(DTYPES))
]


@pytest.mark.parametrize(("shape", "layout", "dtypes"), CASES, ids=str)
def test_kernel_matches_float64(shape, layout, dtypes, device, assert_as_good_as_torch):
    args = arguments(shape, *dtypes, layout, device)
    ours = launch_anchored_residual(*args)
    assert ours[3].stride() == args[0].stride() and ours[3].dtype == args[0].dtype
    assert {x.dtype for x in ours[:3]} == {torch.float32}
    w, fm = args[5].double(), exactly(*args)[1]
    effects = 6e-6 * fm.sqrt() * w.abs(), 6e-6 * fm.sqrt(), 0, 6e-6 / args[0][0].numel() * w.abs().max()
    for one, torchs, exact, effect in zip(
        ours, anchored_residual_reference(*args), exactly(*args), effects, strict=True
    ):
        assert_as_good_as_torch(one, torchs, exact, effect)


def test_kernel_reads_each_tensor_by_its_own_strides(device):
    v, v_ref, x1, *rest = arguments((7, 3, 5, 4), device=device)
    plain = launch_anchored_residual(v, v_ref, x1, *rest)
    last = [x.to(memory_format=torch.channels_last) for x in (v, v_ref, x1)]
    for args in ((last[0], v_ref, x1), (v, last[1], x1), (v, v_ref, last[2]), (v, last[1], last[2])):
        for one, other in zip(launch_anchored_residual(*args, *rest), plain, strict=True):
            assert torch.equal(one, other)


def test_sums_take_in_every_chunk(device):
    fm, w2 = torch.rand(2, 3, 11, device=device, generator=torch.Generator(device).manual_seed(0))
    w, a, *sums = (torch.rand(3, device=device) for _ in range(5))
    _sum_chunks_kernel[(3,)](fm, w2, w, a, *sums, 11, BLOCK=4)
    for one, exact in zip(sums, (w * fm.sum(1) + a * w2.sum(1), fm.sum(1), w2.sum(1)), strict=True):
        torch.testing.assert_close(one, exact)


def test_kernel_gives_the_same_bits_again(device):
    args = arguments((3, 9000), device=device)
    for one, other in zip(launch_anchored_residual(*args), launch_anchored_residual(*args), strict=True):
        assert torch.equal(one, other)


def test_loss_is_the_formula_and_dv_its_gradient():
    v, v_ref, x1, seed, index, w, a = arguments((4, 3, 5), torch.float32)
    v = v.double().requires_grad_()
    u = x1 - normal((3, 5), seed, index, X0)
    fm, w2 = (v - u).square().mean((1, 2)), (v - v_ref).square().mean((1, 2))
    (dv,) = torch.autograd.grad((w * fm + a * w2).sum(), v)
    ours = anchored_residual(v.detach().float(), v_ref, x1, seed, index, w, a)
    for one, exact in zip(ours, (w * fm + a * w2, fm, w2, dv), strict=True):
        torch.testing.assert_close(one, exact.detach().float())


def test_zero_weight_and_zero_anchor_leave_their_terms_out():
    v, v_ref, x1, seed, index, w, _ = arguments((4, 9))
    zero = torch.zeros(4)
    loss, fm, w2, dv = anchored_residual(v, v_ref, x1, seed, index, zero, zero)
    assert not loss.any() and not dv.any() and fm.all() and w2.all()
    elsewhere = anchored_residual(v, v_ref + 1, x1, seed, index, w, zero)
    assert torch.equal(elsewhere[3], anchored_residual(v, v_ref, x1, seed, index, w, zero)[3])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_multiplies_dv_by_each_samples_gradient_every_time(dtype, layout):
    v, *rest = arguments((5, 3, 4, 4), dtype, layout=layout)
    v.requires_grad_()
    loss, _, _, dv = anchored_residual(v, *rest)
    g = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    expected = (g.view(-1, 1, 1, 1) * dv).to(dtype)
    for _ in range(2):
        v.grad = None
        loss.backward(g, retain_graph=True)
        assert torch.equal(v.grad, expected) and v.grad.stride() == v.stride()


@pytest.mark.parametrize("output", [1, 2, 3])
def test_differentiating_a_metric_raises(output):
    v, *rest = arguments((3, 4))
    metric = anchored_residual(v.requires_grad_(), *rest)[output]
    assert not metric.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        metric.sum().backward()


def test_second_derivative_raises():
    v, *rest = arguments((3, 4))
    loss = anchored_residual(v.requires_grad_(), *rest)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss.sum(), v, create_graph=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_survives_opcheck(layout, grad):
    v, *rest = arguments((4, 3, 5, 5), torch.bfloat16, torch.float32, layout)
    torch.library.opcheck(anchored_residual, (v.requires_grad_(grad), *rest))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_both_ops_inside_torch_compile(layout):
    v, v_ref, x1, seed, index, w, a = arguments((4, 3, 5, 5), layout=layout)

    def step(v):
        x_t = interpolate(x1, a, seed, index)
        loss, fm, w2, _ = anchored_residual(v * x_t, v_ref, x1, seed, index, w, a)
        return loss.sum(), fm, w2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        v.grad, v.requires_grad = None, True
        loss, fm, w2 = function(v)
        loss.backward()
        results.append((loss, fm, w2, v.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


BAD = {
    "v": {"v": torch.zeros(3, 4, dtype=torch.float64)},
    "v shape": {"v": torch.zeros(0, 4)},
    "v strides": {"v": torch.zeros(4, 3).T},
    "v_ref shape": {"v_ref": torch.zeros(3, 5)},
    "v_ref dtype": {"v_ref": torch.zeros(3, 4, dtype=torch.bfloat16)},
    "v_ref device": {"v_ref": torch.zeros(3, 4, device="meta")},
    "v_ref requires grad": {"v_ref": torch.zeros(3, 4, requires_grad=True)},
    "x1 shape": {"x1": torch.zeros(3, 4, 1)},
    "x1 dtype": {"x1": torch.zeros(3, 4, dtype=torch.bfloat16)},
    "x1 requires grad": {"x1": torch.zeros(3, 4, requires_grad=True)},
    "seed": {"seed": torch.zeros((), dtype=torch.int32)},
    "index": {"index": torch.zeros(4, dtype=torch.int64)},
    "w": {"w": torch.zeros(3, dtype=torch.float64)},
    "w requires grad": {"w": torch.zeros(3, requires_grad=True)},
    "a": {"a": torch.zeros(())},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    names = ("v", "v_ref", "x1", "seed", "index", "w", "a")
    given = dict(zip(names, arguments((3, 4)), strict=True)) | BAD[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]} "):
        anchored_residual(**given)
