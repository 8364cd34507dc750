"""Kernel tests run twice: in triton's interpreter (test_interpreter.py's subprocess), and on a GPU."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def pytest_collection_modifyitems(config, items):
    dropped = [item for item in items if item.get_closest_marker("interpreter") and not INTERPRETED]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture
def poisoned():
    """torch.empty holds NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=GPU)])
def device(request, poisoned):
    """Where a launcher's tensors live: the CPU for the interpreter, or a GPU."""
    return request.param


@pytest.fixture
def assert_as_good_as_torch():
    """|ours - exact| <= 2 * |torch at that precision - exact| + one ulp, element by element.

    effect: how far each output moves when x0 moves by 3e-6, as it may with another logarithm and fused multiply-add.
    """

    def check(ours, torchs, exact, effect):
        ulp = torch.finfo(ours.dtype).eps * exact.abs() + torch.finfo(ours.dtype).smallest_normal
        bound = 2 * (torchs.double() - exact).abs().max() + ulp + effect
        error = (ours.double() - exact).abs()
        assert (error <= bound).all(), f"off by {(error - bound).max():.3g} more than allowed"

    return check
