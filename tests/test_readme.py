"""Every command that the README shows is one that works."""

import re
import shlex
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
COMMANDS = [line.strip() for line in README.splitlines() if re.match(r"    (orwcfm|make) ", line)]
RUN = (
    "--rollout",
    "32",
    "--batch",
    "16",
    "--steps-per-round",
    "2",
    "--eval-n",
    "32",
    "--probe",
    "8",
    "--nfe",
    "4",
)
CHEAP = {
    "finetune": RUN,
    "sweep": RUN,
    "pretrain": ("--batch", "16", "--steps", "40"),
    "sample": ("--nfe", "4"),
    "evaluate": ("-n", "160", "--nfe", "4"),
    "doctor": ("--batch", "4", "--rollout", "8", "--chunk", "8", "--nfe", "4"),
    "predict": ("-n", "200", "--scored", "200", "--rounds", "2", "--nfe", "4"),
}  # fmt: skip


def test_there_are_commands_to_test():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert re.search(rf"^{command.split()[1]}:", makefile, re.M)


def test_commands_in_the_order_of_the_readme(run_cli, cache):
    """Each as written, made cheap by flags behind it, in one directory with a model that is already there."""
    from orwcfm_fast.method.pretrain import Pretrainer
    from orwcfm_fast.networks.policy import make_policy
    from orwcfm_fast.runs.load import Loader
    from orwcfm_fast.settings import Pretrain

    cpu = torch.device("cpu")
    path = cache / "pretrained" / "unet-digits"
    if not path.exists():
        Pretrainer(
            make_policy("unet-digits", "digits", (1, 8, 8), cpu), torch.zeros(1, 1, 8, 8), Pretrain()
        ).save(path)
    Path("my_reward.py").write_text(re.search(r"```python\n# my_reward.py\n(.*?)```", README, re.S).group(1))
    weights = make_policy("unet-digits", "digits", (1, 8, 8), cpu).network.state_dict()
    torch.save({"ema_model": weights, "net_model": weights}, "cifar10_weights_step_400000.pt")
    try:
        for command in (c for c in COMMANDS if c.startswith("orwcfm")):
            arguments = shlex.split(command)[1:]
            result = run_cli(*arguments, *CHEAP.get(arguments[0], ()))
            # this untrained stand-in may be out of reach of what the README wants
            assert result.code == 0 or ("--want" in command and "reach" in result.err), (
                f"{command}: {result.err}"
            )
    finally:
        Loader(cpu).load(str(path))
        import shutil

        shutil.rmtree(path)


def test_the_table_names_every_command():
    from orwcfm_fast.cli import load_app

    names = {c.name or c.callback.__name__.rstrip("_") for c in load_app().registered_commands}
    assert names == set(re.findall(r"^\| `orwcfm (\w+)", README, re.M))


def test_python_example_is_valid_and_its_keys_known():
    from orwcfm_fast.paper import settings_from

    example = re.search(r"```python\nimport torch\n(.*?)```", README, re.S).group(1)
    compile(example, "README", "exec")
    config = eval(re.search(r"config = (\{.*?\n\})", example, re.S).group(1))
    assert settings_from(config).alpha == 1.0
