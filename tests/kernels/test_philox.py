import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from orwcfm_fast.kernels._triton import tl, triton
from orwcfm_fast.kernels.philox import (
    X0,
    box_muller,
    box_muller_kernel,
    normal_kernel,
    philox4x32,
    philox_kernel,
)
from orwcfm_fast.kernels.random_numbers import normal

SEEDS = [0, 1, 2**32 + 5, 2**40 + 7, -1, -(2**63), 2**63 - 1]
INDICES = [0, 3, 2**31, 2**32 + 1, 2**40 + 9, 2**62]


def numpy_philox(c, seed):
    """Salmon et al. 2011, figure 2, in NumPy."""
    c = [np.asarray(x, dtype=np.uint64) for x in c]
    mask, key = np.uint64(0xFFFFFFFF), [seed % 2**32, seed % 2**64 >> 32]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(key[0]), p1 & mask, high0 ^ c[3] ^ np.uint64(key[1]), p0 & mask]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def float64_normals(words):
    """Box-Muller in float64, and what the kernels may be off by: 6e-7 * max(1, radius)."""
    w = [word.double() for word in words]
    normals, bounds = [], []
    for radius_word, angle_word in ((w[0], w[1]), (w[2], w[3])):
        radius = (-2 * ((radius_word + 0.5) / 2**32).log()).sqrt()
        angle = 2 * math.pi * angle_word / 2**32
        normals += [radius * angle.cos(), radius * angle.sin()]
        bounds += [6e-7 * radius.clamp_min(1)] * 2
    return torch.stack(normals, -1).flatten(), torch.stack(bounds, -1).flatten()


def index_words(index):
    return torch.tensor(index & 0xFFFFFFFF), torch.tensor(index >> 32)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, seed, words):
    counter = [torch.tensor([c]) for c in counter]
    assert " ".join(f"{int(w):08x}" for w in philox4x32(*counter, seed)) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("index", INDICES)
def test_integers_equal_numpys(seed, index):
    block, (low, high) = torch.arange(1000) + 2**32 - 500 & 0xFFFFFFFF, index_words(index)
    ours = philox4x32(block, 7, low, high, torch.tensor(seed))
    for a, b, c in zip(
        ours, numpy_philox((block, 7, low, high), seed), philox4x32(block, 7, low, high, seed), strict=True
    ):
        assert np.array_equal(a.numpy(), b.astype(np.int64)) and torch.equal(a, c)


def test_normals_are_the_float64_formula_within_the_stated_bound():
    z = normal((2**20,), 2**40 + 7, torch.tensor([3]), 5)[0]
    words = philox4x32(torch.arange(2**18), 5, torch.tensor(3), torch.tensor(0), 2**40 + 7)
    exact, bound = float64_normals(words)
    assert ((z - exact).abs() <= bound).all()
    assert (z - exact).square().mean().sqrt() < 1e-7


def test_normals_keep_their_precision_in_the_tail_and_at_zero():
    edges = torch.tensor([0, 2**29, 2**30, 2**31, 3 * 2**30, 7 * 2**29, 2**32, *(2**k for k in range(32))])
    near = (edges[:, None] + torch.arange(-2000, 2000)).flatten() % 2**32
    angle = torch.randint(0, 2**32, near.shape, generator=torch.Generator().manual_seed(0))
    for words in ((near, angle), (angle, near), (torch.zeros_like(near), near)):
        exact, bound = (x.view(-1, 4)[:, :2] for x in float64_normals([*words, *words]))
        assert ((torch.stack(box_muller(*words), -1) - exact).abs() <= bound).all()


def test_noise_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from orwcfm_fast.kernels.anchored_residual import anchored_residual
from orwcfm_fast.kernels.interpolate import interpolate
seed, index, w, x1 = torch.tensor(0), torch.arange(2), torch.ones(2), torch.ones(2, 3)
losses = anchored_residual(interpolate(x1, w / 2, seed, index), x1, x1, seed, index, w, w)[0]
print([round(float(x), 5) for x in losses])
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    x0 = normal((3,), torch.tensor(0), torch.arange(2), X0)
    x_t = torch.lerp(x0, torch.ones(2, 3), 0.5)
    losses = (x_t - (1 - x0)).square().mean(1) + (x_t - 1).square().mean(1)
    assert json.loads(found) == pytest.approx(losses.tolist(), abs=1e-4)


@triton.jit
def _words_kernel(out, seed, index, N: tl.constexpr):
    lane = tl.arange(0, N)
    key, i = tl.load(seed), tl.load(index)
    zero = tl.zeros([N], tl.uint32)
    w0, w1, w2, w3 = philox_kernel(
        lane.to(tl.uint32),
        zero + 7,
        zero + i.to(tl.uint32),
        zero + (i >> 32).to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    tl.store(out + lane, w0.to(tl.int64))
    tl.store(out + N + lane, w1.to(tl.int64))
    tl.store(out + 2 * N + lane, w2.to(tl.int64))
    tl.store(out + 3 * N + lane, w3.to(tl.int64))


@triton.jit
def _normals_kernel(out, seed, index, start, BLOCK: tl.constexpr, NEIGHBOURS: tl.constexpr):
    z = normal_kernel(tl.load(start), tl.load(seed), tl.load(index), 0, BLOCK, NEIGHBOURS)
    tl.store(out + tl.arange(0, BLOCK), z)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("index", INDICES)
def test_triton_draws_the_same_integers(seed, index, device):
    words = torch.empty(4, 128, dtype=torch.int64, device=device)
    _words_kernel[(1,)](words, torch.tensor(seed, device=device), torch.tensor(index, device=device), 128)
    expected = torch.stack(philox4x32(torch.arange(128), 7, *index_words(index), seed))
    assert torch.equal(words.cpu(), expected)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("start", [0, 2**33])
def test_triton_draws_the_same_normals(neighbours, start, device):
    z = torch.empty(2048, device=device)
    seed, index, first = (torch.tensor(x, device=device) for x in (-5, 2**33 + 1, start))
    _normals_kernel[(1,)](z, seed, index, first, 2048, neighbours)
    words = philox4x32(torch.arange(512) + start // 4, 0, *index_words(2**33 + 1), -5)
    exact, bound = float64_normals(words)
    assert ((z.cpu() - exact).abs() <= bound).all()


@triton.jit
def _edges_kernel(radius_words, angle_words, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    z0, z1 = box_muller_kernel(
        tl.load(radius_words + lane).to(tl.uint32), tl.load(angle_words + lane).to(tl.uint32)
    )
    tl.store(out + 2 * lane, z0)
    tl.store(out + 2 * lane + 1, z1)


def test_tritons_logarithm_keeps_its_precision_where_the_two_formulas_meet(device):
    edges = torch.tensor([0, 2**31, 7 * 2**29, 2**32])
    words = ((edges[:, None] + torch.arange(-512, 512)).flatten() % 2**32).to(device)
    angle = words.flip(0) * 3 % 2**32
    z = torch.empty(8192, device=device)
    _edges_kernel[(1,)](words, angle, z, 4096)
    exact, bound = (x.view(-1, 4)[:, :2] for x in float64_normals([words, angle, words, angle]))
    assert ((z.view(-1, 2) - exact).abs() <= bound).all()
