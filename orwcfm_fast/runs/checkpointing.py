"""The checkpoints of a fine-tuning run: written by the first rank, read by all."""

from pathlib import Path

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.runs.run import Run, resume_command
from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer


class CheckpointManager:
    """Saves, loads and prunes the checkpoints of a run.

    Args:
        run: its directory, locked by this process.
        trainer: whose state is saved.
        ranks: all of which call `newest` and `save_together`.
    """

    def __init__(self, run: Run, trainer: Trainer, ranks: ProcessGroup = SINGLE_PROCESS) -> None:
        self.run, self.trainer, self.ranks, self.settings = run, trainer, ranks, trainer.settings
        self.folder = run.checkpoints
        self.closing: dict[str, float] = {}  # metrics of the final policy, once it is evaluated
        self.every = self.settings.steps_per_round * self.settings.save_every  # an interruption writes others

    def newest(self, set_aside: bool = False, every: int = 1) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint; the first rank says which it is, and the others read its files too."""
        found = None

        def choose() -> Path | None:
            nonlocal found
            if set_aside:
                retention.sweep(self.folder)
            found = retention.load_newest(self.folder, set_aside=set_aside, every=every)
            return found.path if found else None

        path = self.ranks.from_first(choose)
        with self.ranks.together():
            return checkpoint.load(path) if path and not self.ranks.first else found

    def save(self, anew: bool = False) -> Path:
        """A checkpoint of what is trained so far; its path. `anew`: in place of one that is there.

        Raises:
            WorkError: it could not be written.
        """
        path = self.folder / f"step_{self.trainer.steps_taken}"
        if self.ranks.first and (anew or not checkpoint.is_checkpoint(path)):
            try:
                self.folder.mkdir(exist_ok=True)  # its parent gone: the run was taken away
                self.write(path)
                self.prune()
            except OSError as error:
                raise self.run.write_failed(
                    error, resume_command(self.run, "finetune", self.settings)
                ) from error
        return path

    def write(self, path: Path) -> None:
        """The state of trainer and controller."""
        controller = self.trainer.find(RunController)
        more = {"settings": self.settings.model_dump(), "seed": self.settings.seed, **controller.to_state()}
        save_trainer(self.trainer, path, more)

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
            path = self.save()
            self.run.delete_replaced()
        return path

    def prune(self) -> None:
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
