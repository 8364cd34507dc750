"""A whole pretraining run with its directory, checkpoints and a picture; what `orwcfm pretrain` calls."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.data.datasets import load_data, source
from orwcfm_fast.device import resolve_device
from orwcfm_fast.errors import Interrupted, UserError, WorkError
from orwcfm_fast.method.pretrain import Pretrainer
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.reporting.pictures import save_samples
from orwcfm_fast.runs.interrupt import SignalHandler, StopRequested
from orwcfm_fast.runs.run import Run, next_run_path, resume_command, resumed_settings
from orwcfm_fast.runs.trainer_state import restore_pretrainer, save_pretrainer
from orwcfm_fast.settings import Pretrain, Sampling

RESUME_MAY_CHANGE = ("save_every", "device")
CHECKPOINTS_KEPT = 2


class PretrainRun:
    """One pretraining run in one directory, new or resumed."""

    def __init__(self, settings: Pretrain, data: Tensor, run: Run) -> None:
        self.settings, self.run = settings, run
        device = resolve_device(settings.device)
        shape = tuple(data.shape[1:])
        policy = make_policy(settings.model, settings.data, shape, device, settings.precision, settings.seed)
        self.trainer = Pretrainer(policy, data.to(device), settings)
        self._seconds = 0.0
        self._first = 0

    @classmethod
    def new(cls, settings: Pretrain, out: Path | None, overwrite: bool) -> "PretrainRun":
        """Load the data, build the model, make the directory.

        Raises:
            UserError: unknown data or model, missing data, or an occupied directory; nothing is left behind.
        """
        settings = settings.model_copy(update={"model": settings.model or source(settings.data)[0].model})
        device = resolve_device(settings.device)
        data, _ = load_data(settings.data, settings.data_dir)
        if settings.flip and data.dim() != 4:
            raise UserError(f"--flip: mirrors images; '{settings.data}' has vectors")
        # raises if the model does not fit the data, before a directory is made
        make_policy(settings.model, settings.data, tuple(data.shape[1:]), device)
        name = "".join(c if c.isalnum() or c in "-." else "-" for c in settings.data)
        run = Run.create(out or next_run_path(f"pretrain-{name}"), overwrite)
        run.write_config("pretrain", settings)
        run.samples.mkdir(exist_ok=True)
        return cls(settings, data, run)

    @classmethod
    def resume(cls, run: Run, given: dict[str, Any]) -> "PretrainRun":
        """Resume a run.

        Raises:
            UserError: there is no run, it is finished, or `given` changes a setting that may not change.
        """
        settings = resumed_settings(run, Pretrain, given, RESUME_MAY_CHANGE)
        data, _ = load_data(settings.data, settings.data_dir)
        run.lock()
        try:
            task = cls(settings, data, run)
            retention.sweep(run.checkpoints)
            newest = retention.load_newest(run.checkpoints, set_aside=True)
            if newest is not None:
                restore_pretrainer(task.trainer, newest)
                retention.prune(run.checkpoints, CHECKPOINTS_KEPT)  # a kill may have come after the last save
            if task.trainer.steps >= settings.steps:
                raise UserError(f"--resume {run.path}: already finished, at step {task.trainer.steps}")
            run.truncate_metrics(task.trainer.steps, "step")
            run.samples.mkdir(exist_ok=True)
        except BaseException:
            run.unlock()
            raise
        task._first = task.trainer.steps
        return task

    def train(self, watch: Callable[[int, float], None]) -> float:
        """Train to the last step, with checkpoints on the way, and return the last loss.

        Args:
            watch: called with step and loss.

        Raises:
            WorkError: the loss is not finite, or a file could not be written.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        began, resume = time.perf_counter(), resume_command(self.run, "pretrain")
        try:
            with SignalHandler(f"left at once; {resume}") as signals:
                try:
                    self.trainer.pause = signals.raise_if_stopped
                    return self._train(watch)
                except StopRequested:
                    where = f"interrupted, saved at {self._save()}"
                    raise Interrupted(f"{where}; {resume}", signals.exit_code) from None
        except OSError as error:
            raise self.run.write_failed(error, resume) from error
        finally:
            self._seconds = time.perf_counter() - began
            self.run.unlock()

    def _train(self, watch: Callable[[int, float], None]) -> float:
        loss = math.nan
        for step, loss in self.trainer.train():
            if not math.isfinite(loss):
                raise WorkError(f"step {step}: the loss is not finite; lower --lr")
            self.run.append({"step": step, "loss": loss})
            watch(step, loss)
            if step == self.settings.steps:
                self._save_samples()  # before the last checkpoint, after which the run counts as finished
            if step % self.settings.save_every == 0 or step == self.settings.steps:
                self._save()
                self.run.delete_replaced()
        return loss

    def _save(self) -> Path:
        path = self.run.checkpoints / f"step_{self.trainer.steps}"
        if not checkpoint.is_checkpoint(path):
            self.run.checkpoints.mkdir(
                exist_ok=True
            )  # an OSError where the run directory was deleted meanwhile
            save_pretrainer(
                self.trainer, path, {"settings": self.settings.model_dump(), "seed": self.settings.seed}
            )
            retention.prune(self.run.checkpoints, CHECKPOINTS_KEPT)
        return path

    def images_per_s(self) -> float:
        """Training samples per second in this process."""
        return (self.trainer.steps - self._first) * self.settings.batch / max(self._seconds, 1e-9)

    @property
    def samples_path(self) -> Path:
        """The picture of the averaged model's samples, written at the end of training."""
        return self.run.samples / "final.png"

    def _save_samples(self) -> None:
        policy = self.trainer.averaged()
        n = 64 if len(policy.shape) == 3 else 2000
        with torch.inference_mode():
            x = policy.decode(sample(policy, start_noise(policy, n, self.settings.seed), Sampling(), 512))
        save_samples(self.samples_path, {f"{n} samples of {self.settings.model} on {self.settings.data}": x})
