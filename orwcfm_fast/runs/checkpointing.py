"""The checkpoints of a fine-tuning run: written by the first rank, read by all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.checkpoints.background import BackgroundWriter
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.runs.run import Run, resume_command
from orwcfm_fast.runs.trainer_state import restore_trainer, trained_files, trainer_contents
from orwcfm_fast.sharding import Files, gathered


class CheckpointManager:
    """Saves, loads and prunes the checkpoints of a run; those of whole rounds are written while the next is trained.

    Args:
        run: its directory, locked by this process.
        trainer: whose state is saved.
        ranks: all of which call `newest` and `save_together`.
    """

    def __init__(self, run: Run, trainer: Trainer, ranks: ProcessGroup = SINGLE_PROCESS) -> None:
        self.run, self.trainer, self.ranks, self.settings = run, trainer, ranks, trainer.settings
        self.folder = run.checkpoints
        self.closing: dict[str, float] = {}  # metrics of the final policy, once it is evaluated
        self.writer = BackgroundWriter()
        self.every = self.settings.steps_per_round * self.settings.save_every  # an interruption writes others

    def newest(self, set_aside: bool = False, every: int = 1) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint; the first rank says which it is, and the others read its files too."""
        found = None

        def choose() -> Path | None:
            nonlocal found
            self.wait()
            if set_aside:
                retention.sweep(self.folder)
            found = retention.load_newest(self.folder, set_aside=set_aside, every=every)
            return found.path if found else None

        path = self.ranks.from_first(choose)
        with self.ranks.together():
            return checkpoint.load(path) if path and not self.ranks.first else found

    def gather(self) -> Files | None:
        """Copies of what is trained, brought together where it is in shards, else None; called on all ranks."""
        return gathered(trained_files(self.trainer), keep=self.ranks.first) if self.settings.shard else None

    def start(self, whole: Files | None) -> None:
        """Copy what is trained so far and begin to write it, once the checkpoint before it is written.

        The thread touches nothing but the copy and its own new folder: code of users changes the working directory
        and the module path meanwhile.

        Args:
            whole: from `gather`.

        Raises:
            WorkError: the one before it could not be written.
        """
        self.wait()
        path = self.path.absolute()
        if self.ranks.first and not checkpoint.is_checkpoint(path):
            state, files = self._contents(whole)
            files = checkpoint.copied(files) if whole is None else files

            def write() -> None:
                os.stat(path.parent)  # a run that is taken away meanwhile is not made again
                checkpoint.save(path, state, **files)

            self.writer.start(write)

    def save(self, whole: Files | None, anew: bool = False) -> Path:
        """Write what is trained so far before anything else happens; the path of the checkpoint.

        Args:
            whole: from `gather`.
            anew: in place of one that is there.

        Raises:
            WorkError: it could not be written.
        """
        self.settle()  # a failure of the checkpoint before this one counts no more
        path = self.path
        if self.ranks.first and (anew or not checkpoint.is_checkpoint(path)):
            state, files = self._contents(whole)
            with self._failures():
                checkpoint.save(path, state, **files)
            self._written()
        return path

    def wait(self) -> None:
        """Wait for the checkpoint that was begun, and prune.

        Raises:
            WorkError: it could not be written.
        """
        with self._failures():
            written = self.writer.wait()
        if written:
            self._written()

    def check(self) -> None:
        """Raise as `wait` what a write that has ended by now raised; does not wait."""
        if self.writer.done:
            self.wait()

    def settle(self) -> None:
        """Wait for the checkpoint that was begun, whether it can be written or not."""
        with suppress(Exception):
            self.wait()

    @property
    def path(self) -> Path:
        """Where a checkpoint of what is trained so far lies."""
        return self.folder / f"step_{self.trainer.steps_taken}"

    def _contents(self, whole: Files | None) -> tuple[dict[str, Any], Files]:
        """State and files of a checkpoint; the state is a copy, the tensors are those that are trained."""
        with self._failures():
            self.folder.mkdir(exist_ok=True)  # its parent gone: the run was taken away
        controller, s = self.trainer.find(RunController), self.settings
        more = {"settings": s.model_dump(), "seed": s.seed, **controller.to_state()}
        state, files = trainer_contents(self.trainer, more, whole)
        return json.loads(json.dumps(state)), files

    def _written(self) -> None:
        self.prune()
        self.run.delete_replaced()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.run.write_failed(error, resume_command(self.run, "finetune", self.settings)) from error

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint, with the α, τ and batch sizes that were in force.

        Raises:
            UserError: it is of another kind or another model.
        """
        self.trainer.find(RunController).restore(found.state, str(found.path))
        restore_trainer(self.trainer, found)

    def save_together(self) -> Path:
        """`save`, for which all ranks wait: a launcher ends the others as soon as one leaves."""
        self.trainer.gather_anchors()
        whole = self.gather()
        with self.ranks.together():
            return self.save(whole)

    def prune(self) -> None:
        """Keep what `--keep` and `--best` say."""
        retention.prune(self.folder, self.settings.keep, self.best(), self.every)

    def best(self) -> Path | None:
        """The checkpoint with the best value of the chosen metric."""
        s = self.settings
        if s.best == "none":
            return None
        records = self.run.read_metrics()
        return retention.best_step(
            self.folder, records, s.best, lambda n: n * s.steps_per_round, self.every, self.closing
        )
