"""No option passes in silence where it does nothing: every option of every command, gone through one by one."""

import pytest
import typer

from orwcfm_fast.cli import load_app
from orwcfm_fast.cli.app import all_commands

ADAPTIVE, LINEAR, PIPELINE = ("--solver", "dopri5"), ("--weights", "linear"), ("--checkpoint", "base")
NO_PROMPTS = "is no pipeline with prompts"

ALWAYS = None
"""The option has an effect beside any other, or the command refuses it where it cannot have one."""

COMMON = {
    "--seed": ALWAYS, "--device": ALWAYS, "--precision": ALWAYS, "--config": ALWAYS, "--debug": ALWAYS,
    "--quiet": ALWAYS, "--help": ALWAYS,
}  # fmt: skip
SAMPLING = {
    "--solver": ALWAYS,
    "--nfe": [("--nfe", 20, *ADAPTIVE, "dopri5 chooses its own time steps")],
    "--grid": [("--grid", "uniform", *ADAPTIVE, "dopri5 chooses its own time steps")],
    "--chunk": ALWAYS,
}
REWARDS = {
    "--reward": ALWAYS,
    "--reward-batch": ALWAYS,
    "--reward-timeout": [("--reward-timeout", 5, "no reward runs in a process")],
    "--reward-requests": [("--reward-requests", 4, "no reward runs on a server")],
    "--question": [("--question", "Is it a cat?", "no reward is a judge")],
    "--judge-answer": [("--judge-answer", "rating", "no reward is a judge")],
    "--judge-rate": [("--judge-rate", 2, "no reward is a judge")],
    "--judge-dry-run": [("--judge-dry-run", "no reward is a judge")],
    "--prompt": [("--prompt", "a cat", "no reward compares samples with a text")],
    "--negative": [("--negative", "a cat", "no reward is clip")],
    "--clip-score": [("--clip-score", "cosine", "no reward is clip")],
    "--clip-model": [("--clip-model", "ViT-L-14", "no reward and no features use CLIP")],
    "--clip-weights": [("--clip-weights", "laion2b", "no reward and no features use CLIP")],
    "--clip-precision": [("--clip-precision", "bf16", "no reward and no features use CLIP")],
    "--classifier-size": [("--classifier-size", 64, "no reward is a classifier")],
    "--classifier-pixels": [("--classifier-pixels", "unit", "no reward is a classifier")],
    "--data-dir": ALWAYS,  # where a digit reward or the measures look for MNIST or CIFAR-10
}
RAM = ("--method", "ram")
WEIGHTING = {
    "--method": ALWAYS,
    "--alpha": [("--alpha", 2, *RAM, "--method ram does not use α")],
    "--tau": [("--tau", 2, *LINEAR, "takes the rewards themselves")],
    "--weights": [("--weights", "advantage", *RAM, "--method ram has no weights")],
    "--adrpo-beta0": [("--adrpo-beta0", 2, "for --method adrpo")],
    "--ram-m": [("--ram-m", 2, "for --method ram")],
    "--raft-best-of": [("--raft-best-of", 2, *RAM, "for --method raft")],
    "--nft-beta": [("--nft-beta", 2, "for --method nft")],
    "--kl": [("--kl", 0.1, *RAM, "for --method nft or awm")],
    "--normalize-weights": [
        ("--normalize-weights", *LINEAR, "always divides by the mean"),
        ("--no-normalize-weights", *LINEAR, "always divides by the mean"),
    ],
    "--rounds": ALWAYS,
}


def conditions(*model) -> dict:
    """The options of a pipeline, on a model that is none."""
    values = {
        "--prompts": "p.txt",
        "--guidance": 4,
        "--group": 2,
        "--image-size": 64,
        "--prompt-tokens": 9,
        "--vae-chunk": 2,
    }
    return {flag: [(*model, flag, value, NO_PROMPTS)] for flag, value in values.items()}


