"""The advice for wishes can be typed as it stands, and follows the spread of the rewards."""

import json
import shlex

import pytest

from orwcfm_fast.cli import effects
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory.advice import MANY_PROMPTS, WISHES


def _value(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _settings(command: str) -> dict:
    """What the words of a command set."""
    words = shlex.split(command)
    assert words[:2] == ["orwcfm", "finetune"]
    pairs = zip(words[2::2], words[3::2], strict=True)
    return {name[2:].replace("-", "_"): _value(text) for name, text in pairs}


@pytest.mark.parametrize("wish", (*WISHES, MANY_PROMPTS), ids=lambda wish: wish.name)
def test_what_is_advised_can_be_typed_and_every_option_of_it_counts(wish):
    given = _settings(wish.command(0.49))
    model = {"model": "diffusers:flux", "prompts": "prompts.txt"} if wish is MANY_PROMPTS else {}
    s = Finetune(**given | model)
    effects.check_effect(effects.FINETUNE, given, s, out=None, overwrite=False)
    assert s.alpha == wish.alpha
    assert all(getattr(s, key) == value for key, value in wish.settings.items())


def test_a_reward_in_other_units_is_advised_the_same_weights():
    digits, kilobytes = (_settings(WISHES[0].command(spread))["tau"] for spread in (0.5, 50.0))
    assert digits * 0.5 == pytest.approx(kilobytes * 50.0) == pytest.approx(WISHES[0].pull)


def test_predict_ends_with_advice_for_its_model_and_reward(run_cli, tiny_run):
    shown = run_cli("predict", str(tiny_run), "-n", 64, "--scored", 64, "--nfe", 4, "--rounds", 2)
    advised = shown.out[shown.out.index("advice, for rewards") :].splitlines()[1:]
    assert len(advised) == len(WISHES)
    for line, wish in zip(advised, WISHES, strict=True):
        name, command = line.strip().split(": ", 1)
        given = _settings(command)
        assert name == wish.name and given["alpha"] == wish.alpha
        assert str(tiny_run) in given["checkpoint"] and given["reward"]
