"""A whole pretraining run: data, model, directory, checkpoints, a picture. What `orwcfm pretrain` calls."""

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
from orwcfm_fast.settings import Pretrain, Sampling

RESUME_MAY_CHANGE = ("save_every", "device")
KEEP = 2


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
            UserError: unknown data or model, data not there, a directory in the way; nothing is left behind.
        """
        settings = settings.model_copy(update={"model": settings.model or source(settings.data)[0].model})
        device = resolve_device(settings.device)
        data, _ = load_data(settings.data, settings.data_dir)
        if settings.flip and data.dim() != 4:
            raise UserError(f"--flip: mirrors images; '{settings.data}' has vectors")
        make_policy(
            settings.model, settings.data, tuple(data.shape[1:]), device
        )  # fits, before a directory is made
        name = "".join(c if c.isalnum() or c in "-." else "-" for c in settings.data)
        run = Run.create(out or next_run_path(f"pretrain-{name}"), overwrite)
        run.write_config("pretrain", settings)
        run.samples.mkdir(exist_ok=True)
        return cls(settings, data, run)

    @classmethod
    def resume(cls, run: Run, given: dict[str, Any]) -> "PretrainRun":
        """Go on with a run.

        Raises:
            UserError: no run there, or a setting that may not change.
        """
        settings = resumed_settings(run, Pretrain, given, RESUME_MAY_CHANGE)
        data, _ = load_data(settings.data, settings.data_dir)
        run.lock()
        try:
            task = cls(settings, data, run)
            retention.sweep(run.checkpoints)
            newest = retention.load_newest(run.checkpoints, set_aside=True)
            if newest is not None:
                task.trainer.restore(newest)
                retention.prune(run.checkpoints, KEEP)  # a kill may have come between the last save and this
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
        """To the last step, with checkpoints on the way; the last loss reported.

        Raises:
            WorkError: the loss is not finite, or no room is left.
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
                self._picture()  # before the last checkpoint, which says that all is there
            if step % self.settings.save_every == 0 or step == self.settings.steps:
                self._save()
                self.run.delete_replaced()
        return loss

    def _save(self) -> Path:
        path = self.run.checkpoints / f"step_{self.trainer.steps}"
        if not checkpoint.is_checkpoint(path):
            self.run.checkpoints.mkdir(exist_ok=True)  # its parent gone: the run was taken away
            self.trainer.save(path, {"settings": self.settings.model_dump(), "seed": self.settings.seed})
            retention.prune(self.run.checkpoints, KEEP)
        return path

    def images_per_s(self) -> float:
        return (self.trainer.steps - self._first) * self.settings.batch / max(self._seconds, 1e-9)

    @property
    def picture(self) -> Path:
        """Samples of the averaged model, there once training is done."""
        return self.run.samples / "final.png"

    def _picture(self) -> None:
        policy = self.trainer.averaged()
        n = 64 if len(policy.shape) == 3 else 2000
        with torch.inference_mode():
            x = policy.decode(sample(policy, start_noise(policy, n, self.settings.seed), Sampling(), 512))
        save_samples(self.picture, {self.settings.data: x})