def preset(command_model: str) -> dict:
    """--model and --data describe a .pt file."""
    return {
        "--model": [("--model", "mlp", command_model, "no MODEL is one")],
        "--data": [("--data", "moons", command_model, "no MODEL is one")],
    }


FINETUNE = {
    **COMMON, **SAMPLING, **REWARDS, **WEIGHTING, **conditions(*PIPELINE),
    "--alpha": [("--alpha", 1, "--target-w2", 1, "--target-w2 chooses α")],
    "--recipe": ALWAYS, "--out": ALWAYS, "--resume": ALWAYS, "--checkpoint": ALWAYS,
    "--overwrite": [("--overwrite", "about --out, which is not given")],
    "--holdout-reward": ALWAYS,
    "--model": ALWAYS, "--data": ALWAYS,  # refused where they differ from those of the checkpoint
    "--coupling": ALWAYS, "--target-w2": ALWAYS, "--rollout": ALWAYS,
    "--standardize-rewards": [("--standardize-rewards", "--weights", "advantage", "standardises a single reward")],
    "--batch": ALWAYS, "--lr": ALWAYS, "--warmup": ALWAYS, "--grad-clip": ALWAYS, "--steps-per-round": ALWAYS,
    "--cooldown": ALWAYS,
    "--times": ALWAYS,
    "--graph": ALWAYS,  # on is refused where there is no GPU
    "--compile": ALWAYS,
    "--micro-batch": [("--micro-batch", 64, "--batch", 64, "a batch of 64 is no larger")],
    "--lora": ALWAYS,
    "--lora-alpha": [("--lora-alpha", 8, "it is about the adapters of --lora")],
    "--lora-kind": [("--lora-kind", "dora", "it is about the adapters of --lora")],
    "--lora-targets": [
        ("--lora-targets", "all", "it is about the adapters of --lora"),
        (*PIPELINE, "--lora-init", "f", "--lora-targets", "all", "the layers are those of --lora-init"),
    ],
    "--lora-init": [(*PIPELINE, "--lora-init", "f.safetensors", NO_PROMPTS)],
    "--shard": ALWAYS,  # refused in one process
    "--gradient-checkpointing": [(*PIPELINE, "--gradient-checkpointing", NO_PROMPTS)],
    "--guard": ALWAYS,
    "--guard-ess": [("--guard-ess", 0.5, "--guard", "off", "--guard is off")],
    "--guard-w2": [("--guard-w2", 5, "--guard", "off", "--guard is off")],
    "--guard-velocity": [("--guard-velocity", 1.2, "--guard", "off", "--guard is off")],
    "--guard-diversity": [("--guard-diversity", 0.5, "--guard", "off", "--guard is off")],
    "--probe": ALWAYS,
    "--drift-control": [
        ("--drift-control", "nothing moves at τ = 0"),
        ("--no-drift-control", "--method", "orw", "--weights", "linear", "no τ is used"),
    ],
    "--eval-n": ALWAYS, "--save-every": ALWAYS, "--keep": ALWAYS, "--best": ALWAYS, "--log": ALWAYS,
    "--eval-prompts": [(*PIPELINE, "--eval-prompts", "p.txt", NO_PROMPTS)],
}  # fmt: skip

