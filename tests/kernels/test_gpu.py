"""What only a GPU can show: graphs, compiled code, addresses beyond 2^31, agreement with the CPU."""

import pytest
import torch

from orwcfm_fast.kernels.anchored_residual import anchored_residual, anchored_residual_reference
from orwcfm_fast.kernels.interpolate import interpolate, interpolate_reference
from orwcfm_fast.kernels.random_numbers import normal, uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def arguments(shape, dtype=torch.float32):
    g = torch.Generator(device="cuda").manual_seed(0)
    v, v_ref, x1 = (torch.randn(shape, generator=g, device="cuda", dtype=dtype) for _ in range(3))
    w = torch.randn(shape[0], generator=g, device="cuda")
    seed = torch.tensor(-3, device="cuda")
    return v, v_ref, x1, seed, torch.arange(shape[0], device="cuda"), w, w.abs()


def test_cpu_and_gpu_draw_the_same_noise():
    index = torch.arange(64) + 2**31 - 32
    for draw, error in ((normal, 3e-6), (uniform, 0)):
        there = draw((3, 32, 32), -9, index.cuda(), 4).cpu()
        assert (draw((3, 32, 32), -9, index, 4) - there).abs().max() <= error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ops_and_references_agree_on_the_gpu(dtype):
    args = arguments((64, 3, 32, 32), dtype)
    for one, other in zip(anchored_residual(*args), anchored_residual_reference(*args), strict=True):
        torch.testing.assert_close(one, other)
    path = args[2], args[6].clamp(0, 1), args[3], args[4]
    torch.testing.assert_close(interpolate(*path), interpolate_reference(*path))


def test_graph_replay_follows_seed_and_index():
    v, v_ref, x1, seed, index, w, a = arguments((16, 3, 32, 32))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile first
        anchored_residual(v, v_ref, interpolate(x1, a, seed, index), seed, index, w, a)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = anchored_residual(v, v_ref, interpolate(x1, a, seed, index), seed, index, w, a)
    for _ in range(3):
        seed += 1
        index += 2**31
        graph.replay()
        expected = anchored_residual(v, v_ref, interpolate(x1, a, seed, index), seed, index, w, a)
        assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


def test_same_bits_from_run_to_run():
    args = arguments((8, 100_000), torch.bfloat16)
    first = anchored_residual(*args)
    for _ in range(5):
        assert all(
            torch.equal(one, other) for one, other in zip(anchored_residual(*args), first, strict=True)
        )


def test_inside_torch_compile():
    v, v_ref, x1, seed, index, w, a = arguments((16, 3, 32, 32))

    def step(v):
        return anchored_residual(v * 2, v_ref, interpolate(x1, a, seed, index), seed, index, w, a)[0].sum()

    gradients = [
        torch.autograd.grad(f(v.requires_grad_()), v)[0] for f in (step, torch.compile(step, fullgraph=True))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(3, 2**30), (1, 2**31 + 1024)], ids=str)
def test_addresses_beyond_2_to_the_31(shape):
    need = 10 * shape[0] * shape[1]
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of GPU memory")
    v = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    v[-1, -512:] = 3
    seed, index = torch.tensor(1, device="cuda"), torch.arange(shape[0], device="cuda")
    one, zero = torch.ones(shape[0], device="cuda"), torch.zeros(shape[0], device="cuda")
    _, fm, w2, dv = anchored_residual(v, v, v, seed, index, one, zero)
    # v = x1: the residual is x0 itself, of unit variance to the last element
    assert not w2.any() and (fm - 1).abs().max() < 1e-3
    tail = dv[-1, -1024:].float() * (shape[1] / 2)
    assert 0.8 < tail.std() < 1.2
