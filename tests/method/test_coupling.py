"""Couplings keep both terms of the objective unbiased."""

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.method import noise
from orwcfm_fast.method.coupling import couple

SEED = torch.tensor(1)


def test_independent_keeps_samples_weights_and_alpha():
    x1, w = torch.randn(16, 3), torch.rand(16)
    batch = couple(x1, w, 0.3, SEED, noise.indices(5, 16, "cpu"))
    x0 = noise.normal((3,), SEED, batch.index, noise.X0)
    assert torch.equal(batch.x1, x1) and torch.equal(batch.w, w) and bool((batch.a == 0.3).all())
    assert torch.allclose(batch.x_t, (1 - batch.t[:, None]) * x0 + batch.t[:, None] * x1, atol=1e-6)


def test_ot_terms_are_unbiased():
    """Mean of w·f(x1) and of a·f(x1) over many OT batches equals that of the independent coupling."""
    torch.manual_seed(0)
    x1, w, alpha = torch.randn(32, 2), torch.rand(32) + 0.05, 0.7
    f = x1[:, 0].exp()
    fm = w2 = 0.0
    draws = 400
    for k in range(draws):
        batch = couple(x1, w, alpha, SEED, noise.indices(32 * k, 32, "cpu"), "ot")
        f_ot = batch.x1[:, 0].exp()
        fm += float((batch.w * f_ot).mean()) / draws
        w2 += float((batch.a * f_ot).mean()) / draws
    assert fm == pytest.approx(float((w * f).mean()), rel=0.01)
    assert w2 == pytest.approx(float((alpha * f).mean()), rel=0.02)


def test_ot_shortens_paths():
    torch.manual_seed(0)
    x1, w = 3 * torch.randn(128, 2), torch.ones(128)
    lengths = {}
    for coupling in ("independent", "ot"):
        batch = couple(x1, w, 1.0, SEED, noise.indices(0, 128, "cpu"), coupling)
        x0 = noise.normal((2,), SEED, batch.index, noise.X0)
        lengths[coupling] = float((batch.x1 - x0).square().sum(1).mean())
    assert lengths["ot"] < 0.6 * lengths["independent"]


def test_ot_refuses_weights_that_are_not_positive():
    with pytest.raises(UserError, match="positive"):
        couple(
            torch.randn(4, 2), torch.tensor([1.0, 0.0, 1.0, 1.0]), 1.0, SEED, noise.indices(0, 4, "cpu"), "ot"
        )