TABLE = {
    "pretrain": {
        **COMMON,
        "--recipe": ALWAYS, "--out": ALWAYS, "--resume": ALWAYS, "--data": ALWAYS, "--model": ALWAYS,
        "--overwrite": [("--overwrite", "about --out, which is not given")],
        "--data-dir": [("--data-dir", ".", "--data", "moons", "the dataset moons is not downloaded")],
        "--steps": ALWAYS, "--batch": ALWAYS, "--lr": ALWAYS, "--warmup": ALWAYS, "--grad-clip": ALWAYS,
        "--ema": ALWAYS, "--cooldown": ALWAYS, "--save-every": ALWAYS,
        "--flip": ALWAYS,  # refused for vectors
    },
    "finetune": FINETUNE,
    "sweep": {
        **{flag: cases for flag, cases in FINETUNE.items() if flag not in ("--recipe", "--resume")},
        "--alpha": [
            ("--alpha", 0, "--alpha", 1, "--target-w2", 1, "--target-w2 chooses α anew"),
            ("--alpha", 0.1, "--target-w2", 1, "--target-w2 chooses α anew"),
        ],
        "--tau": [
            ("--tau", 1, "--tau", 2, *LINEAR, "--weights linear does not use τ"),
            ("--tau", 2, *LINEAR, "takes the rewards themselves"),
        ],
        "--set": [(*PIPELINE, "--set", "group=2,4", NO_PROMPTS)],
    },
    "sample": {
        **COMMON, **SAMPLING, **conditions("base"), **preset("base"),
        "MODEL": ALWAYS, "-n": ALWAYS, "--out": ALWAYS,
        "--overwrite": [("--overwrite", "about --out, which is not given")],
    },
    "evaluate": {
        **COMMON, **SAMPLING,
        **{flag: cases and [("base", *case) for case in cases] for flag, cases in REWARDS.items()},
        **conditions("base"), **preset("base"),
        "MODEL": ALWAYS, "-n": ALWAYS, "--holdout-reward": ALWAYS, "--features": ALWAYS, "--against": ALWAYS,
        "--reference": ALWAYS, "--json": ALWAYS,
    },
    "predict": {
        **COMMON,
        **{flag: cases and [("base", *case) for case in cases] for flag, cases in REWARDS.items()},
        **WEIGHTING, **conditions("base"),
        "--reward": [("--versus", "run", "--reward", "right=2", "--versus takes that of the run")],
        "--alpha": [
            ("--alpha", 1, "--want-reward", 1, "find the α"),
            ("--alpha", 1, "--versus", "run", "from the run"),
        ],
        "--tau": [
            *WEIGHTING["--tau"],
            ("--tau", 1, "--tau", 2, "--want-reward", 1, "give --tau once"),
            ("--tau", 1, "--versus", "run", "from the run"),
        ],
        "--rounds": [("--rounds", 3, "--versus", "run", "from the run")],
        "--weights": [("--weights", "advantage", "--versus", "run", "from the run")],
        "MODEL": [
            ("base", "--versus", "run", "from the run"),
            ("base", "--exact", "--data", "moons", "--exact --data moons needs no model"),
        ],
        "--model": [*preset("base")["--model"], ("--exact", "--data", "moons", "--model", "mlp", "needs no model")],
        "--data": [*preset("base")["--data"], ("--data", "moons", "--versus", "run", "from the run")],
        **{
            flag: [("--exact", flag, value, "--exact draws no samples")]
            for flag, value in {
                "-n": 64, "--scored": 64, "--chunk": 8, "--solver": "euler", "--nfe": 20, "--grid": "uniform",
                "--seed": 1, "--device": "cpu", "--precision": "fp32",
            }.items()
        },
        "--exact": [("--exact", "--versus", "run", "shows the exact answer")],
        "--versus": ALWAYS,
        "--want-reward": [
            ("--want-reward", 1, "--exact", "only a forecast finds an α"),
            ("--want-reward", 1, "--versus", "run", "only a forecast finds an α"),
        ],
        "--want-w2": [("--want-w2", 1, "--exact", "only a forecast finds an α")],
        "--out": [
            ("--out", "a.png", "--want-reward", 1, "only a table of forecasts"),
            ("--out", "a.png", "--exact", "only a table of forecasts"),
        ],
        "--json": ALWAYS,
    },
    "list": {"--debug": ALWAYS, "--help": ALWAYS, "KIND": ALWAYS},
    "doctor": {
        **{k: ALWAYS for k in FINETUNE if k not in ("--resume", "--out", "--overwrite", "--quiet")},
        "--alpha": [("--alpha", 1, "give --plan as well"), ("--plan", *FINETUNE["--alpha"][0])],
        "--shard": [("--plan", "--shard", "one rank holds everything")],
        "--plan": ALWAYS, "--gpu-gib": ALWAYS, "--ranks": ALWAYS, "--json": ALWAYS,
        "--gpus-per-node": [("--plan", "--gpus-per-node", 4, "give --ranks as well")],
        "--link-gbit": [("--plan", "--link-gbit", 100, "give --ranks as well")],
        "--tflops": [("--tflops", 100, "give --plan as well"), ("--plan", "--tflops", 100, "give --ranks as well")],
        "--reward-seconds": [("--plan", "--reward-seconds", 1, "give --ranks as well")],
    },
    "rewards serve": {
        "REWARD": ALWAYS, "--host": ALWAYS, "--port": ALWAYS, "--max-mib": ALWAYS, "--debug": ALWAYS, "--help": ALWAYS,
    },
    "rewards install": {"NAME": ALWAYS, "--python": ALWAYS, "--debug": ALWAYS, "--help": ALWAYS},
    "bench": {"WHAT": ALWAYS, "--full": ALWAYS, "--out": ALWAYS, "--json": ALWAYS, "--debug": ALWAYS, "--help": ALWAYS},
}  # fmt: skip


