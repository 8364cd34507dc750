"""Registries: one file dropped into a package folder adds an entry, a broken one is named."""

import sys
from importlib import import_module

import pytest
import torch

from orwcfm_fast.data.datasets import DATA, load_data
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.samplers import SOLVERS, solve
from orwcfm_fast.registry import Registry
from orwcfm_fast.rewards import REWARDS, make_reward

REWARD = '''"""Darkness of images."""

from torch import Tensor

from orwcfm_fast.rewards.registry import reward


@reward("darkness")
def darkness(images: Tensor) -> Tensor:
    """minus the mean pixel value"""
    return -images.flatten(1).mean(1)
'''
DATASET = '''"""A ring."""

import torch

from orwcfm_fast.data.datasets import dataset


@dataset("ring", (2,), "mlp", "radius")
def ring(data_dir, argument):
    """the unit circle"""
    angle = torch.linspace(0, 6.28, 1000)
    return torch.stack([angle.cos(), angle.sin()], 1), None
'''
SOLVER = '''"""Ralston's method."""

from itertools import pairwise

from orwcfm_fast.method.samplers.solver import solver


@solver("ralston", evals=2, order=2)
def ralston(velocity, x, times):
    """Ralston's second-order method."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        v = velocity(t, x)
        x = x + dt / 4 * (v + 3 * velocity(t + 2 / 3 * dt, x + 2 / 3 * dt * v))
    return x
'''


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """drop(registry, package, source): as if the file lay in the package's folder of a fresh process."""

    def put(registry, package: str, source: str) -> None:
        folder, _ = import_module(package), registry.names()
        (tmp_path / "dropped_by_test.py").write_text(source)
        monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
        monkeypatch.setattr(registry, "_package", package)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.delitem(sys.modules, f"{package}.dropped_by_test", raising=False)

    return put


def test_one_dropped_file_adds_a_reward(drop):
    assert len(REWARD.splitlines()) < 25
    drop(REWARDS, "orwcfm_fast.rewards", REWARD)
    assert make_reward("darkness")(torch.full((2, 1, 4, 4), 0.25)).tolist() == [-0.25, -0.25]
    assert REWARDS.summary("darkness") == "minus the mean pixel value"


def test_one_dropped_file_adds_a_dataset(drop):
    drop(DATA, "orwcfm_fast.data", DATASET)
    points, _ = load_data("ring")
    assert torch.allclose(points.norm(dim=1), torch.ones(1000))


def test_one_dropped_file_adds_a_solver(drop):
    drop(SOLVERS, "orwcfm_fast.method.samplers", SOLVER)
    x = solve(lambda t, x: x, torch.ones(1, dtype=torch.float64), "ralston", 200)
    assert float(x[0]) == pytest.approx(2.718281828, rel=1e-4)


def test_a_dropped_file_that_cannot_be_imported_is_named_each_time(drop):
    drop(REWARDS, "orwcfm_fast.rewards", "import no_such_package_at_all\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"rewards\.dropped_by_test: ModuleNotFoundError"):
            REWARDS.names()


def test_a_name_that_is_taken_is_refused():
    registry = Registry("reward")
    registry.register("mine")(1)
    with pytest.raises(ValueError, match="'mine' is registered twice"):
        registry.register("mine")(2)
    assert registry.get("mine") == 1
