"""Rewards whose packages clash with this one's: each in a Python environment that the tool makes.

`environments/NAME.txt` has the packages, every version pinned; `environments/NAME_reward.py`
the function `score`; no file there has the name of a package, which it would hide.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from orwcfm_fast.device import cache_dir
from orwcfm_fast.errors import RewardError, UserError, WorkError
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards.process import Died, ProcessReward, process
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

RECIPES = Path(__file__).with_name("environments")
DONE = "installed"  # a file that is written when an environment is whole
TRY_SECONDS = 600.0


def names() -> list[str]:
    """The environments that can be made."""
    return sorted(path.stem for path in RECIPES.glob("*.txt"))


def place(name: str) -> Path:
    """The folder of an environment, made or not."""
    return cache_dir() / "environments" / name


def code(name: str) -> Path:
    """The file with an environment's function."""
    return RECIPES / f"{name}_reward.py"


def install(name: str, python: str = sys.executable, say: Callable[[str], None] = lambda text: None) -> Path:
    """Make an environment with pip and import its function once, which proves that its packages fit; its folder.

    One that is there already is left as it is.

    Args:
        python: interpreter that it is made of; a recipe's first line says for which version its pins were resolved.
        say: called with a line for each step.

    Raises:
        UserError: no such environment, or no such interpreter.
        WorkError: pip failed, or the function cannot be imported; nothing is left of it.
    """
    if name not in names():
        raise unknown("environment", name, names(), "orwcfm rewards install --help")
    if not shutil.which(python):
        raise UserError(f"--python {python}: no such interpreter")
    folder = place(name)
    if is_installed(name):
        return folder
    own = str(folder / "bin" / "python")
    # every package is in the list, so pip need not resolve, nor install what is declared and not used
    packages = ["-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(RECIPES / f"{name}.txt")]
    try:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # of other pins, or what an installation that was cut off has left
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"making {folder}")
        _run(name, [python, "-m", "venv", str(folder)])
        say("installing its packages")
        _run(name, [own, *packages])
        say("importing the reward")
        _try(name, folder)
        (folder / DONE).write_text(_pins(name))
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise WorkError(f"rewards install {name}: {error.filename}: {error.strerror}") from None
        raise
    return folder


def is_installed(name: str) -> bool:
    """Whether the environment is whole and of the recipe as it is now."""
    done = place(name) / DONE
    return done.is_file() and done.read_text() == _pins(name)


def _pins(name: str) -> str:
    return hashlib.sha256((RECIPES / f"{name}.txt").read_bytes()).hexdigest()


def _run(name: str, command: list[str]) -> None:
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = [line.strip() for line in (ended.stderr + ended.stdout).splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("WARNING")] or ["no message"]
        reason = next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[0])
        raise WorkError(f"rewards install {name}: {reason}")


def _try(name: str, folder: Path) -> None:
    worker = ProcessReward(folder / "bin" / "python", str(code(name)), "score", TRY_SECONDS)
    try:
        worker.start()
    except (Died, UserError, RewardError) as error:
        raise WorkError(f"rewards install {name}: {error}") from None
    worker.close()


def installed(name: str, options: RewardOptions) -> Reward:
    """The function of an environment, in a worker process.

    Raises:
        UserError: the environment is not there; says how it is made.
    """
    folder = place(name)
    if not is_installed(name):
        raise UserError(
            f"reward '{name}': has an environment of its own; make it with: orwcfm rewards install {name}"
        )
    return process(f"{folder}:{code(name)}:score", options)


@reward_factory("hpsv3")
def hpsv3(argument: str, options: RewardOptions) -> Reward:
    """HPSv3, human preference by a 7 B model, in an environment of its own: orwcfm rewards install hpsv3"""
    if argument:
        raise UserError(f"reward 'hpsv3:{argument}': takes no argument; its weights are those of the Hub")
    if not options.has_prompts:
        raise UserError("reward 'hpsv3': needs a model with prompts")
    return installed("hpsv3", options)
