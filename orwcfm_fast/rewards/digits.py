"""Small classifiers of handwritten digits, and the rewards they give; MNIST's ships, the other is made on first use."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.shipped import shipped
from orwcfm_fast.data.datasets import load_data
from orwcfm_fast.device import cache_dir
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

BATCH = 64


@dataclass(frozen=True)
class Training:
    """How the classifier of one dataset is made: real digits held out to judge it, passes over the others.

    cooldown: the learning rate falls to zero over all of the steps.
    """

    shape: tuple[int, int, int]
    held_out: int
    passes: int
    cooldown: bool = False

    def network(self) -> nn.Sequential:
        """At 28×28 the first layer halves the side, so that it costs little more than at 8×8."""
        side, stride = (4, 1) if self.shape[1] == 8 else (7, 2)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, stride, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * side**2, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


TRAINING = {"digits": Training((1, 8, 8), 360, 40), "mnist": Training((1, 28, 28), 5000, 8, cooldown=True)}


@dataclass(frozen=True)
class Classifier:
    """Probabilities and features of digits of its dataset's shape; `accuracy` on `judged_on` held-out real digits."""

    network: nn.Sequential
    accuracy: float
    shape: tuple[int, int, int] = (1, 8, 8)
    judged_on: int = 360

    def probabilities(self, images: Tensor) -> Tensor:
        """Images [B, *shape] in [-1, 1] → [B, 10]."""
        if images.shape[1:] != self.shape:
            raise UserError(f"needs digits {_by(self.shape)}, these samples are {_by(images.shape[1:])}")
        return self._on(images)(images.float()).softmax(1)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate layer, [B, 128]."""
        return self._on(images)[:-1](images.float())

    def _on(self, images: Tensor) -> nn.Sequential:
        return self.network.to(images.device)


def _by(shape) -> str:
    return "×".join(map(str, shape))


@functools.cache
def digit_classifier(data: str = "digits", data_dir: str = "") -> Classifier:
    """The classifier of "digits" or "mnist" that ships or is cached; trained first where there is none, in seconds.

    Fixed seed and split: of digits 1,437 train it and 360 judge it; of MNIST 55,000 and 5,000.
    """
    name, training = f"{data}-classifier", TRAINING[data]
    folder = shipped(name) or cache_dir() / name
    with torch.inference_mode(False):  # the first to ask may be scoring samples
        network = training.network()
        try:
            found = checkpoint.load(folder)
            checkpoint.load_weights(network, found.tensors["model"], str(folder))
            accuracy = float(found.state["accuracy"])
        except (UserError, KeyError, ValueError, TypeError):
            if shipped(name):
                raise UserError(f"{folder}: damaged; install orwcfm again") from None
            accuracy = train_classifier(network, data, data_dir)
            save_classifier(folder, network, accuracy)
    return Classifier(network.eval().requires_grad_(False), accuracy, training.shape, training.held_out)


def save_classifier(folder: Path, network: nn.Sequential, accuracy: float) -> None:
    checkpoint.save(folder, {"kind": "classifier", "accuracy": accuracy}, model=network.state_dict())


def train_classifier(network: nn.Sequential, data: str, data_dir: str) -> float:
    """Train the classifier of a dataset; its accuracy on the digits held out of it."""
    images, labels = load_data(data, data_dir)
    assert labels is not None
    name, held_out_size = f"{data}-classifier", min(TRAINING[data].held_out, len(images) // 4)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        order = torch.randperm(len(images))
        train, held_out = order[held_out_size:], order[:held_out_size]
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
        steps, passes = 0, TRAINING[data].passes
        for _ in range(passes):
            for pick in train[torch.randperm(len(train))].split(BATCH):
                # noise as a sampler leaves it must not change the class
                x = images[pick] + 0.1 * torch.randn_like(images[pick])
                if TRAINING[data].cooldown:
                    optimizer.param_groups[0]["lr"] = 1e-3 * (1 - steps * BATCH / len(train) / passes)
                steps += 1
                optimizer.zero_grad()
                F.cross_entropy(network(x), labels[pick]).backward()
                optimizer.step()
    with torch.no_grad():
        accuracy = float((network.eval()(images[held_out]).argmax(1) == labels[held_out]).float().mean())
    if accuracy < 0.95:
        raise WorkError(f"the {data} classifier reached only {accuracy:.1%} on held-out digits")
    return accuracy


def classifier_of(data: str, data_dir: str = "") -> Classifier | None:
    """The classifier of the dataset named NAME or NAME:ARGUMENT, None where it has none."""
    name = data.partition(":")[0]
    if name not in TRAINING:
        return None
    return digit_classifier() if name == "digits" else digit_classifier(name, data_dir)


def classifier_for(images: Tensor, data_dir: str) -> Classifier:
    """The classifier of the dataset whose digits have this shape.

    Raises:
        UserError: no dataset has.
    """
    for data, training in TRAINING.items():
        if images.shape[1:] == training.shape and (found := classifier_of(data, data_dir)):
            return found
    shapes = " or ".join(_by(training.shape) for training in TRAINING.values())
    raise UserError(f"needs digits {shapes}, these samples are {_by(images.shape[1:])}")


@reward_factory("even-digits")
def even_digits(argument: str, options: RewardOptions) -> Reward:
    """probability that a digit is even, by an independent classifier"""
    if argument:
        raise UserError("reward 'even-digits' takes no argument after ':'")
    return lambda images: classifier_for(images, options.data_dir).probabilities(images)[:, ::2].sum(1)


@reward_factory("digit")
def digit(argument: str, options: RewardOptions) -> Reward:
    """digit:K, probability that a digit is K, by an independent classifier"""
    if not (argument.isdigit() and int(argument) < 10):
        raise UserError(f"reward 'digit:{argument}': write digit:K with K from 0 to 9")
    return lambda images: classifier_for(images, options.data_dir).probabilities(images)[:, int(argument)]