def options(command: str) -> set[str]:
    """The names of a command's options and arguments."""
    found = all_commands(typer.main.get_command(load_app()))[command]
    named = {
        p.name.upper().rstrip("_") if p.param_type_name == "argument" else p.opts[-1] for p in found.params
    }
    return {"MODEL" if name == "MODELS" else name for name in named} | {"--help"}


@pytest.mark.parametrize("command", TABLE)
def test_the_table_names_every_option(command):
    """A new option must be thought about: where would it do nothing?"""
    assert set(TABLE[command]) == options(command)


def test_the_table_names_every_command():
    assert set(TABLE) == set(all_commands(typer.main.get_command(load_app())))


@pytest.mark.parametrize(
    ("command", "flag", "case"),
    [
        pytest.param(command, flag, case, id=" ".join(map(str, (command, *case[:-1]))))
        for command, flags in TABLE.items()
        for flag, cases in flags.items()
        for case in cases or ()
    ],
)
def test_an_option_without_effect_is_one_clear_line(run_cli, tiny_run, command, flag, case):
    *args, message = case
    result = run_cli(*command.split(), *args)
    assert result.code == 2, result.out
    assert result.err.startswith("error: ") and message in result.err and result.err.count("\n") == 1
    if command != "doctor" and flag not in ("--set",) and "same run" not in result.err:
        assert f"{flag} has no effect: " in result.err.replace("--no-", "--")
    assert not any(name.startswith("runs") for name in map(str, tiny_run.parent.iterdir()))


def test_what_a_toml_file_says_for_another_use_is_no_error(run_cli, tiny_run):
    """The settings of a run hold an α, which --target-w2 on top of them replaces."""
    made = run_cli(
        "finetune",
        "--config",
        "run/config.toml",
        "--target-w2",
        1,
        "--rounds",
        1,
        "--probe",
        2000,
        "--out",
        "o",
        "--quiet",
    )
    assert made.code == 0, made.err


def test_the_options_of_the_reward_that_the_user_gives_win_over_those_of_the_run(run_cli, tiny_run):
    """Whatever the run's reward was called with, --reward-batch of the command line is the one that counts."""
    from orwcfm_fast.cli.look import reward_options
    from orwcfm_fast.device import resolve_device
    from orwcfm_fast.runs.load import Loader
    from orwcfm_fast.settings import Evaluation

    config = tiny_run / "config.toml"
    config.write_text(config.read_text().replace('clip_model = "ViT-B-32"', 'clip_model = "ViT-L-14"'))
    run = Loader(resolve_device("cpu")).load("run")
    named = Evaluation(reward_batch=7, clip_score="cosine")
    found = reward_options(named, run, ())
    assert (found.reward_batch, found.clip_score, found.clip_model) == (7, "cosine", "ViT-L-14")
    assert found.reward == ["right"]
