"""Ways of running a thing, timed in turn: what the benchmarks of the loop share."""

import statistics
import time
from collections.abc import Callable

import torch

from orwcfm_fast.networks.policy import Policy, make_policy

SIZES = {"digits": ("unet-digits", (1, 8, 8)), "cifar10": ("unet-cifar10", (3, 32, 32))}
CPU = torch.device("cpu")
LORA_RANK = 16


def bench_policy(data: str, precision: str, device: torch.device = CPU) -> Policy:
    """The preset as initialised, its zero layers randomised so that every product is a real one."""
    model, shape = SIZES[data]
    policy = make_policy(model, data, shape, device, precision)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.network.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return policy


def alternate(
    ways: dict[str, Callable[[], int]], repeats: int, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Images a second of each way, in turn, `repeats` times after two warm-ups; each call returns its images."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for call in [*ways.values()] * 2:  # a step's second call records its graph
        call()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            wait()
            began = time.perf_counter()
            images = call()
            wait()
            found[name].append(images / (time.perf_counter() - began))
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device = CPU) -> float:
    """Highest FLOP/s seen, the best of four, of a product of two large matrices and of a wide convolution.

    Of both, because a CPU's libraries differ: torch's float32 products run at half the convolutions' rate on AMD.
    """
    size, batch = (8192, 256) if device.type == "cuda" else (2048, 16)
    a = torch.randn(size, size, device=device).to(dtype)
    x = torch.randn(batch, 256, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    flop = {"product": 2 * size**3, "convolution": 2 * 9 * 256**2 * x[:, 0].numel()}

    def product() -> int:
        torch.mm(a, a)
        return flop["product"]

    def convolution() -> int:
        torch.conv2d(x, w, padding=1)
        return flop["convolution"]

    with torch.inference_mode():
        found = alternate({"product": product, "convolution": convolution}, 4, device)
    return max(map(max, found.values()))


def forward_flop(policy: Policy) -> float:
    """Floating-point operations of one forward pass of one image, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        policy.velocity(0.5, torch.zeros(1, *policy.shape, device=policy.device))
    return float(counter.get_total_flops())


def paired(found: list[float], plain: list[float]) -> float:
    """Median of the ratios of runs that are neighbours in time."""
    return statistics.median(a / b for a, b in zip(found, plain, strict=True))
