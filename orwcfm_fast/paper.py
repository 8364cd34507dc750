"""The paper's API: `ORWCFMTrainer` with a dict of settings, on top of the trainer that the commands use."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.torch_files import OTHER_KEYS, named_for, read_weights
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.device import resolve_device, resolve_precision
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.models import build_network
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.registry import unknown
from orwcfm_fast.reporting.tracking import check_loggers, loggers
from orwcfm_fast.rewards import make_holdout, make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import FOREIGN_DATA
from orwcfm_fast.runs.trainer_state import save_trainer
from orwcfm_fast.settings import Finetune, build

RENAMED = {
    "learning_rate": "lr",
    "warmup_steps": "warmup",
    "w2_coefficient": "alpha",
    "temperature": "tau",
    "grad_clip": "grad_clip",
    "batch_size": "batch",
}
PAPER_KEYS = ("text_prompts", "use_wandb", "wandb_project", "run_name", "savedir", "ref_path", "reward")
PAPER_DEFAULTS = {
    "lr": 2e-4,
    "warmup": 5000,
    "batch": 64,
    "method": "orw",
    "normalize_weights": False,
    "cooldown": 0.0,
    "precision": "fp32",
}
WITHOUT_EFFECT = {"device", "checkpoint", "model", "data", "rounds", "steps_per_round", "rollout"}
WITHOUT_EFFECT |= {"save_every", "keep", "best", "eval_n"}


def settings_from(config: dict[str, Any]) -> Finetune:
    """Settings from a dict with the keys of the paper's README; settings of orwcfm may be added under their own names.

    Weights are exp(τ·r), not normalised, as in the paper. Without `reward`, `text_prompts` (what the image should
    show, and what it should not) selects the CLIP reward.

    Raises:
        UserError: a key is unknown (the message names the nearest), or a value is out of bounds.
    """
    known = [*RENAMED, *PAPER_KEYS, *(k for k in Finetune.model_fields if k not in WITHOUT_EFFECT)]
    for key in config:
        if key not in known:
            raise UserError(str(unknown("key", key, known)))
    values: dict[str, Any] = dict(PAPER_DEFAULTS)
    values |= {
        RENAMED.get(key, key): value
        for key, value in config.items()
        if key in RENAMED or key not in PAPER_KEYS
    }
    if config.get("reward") is not None:
        if not callable(config["reward"]):
            values["reward"] = (
                [config["reward"]] if isinstance(config["reward"], str) else list(config["reward"])
            )
    elif config.get("text_prompts"):
        prompts = list(config["text_prompts"])
        if len(prompts) != 2:
            raise UserError(
                f"text_prompts: should be two, what the image should show and what it should not; got {len(prompts)}"
            )
        values |= {"reward": ["clip"], "prompt": prompts[:1], "negative": prompts[1:]}
    if config.get("use_wandb") and find_spec("wandb"):
        values["log"] = [f"wandb:{config.get('wandb_project') or 'orwcfm'}"]
    elif config.get(
        "use_wandb"
    ):  # the paper's dict has it by default, so that refusing the run would be too strict
        print(
            "warning: wandb is not installed (pip install 'orwcfm-fast[wandb]'); continuing without it",
            file=sys.stderr,
        )
    if values.get("guard") == "rollback":
        raise UserError(
            "guard: rollback needs the checkpoints of a run directory; with this trainer use warn, stop or off"
        )
    return build(Finetune, values)


class ORWCFMTrainer:
    """Fine-tunes `model`, a velocity network v(t, x), as in the paper's README.

    Args:
        model: torchcfm's UNetModelWrapper or any module v(t [B], x [B, *shape]).
        config: see `settings_from`; `reward` may be a callable from samples [B, …] to [B] numbers.
        device: torch device or its name.
        shape: of one sample; by default that of the preset with the same weights, else (3, 32, 32).
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        device: torch.device | str = "cpu",
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.config, self.settings = dict(config), settings_from(config)
        check_loggers(self.settings.log)
        self.device = resolve_device(str(device))
        reward = config.get("reward")
        if reward is None and not self.settings.reward:
            raise UserError("config: no reward; give it 'reward', or 'text_prompts' for CLIP")
        self.reward = make_reward(reward if callable(reward) else self.settings.reward, self.settings)
        self.model = model.to(self.device).eval()
        name, self.shape = _recognise(model)
        self.shape = shape or self.shape
        self.policy = Policy(
            self.model, self.shape, name, FOREIGN_DATA.get(name, ""),
            resolve_precision(self.settings.precision, self.device, sum(p.numel() for p in model.parameters())),
        )  # fmt: skip
        self.trainer: Trainer | None = None
        self.history: list[dict[str, Any]] = []

    def load_pretrained(self, path: str | Path) -> None:
        """Load `net_model` of a torchcfm checkpoint, or `ema_model` if it has no other; this is the reference as well.

        Raises:
            UserError: there is no such file, or it holds another architecture.
        """
        weights = read_weights(path, keys=("net_model", "ema_model", *OTHER_KEYS))
        own = named_for(weights, self.model.state_dict().keys(), path)
        checkpoint.load_weights(self.model, own, f"checkpoint {path}")
        self.trainer = None

    def train(self, num_epochs: int, steps_per_epoch: int) -> list[dict[str, Any]]:
        """`num_epochs` rounds of `steps_per_epoch` steps, each on a fresh rollout of batch · steps samples.

        Returns:
            the record of each round, with the keys of metrics.jsonl.
        """
        if self.trainer is not None and self.settings.steps_per_round != steps_per_epoch:
            raise UserError(
                f"steps_per_epoch: this trainer has {self.settings.steps_per_round}; make a new one to change it"
            )
        if self.trainer is None:
            rollout = self.settings.batch * steps_per_epoch
            update = {"steps_per_round": steps_per_epoch, "rollout": rollout, "rounds": num_epochs}
            self.settings = build(Finetune, self.settings.model_dump() | update)
            self.trainer = build_trainer(
                self.policy, self.reward, self.settings, reward_name=self.reward.name,
                holdout=make_holdout(self.settings),
            )  # fmt: skip
            self.trainer.find(RunController).report_to(lambda text: print(text, flush=True))
        s, name = self.settings, self.config.get("run_name") or "orwcfm"
        with loggers(s.log, Path(self.config.get("savedir") or "."), name, s.model_dump()) as log:
            for record in self.trainer.train(self.trainer.round + num_epochs):
                self.history.append(record)
                log(record)
                print(
                    f"epoch {record['round']}: reward {record['reward_mean']:.4g}, loss {record['loss_fm']:.4g}, "
                    f"W2 {record['w2_coupled']:.3g}, ESS {record['ess']:.0f}",
                    flush=True,
                )
        return self.history

    def save_checkpoint(self, path: str | Path) -> Path:
        """Save a `.pt` file with the paper's keys if the name ends in .pt, else a checkpoint directory."""
        path = Path(path)
        if self.trainer is None:
            raise UserError("save_checkpoint: nothing trained yet; call train first")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".pt":
            save_trainer(
                self.trainer, path, {"settings": self.settings.model_dump(), "seed": self.settings.seed}
            )
            return path
        weights = self.policy.weights()
        found = {
            "net_model": weights,
            "last_policy": weights,  # after a round, the next behaviour policy is the current one
            "optim": self.trainer.optimizer.optimizer.state_dict(),
            "sched": {
                k: v for k, v in self.trainer.optimizer.schedule.state_dict().items() if k != "lr_lambdas"
            },
            "config": {k: v for k, v in self.config.items() if not callable(v)},
        }
        beside = path.with_name(f".{path.name}.part")
        torch.save(found, beside)
        beside.replace(path)
        return path


def _recognise(model: nn.Module) -> tuple[str, tuple[int, ...]]:
    """Preset and sample shape of a network, found by the shapes of its parameters."""
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    for name, shape in (
        ("unet-cifar10", (3, 32, 32)),
        ("unet-mnist", (1, 28, 28)),
        ("unet-digits", (1, 8, 8)),
    ):
        with torch.device("meta"):
            own = build_network(name, shape)
        if {k: v.shape for k, v in own.state_dict().items()} == shapes:
            return name, shape
    return "custom", (3, 32, 32)
