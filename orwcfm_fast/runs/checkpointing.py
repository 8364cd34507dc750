"""The checkpoints of a fine-tuning run: written by the first rank, read by all."""

from pathlib import Path
from typing import Any

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.checkpoints.background import BackgroundWriter
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.runs.run import Run, resume_command
from orwcfm_fast.runs.trainer_state import restore_trainer, trainer_contents

Files = dict[str, checkpoint.Tensors]


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

    def start(self, anew: bool = False) -> Path:
        """Copy what is trained so far and begin to write it, once the checkpoint before it is written.

        Args:
            anew: in place of one that is there.

        Returns:
            Its path; that of the one which is there, where it is not written anew.

        Raises:
            WorkError: the one before it could not be written.
        """
        path = self.folder / f"step_{self.trainer.steps_taken}"
        if not self.ranks.first:
            return path
        self.wait()
        if anew or not checkpoint.is_checkpoint(path):
            controller, s = self.trainer.find(RunController), self.settings
            more = {"settings": s.model_dump(), "seed": s.seed, **controller.to_state()}
            state, files = trainer_contents(self.trainer, more)
            files, records = checkpoint.copied(files), self.run.read_metrics()
            self.writer.start(lambda: self._write(path, state, files, records))
        return path

    def _write(self, path: Path, state: dict[str, Any], files: Files, records: retention.Records) -> None:
        self.folder.mkdir(exist_ok=True)  # its parent gone: the run was taken away
        checkpoint.save(path, state, **files)
        self.prune(records)
        self.run.delete_replaced()

    def wait(self) -> None:
        """Until the checkpoint that was begun is written.

        Raises:
            WorkError: it could not be.
        """
        try:
            self.writer.wait()
        except OSError as error:
            raise self.run.write_failed(error, resume_command(self.run, "finetune", self.settings)) from error

    def save(self, anew: bool = False) -> Path:
        """`start` and `wait`."""
        path = self.start(anew)
        self.wait()
        return path

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
        with self.ranks.together():
            return self.save()

    def prune(self, records: retention.Records) -> None:
        """Keep what `--keep` and `--best` say, by the records of the run's rounds."""
        retention.prune(self.folder, self.settings.keep, self.best(records), self.every)

    def best(self, records: retention.Records) -> Path | None:
        """The checkpoint with the best value of the chosen metric."""
        s = self.settings
        if s.best == "none":
            return None
        return retention.best_step(
            self.folder, records, s.best, lambda n: n * s.steps_per_round, self.every, self.closing
        )
