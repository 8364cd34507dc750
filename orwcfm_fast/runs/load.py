"""The policy that MODEL names on the command line: a run, a checkpoint, a foreign weight file or a preset."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.checkpoints.shipped import shipped
from orwcfm_fast.checkpoints.torch_files import describe_weights, named_for, read_weights
from orwcfm_fast.data.datasets import load_data, source
from orwcfm_fast.device import cache_dir
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.pretrain import pretrain
from orwcfm_fast.networks.flow.library import is_pipeline
from orwcfm_fast.networks.lora import START, TRAINED, has_adapter, peft
from orwcfm_fast.networks.models import MODELS
from orwcfm_fast.networks.policy import LORA_FILES, Policy, make_policy
from orwcfm_fast.runs.run import Run, is_run, newest_run
from orwcfm_fast.runs.trainer_state import save_pretrainer
from orwcfm_fast.settings import Conditioned, Finetune, Pretrain

DEFAULT = "unet-digits"
FOREIGN_DATA = {
    "unet-cifar10": "cifar10", "unet-mnist": "mnist", "unet-mnist-small": "mnist", DEFAULT: "digits",
}  # fmt: skip
PRETRAINED = {name: data for name, data in FOREIGN_DATA.items() if name == DEFAULT or shipped(name)}
"""Presets that need no checkpoint, and their data: one is trained on first use, others ship."""
WEIGHTS = ("model", "ema", *chain(*LORA_FILES.values()))
Watch = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Loaded:
    """A policy, how to name it to the user, and the run it belongs to, if any."""

    policy: Policy
    name: str
    run: Run | None = None


@dataclass(frozen=True)
class Loader:
    """How to load: where to, in what precision, and what a foreign file does not say itself.

    Args:
        how: prompts, guidance and sizes of a diffusers pipeline.
        given: settings that the user named, whose model and data must be those that are started from; a recipe's
            need not.
    """

    device: torch.device
    precision: str = "auto"
    model: str = ""
    data: str = ""
    watch: Watch | None = None
    how: Conditioned = field(default_factory=Conditioned)
    given: Collection[str] = ()

    def load(self, spec: str = "") -> Loaded:
        """The policy that `spec` names; without one the newest run under ./runs, else the digits model.

        Raises:
            UserError: nothing of that name; a file that is damaged, hostile or of another architecture.
        """
        spec = spec or (self.model if is_pipeline(self.model) else "")
        if is_pipeline(spec):
            policy = self._continued(self.pipeline(spec))
            return Loaded(policy, policy.model)
        if not spec:
            newest = newest_run()
            return self._run(newest) if newest else self.default()
        path = Path(spec)
        if path.is_dir():
            if is_run(path):
                return self._run(path)
            if checkpoint.is_checkpoint(path):
                return self._checkpoint(path)
            raise UserError(f"checkpoint {spec}: this folder is neither a run nor a checkpoint of orwcfm")
        if path.is_file():
            return self.foreign(path)
        if spec in PRETRAINED:
            return self.pretrained(spec)
        if spec in MODELS.names():
            raise UserError(
                f"model '{spec}': no pretrained weights ship with it; orwcfm pretrain --model {spec}, or name a file"
            )
        raise UserError(f"checkpoint {spec}: no such run, checkpoint, file or preset (orwcfm list models)")

    def start(self, checkpoint: str) -> Loaded:
        """What fine-tuning starts from: the checkpoint, the pipeline that is the model, else the digits model.

        Raises:
            UserError: as `load`; it is not of the model or data that the user named.
        """
        if isinstance(self.how, Finetune) and self.how.lora:
            peft()  # before anything is loaded or pretrained
        if is_pipeline(self.model):
            return self.load(checkpoint)
        loaded = self.load(checkpoint) if checkpoint else None
        preset = next((k for k, data in PRETRAINED.items() if self.model == k or self.data == data), DEFAULT)
        own = {"model": preset, "data": PRETRAINED[preset]}
        if loaded:
            own = {"model": loaded.policy.model, "data": loaded.policy.data}
        for key in (k for k in own if k in self.given):
            value = getattr(self, key)
            if value in ("", own[key]):
                continue
            if loaded:
                raise UserError(
                    f"--{key} {value}: checkpoint {checkpoint} is of {own[key]}; leave --{key} out"
                )
            raise UserError(
                f"--{key} {value}: needs a model trained on it: orwcfm pretrain --{key} {value} --out DIR, then "
                "orwcfm finetune --checkpoint DIR"
            )
        return loaded or self.pretrained(preset)

    def _run(self, path: Path) -> Loaded:
        found = retention.load_newest(path / "checkpoints", only=WEIGHTS)
        if found is None:
            raise UserError(f"run {path}: no checkpoint in it yet")
        return Loaded(self._policy(found), str(path), Run(path))

    def _checkpoint(self, path: Path) -> Loaded:
        return Loaded(self._policy(checkpoint.load(path, only=WEIGHTS)), str(path))

    def _policy(self, found: checkpoint.Checkpoint) -> Policy:
        path = found.path
        try:
            model, data = str(found.state["model"]), str(found.state["data"])
            shape = tuple(int(n) for n in found.state["shape"])
            largest = 2**31 if is_pipeline(model) else 4096  # a pipeline's samples may be flat
            if not 0 < len(shape) < 5 or not all(0 < n <= largest for n in shape):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"checkpoint {path}: state.json does not say which model it holds") from None
        if is_pipeline(model):
            return self._tuned(found, model)
        weights = found.tensors.get("ema") or found.tensors.get("model")
        if not weights:
            raise UserError(f"checkpoint {path}: holds no weights")
        policy = make_policy(model, data, shape, self.device, self.precision)
        checkpoint.load_weights(policy.network, weights, f"checkpoint {path}")
        return policy

    def pipeline(self, model: str, saved: dict[str, Any] | None = None, frozen: bool = True) -> Policy:
        """A policy of a diffusers pipeline; its weights are not `frozen` where all of them will be trained."""
        from orwcfm_fast.networks.flow.loading import load_pipeline

        how = self.how
        if isinstance(how, Finetune):
            frozen = frozen and bool(how.lora or how.lora_init)
            if saved:  # a run that goes on has its prompts with it
                how = how.model_copy(update={"prompts": "", "eval_prompts": ""})
        return load_pipeline(model, how, self.device, self.precision, saved, frozen)

    def _tuned(self, found: checkpoint.Checkpoint, model: str) -> Policy:
        """A pipeline with what a run made of it: adapters, all weights, or (the run's reference) nothing."""
        with checkpoint.reading(found):
            policy = self.pipeline(model, found.state["pipeline"], "model" not in found.tensors)
            where = f"checkpoint {found.path}"
            if weights := found.tensors.get("model"):
                checkpoint.load_weights(policy.network, weights, where)
            policy.add_adapters(found.tensors, found.state.get("metadata", {}), where)
        if isinstance(self.how, Finetune) and {"model", *LORA_FILES[TRAINED]} & found.tensors.keys():
            raise UserError(f"{where}: fine-tuned already; go on with --resume, or start from {model}")
        return self._continued(policy)

    def _continued(self, policy: Policy) -> Policy:
        """With the published adapters that the run continues, unless it brings them with it."""
        files = self.how.lora_init if isinstance(self.how, Finetune) else []
        if files and not has_adapter(policy.network, START):
            from orwcfm_fast.networks.flow.published import load_published

            load_published(policy, files)
        return policy

    def foreign(self, path: Path) -> Loaded:
        """Weights that another program wrote (`read_weights`); a preset of --model, or the first that fits.

        Raises:
            UserError: no weights, or none that fit; says what was found and what is needed.
        """
        weights = read_weights(path)
        problems: list[str] = []
        for name in [self.model] if self.model else [*FOREIGN_DATA]:
            data = self.data or FOREIGN_DATA.get(name, "")
            if not data:
                raise UserError(f"checkpoint {path}: say which data it was trained on with --data")
            shape = source(data)[0].shape or (3, 32, 32)
            policy = make_policy(name, data, shape, self.device, self.precision)
            own = named_for(weights, policy.network.state_dict().keys(), path)
            try:
                checkpoint.load_weights(policy.network, own, f"checkpoint {path} as '{name}'")
            except UserError as error:
                problems.append(str(error))
                continue
            return Loaded(policy, str(path))
        if self.model:
            raise UserError(problems[0])
        raise UserError(
            f"checkpoint {path}: {describe_weights(weights)}, which fits none of {', '.join(FOREIGN_DATA)}; "
            "name its preset with --model (orwcfm list models)"
        )

    def pretrained(self, preset: str) -> Loaded:
        """A model that needs no checkpoint."""
        if folder := shipped(preset):
            return Loaded(self._checkpoint(folder).policy, f"the {preset} model that ships")
        return self.default()

    def default(self) -> Loaded:
        """The digits model, pretrained on first use (about a minute on two cores) and cached."""
        path = cache_dir() / "pretrained" / DEFAULT
        try:
            return Loaded(self._checkpoint(path).policy, f"the cached {DEFAULT} model")
        except UserError:
            settings = Pretrain()
        policy = make_policy(DEFAULT, settings.data, (1, 8, 8), self.device, self.precision)
        data, _ = load_data(settings.data)
        watch = self.watch or (lambda step, steps, loss: None)
        trainer = pretrain(
            policy, data.to(self.device), settings, lambda k, loss: watch(k, settings.steps, loss)
        )
        save_pretrainer(trainer, path)
        return Loaded(self._checkpoint(path).policy, f"the {DEFAULT} model, now cached")
