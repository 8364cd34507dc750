"""Kernels that a GPU would be given, counted on fake CUDA tensors: each op that is no view is one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from orwcfm_fast.kernels.interpolate import interpolate_at_random_times
from orwcfm_fast.kernels.random_numbers import choice, normal, uniform
from orwcfm_fast.networks.inference import hold
from orwcfm_fast.networks.models import build_network

NO_KERNEL = (
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::lift_fresh",
    "aten::_unsafe_view",
    "prim::",
)


class Kernels(TorchDispatchMode):
    """Names of the ops that launch a kernel, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        if not op.is_view and not name.startswith(NO_KERNEL):
            self.names.append(name)
        found = op(*args, **(kwargs or {}))
        if name == "aten::convolution":  # cuDNN keeps the layout, fake tensors do not know it
            found = found.contiguous(memory_format=torch.channels_last)
        return found


@pytest.fixture
def counted():
    """A function's kernels on fake CUDA tensors."""

    def count(function, *args):
        with Kernels() as kernels:
            function(*args)
        return kernels.names

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield count


def test_t_and_the_path_are_drawn_in_one_launch(counted):
    seed, index = torch.zeros((), dtype=torch.int64, device="cuda"), torch.arange(64, device="cuda")
    x1 = torch.zeros(64, 1, 8, 8, device="cuda")
    assert counted(interpolate_at_random_times, x1, seed, index) == ["orwcfm::interpolate_at_random_times"]


@pytest.mark.parametrize(
    "draw", [uniform, normal, lambda *a: choice(9, *a[1:])], ids=["t", "noise", "choice"]
)
def test_drawing_takes_three_launches_at_most(counted, draw):
    index = torch.arange(64, device="cuda")
    names = counted(draw, (), 7, index, 3)
    assert 1 <= len(names) <= 3 and sum(name.startswith("orwcfm::") for name in names) == 1


@pytest.fixture
def network():
    """The CIFAR-10 U-Net, before there are fake tensors, which a module does not take."""
    with torch.device("meta"):
        return build_network("unet-cifar10", (3, 32, 32)).eval()


def flash_attention(q, k, v):
    """The kernel that torch selects on a GPU; where there is none it selects a dozen others."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@pytest.fixture(params=["held in bf16", "cast by autocast"])
def held(request, network):
    """Whether the network is as rollouts and the round's pass without gradient have it."""
    if request.param == "held in bf16":
        hold(network, torch.bfloat16)
    return request.param == "held in bf16"


@pytest.mark.parametrize("times", [8, 1], ids=["a time each", "one for all"])
def test_a_forward_pass_of_the_cifar_network_in_bf16(held, times, network, counted, monkeypatch):
    """Weights that are held in bf16 need no casts; autocast casts all but those of the norms."""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", flash_attention)
    network.to_empty(device="cuda")
    t, x = torch.zeros(times, device="cuda").expand(8), torch.zeros(8, 3, 32, 32, device="cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        names = counted(network, t, x)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    casts = names.count("aten::_to_copy")
    assert names.count("orwcfm::group_norm_silu") == 51
    assert len(names) - casts <= 290
    assert casts == 2 if held else casts > 100  # of the samples, and of the embedding of their times
