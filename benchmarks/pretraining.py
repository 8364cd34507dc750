"""A pretraining step of ours against torchcfm's: `python -m orwcfm_fast.benchmarks.pretraining`.

Both train the same U-Net on the same data and batch size, and both update a weight average.
"""

import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orwcfm_fast.benchmarks.plain_loop import torchcfm_network
from orwcfm_fast.benchmarks.ways import CPU, alternate, bench_policy, paired
from orwcfm_fast.method.pretrain import Pretrainer
from orwcfm_fast.settings import Pretrain

DECAY = 0.9999
BATCHES = 2  # in the data set


class PlainPretraining:
    """torchcfm's CIFAR-10 example: float32 eager, dropout, Adam at 2e-4 with warm-up, and a weight average that is
    updated entry by entry of the state dict; with the independent coupling, the cheapest of its choices."""

    def __init__(self, network: nn.Module, data: Tensor, batch: int) -> None:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        self.network, self.data, self.batch = network.train(), data, batch
        self.average = copy.deepcopy(network)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: min(k, 5000) / 5000)
        self.matcher = ConditionalFlowMatcher(sigma=0.0)

    def step(self) -> None:
        """One gradient step and the update of the average."""
        x1 = self.data[torch.randint(len(self.data), (self.batch,), device=self.data.device)]
        t, x_t, u = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        self.optimizer.zero_grad()
        loss = (self.network(t, x_t) - u).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        source = self.network.state_dict()
        for key, value in self.average.state_dict().items():
            value.copy_(value * DECAY + source[key] * (1 - DECAY))


def measure(batch: int, repeats: int, device: torch.device = CPU) -> list[dict[str, Any]]:
    """Images a second of each way on the CIFAR-10 U-Net, and their ratio to torchcfm's, measured in turn."""
    policies = {precision: bench_policy("cifar10", precision, device) for precision in ("fp32", "bf16")}
    first = policies["fp32"]
    data = torch.randn(BATCHES * batch, *first.shape, device=device).clamp(-1, 1)
    network = torchcfm_network(first.model, first.network.state_dict()).to(device)
    steps: dict[str, Callable[[], Any]] = {"torchcfm": PlainPretraining(network, data, batch).step}
    for precision, policy in policies.items():
        steps[precision] = Pretrainer(policy, data, Pretrain(batch=batch, steps=10**6, ema=DECAY)).step

    def images(step: Callable[[], Any]) -> int:
        step()
        return batch

    found = alternate({way: lambda s=s: images(s) for way, s in steps.items()}, repeats, device)  # type: ignore[misc]
    return [
        {
            "way": way,
            "batch": batch,
            "images_per_s": statistics.median(rates),
            "ratio": paired(rates, found["torchcfm"]),
        }
        for way, rates in found.items()
    ]


if __name__ == "__main__":
    print(json.dumps(measure(64, 3), indent=1))
