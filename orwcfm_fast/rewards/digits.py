"""A small classifier of handwritten digits, trained on first use, and the rewards it gives."""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orwcfm_fast import checkpoint
from orwcfm_fast.data import load_data
from orwcfm_fast.device import cache_dir
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.rewards.registry import Score, reward, reward_factory
from orwcfm_fast.settings import RewardOptions

HELD_OUT, EPOCHS, BATCH = 360, 40, 64


@dataclass(frozen=True)
class Classifier:
    """Probabilities and features of digits 1×8×8; `accuracy` on 360 held-out real digits."""

    network: nn.Sequential
    accuracy: float

    def probabilities(self, images: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] in [-1, 1] → [B, 10]."""
        if images.shape[1:] != (1, 8, 8):
            raise UserError(f"needs digits 1×8×8, these samples are {'×'.join(map(str, images.shape[1:]))}")
        return self._on(images)(images.float()).softmax(1)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate layer, [B, 128]."""
        return self._on(images)[:-1](images.float())

    def _on(self, images: Tensor) -> nn.Sequential:
        return self.network.to(images.device)


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


@functools.cache
def digit_classifier() -> Classifier:
    """The cached classifier; trained first (a few seconds) where there is none.

    Fixed seed and split: 1,437 real digits train it, 360 judge it.
    """
    folder = cache_dir() / "digits-classifier"
    network = _network()
    try:
        found = checkpoint.load(folder)
        checkpoint.load_weights(network, found.tensors["model"], str(folder))
        accuracy = float(found.state["accuracy"])
    except (UserError, KeyError, ValueError):
        accuracy = _train(network)
        checkpoint.save(folder, {"kind": "classifier", "accuracy": accuracy}, model=network.state_dict())
    return Classifier(network.eval().requires_grad_(False), accuracy)


def _train(network: nn.Sequential) -> float:
    images, labels = load_data("digits")
    assert labels is not None
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(b"digits-classifier").digest()[:4], "big"))
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        order = torch.randperm(len(images))
        train, held_out = order[HELD_OUT:], order[:HELD_OUT]
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
        for _ in range(EPOCHS):
            for pick in train[torch.randperm(len(train))].split(BATCH):
                # noise as a sampler leaves it must not change the class
                x = images[pick] + 0.1 * torch.randn_like(images[pick])
                optimizer.zero_grad()
                F.cross_entropy(network(x), labels[pick]).backward()
                optimizer.step()
    with torch.no_grad():
        accuracy = float((network.eval()(images[held_out]).argmax(1) == labels[held_out]).float().mean())
    if accuracy < 0.95:
        raise WorkError(f"the digits classifier reached only {accuracy:.1%} on held-out digits")
    return accuracy


@reward("even-digits")
def even_digits(images: Tensor) -> Tensor:
    """probability that a digit is even, by an independent classifier"""
    return digit_classifier().probabilities(images)[:, ::2].sum(1)


@reward_factory("digit")
def digit(argument: str, options: RewardOptions) -> Score:
    """digit:K, probability that a digit is K, by an independent classifier"""
    if not (argument.isdigit() and int(argument) < 10):
        raise UserError(f"reward 'digit:{argument}': write digit:K with K from 0 to 9")
    return lambda images: digit_classifier().probabilities(images)[:, int(argument)]
