"""Rewards in Python environments that `orwcfm rewards install` makes."""

import re

import pytest
import torch

from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.rewards import environment
from orwcfm_fast.settings import RewardOptions


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """An empty folder of recipes, and an empty cache."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(environment, "RECIPES", folder)
    monkeypatch.setenv("ORWCFM_CACHE", str(tmp_path / "cache"))
    return folder


def test_an_environment_is_made_and_its_function_scores(recipes, run_cli, tmp_path):
    pth = f"import sys; sys.path.append({torch.__path__[0].removesuffix('/torch')!r})"
    wheel = made_wheel(tmp_path, "torch_of_the_test", "torch_of_the_test.pth", pth)  # torch, not to be copied
    (recipes / "length.txt").write_text(f"{wheel}\n")
    (recipes / "length_reward.py").write_text(
        "import torch\n\ndef score(samples, prompts):\n"
        "    return torch.tensor([float(len(p)) for p in prompts]) + samples[:, 0]\n"
    )
    made = run_cli("rewards", "install", "length")
    assert made.code == 0, made.err
    assert made.out.splitlines()[-1].endswith("use it with --reward length")
    reward = environment.installed("length", RewardOptions())
    assert reward(torch.tensor([[0.5], [0.0]]), prompts=["a", "abc"]).tolist() == [1.5, 3.0]
    reward.close()


def made_wheel(folder, name, file, content):
    """A wheel of one file, as pip installs it."""
    import zipfile

    path = folder / f"{name}-1-py3-none-any.whl"
    about = f"{name}-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(file, content)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(
            f"{about}/RECORD", f"{file},,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n"
        )
    return path


@pytest.mark.parametrize(
    ("packages", "code", "message"),
    [
        (
            "/no/such/package-1-py3-none-any.whl\n",
            "def score(x): pass\n",
            r"install broken: ERROR: .*package-1",
        ),
        ("", "import missing_of_the_test\n", r"install broken: .*No module named 'missing_of_the_test'"),
        ("", "def other(x): pass\n", r"install broken: .*score"),
    ],
)
def test_what_does_not_install_or_import_is_one_line_and_leaves_nothing(recipes, packages, code, message):
    (recipes / "broken.txt").write_text(packages)
    (recipes / "broken_reward.py").write_text(code)
    with pytest.raises(WorkError, match=message):
        environment.install("broken")
    assert not environment.place("broken").exists()


def test_wrong_names_are_one_line(recipes, run_cli):
    failed = run_cli("rewards", "install", "hpsv33")
    assert failed.code == 2 and failed.err.count("\n") == 1 and "unknown environment 'hpsv33'" in failed.err
    (recipes / "length.txt").touch()
    with pytest.raises(UserError, match=r"--python nonesuch: no such interpreter"):
        environment.install("length", "nonesuch")
    with pytest.raises(UserError, match=r"make it with: orwcfm rewards install hpsv3"):
        environment.hpsv3("", RewardOptions().with_prompts())


def test_every_package_of_a_recipe_is_pinned():
    for name in environment.names():
        lines = (environment.RECIPES / f"{name}.txt").read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith("#")]
        assert packages and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in packages)
        assert environment.code(name).is_file()
