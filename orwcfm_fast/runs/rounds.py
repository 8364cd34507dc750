"""The rounds of a run: each is trained, judged by the guard, recorded and saved."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from orwcfm_fast.checkpoints import retention
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.control.guard import Fault
from orwcfm_fast.errors import WorkError
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.reporting.tracking import Log
from orwcfm_fast.runs.artifacts import RunArtifacts
from orwcfm_fast.runs.checkpointing import CheckpointManager
from orwcfm_fast.runs.run import Run
from orwcfm_fast.sharding import Files


class Rounds:
    """All rounds of one run, from where its trainer stands; every rank has them, the first writes what they leave."""

    def __init__(
        self, run: Run, trainer: Trainer, checkpoints: CheckpointManager, artifacts: RunArtifacts
    ) -> None:
        self.run, self.trainer, self.checkpoints, self.artifacts = run, trainer, checkpoints, artifacts
        self.settings, self.ranks = trainer.settings, trainer.ranks
        self.controller = trainer.find(RunController)

    def train(self, log: Log, on_round: Log | None, on_line: Callable[[str], None]) -> float:
        """All rounds that are left; the seconds that were then waited for the last checkpoint.

        Args:
            log: called with every record, as is on_round; on_line with every message.

        Raises:
            WorkError: the guard ended the run, or a checkpoint could not be written.
        """
        for record in self._accepted_rounds():
            whole = None
            if self._saves:
                with self.trainer.phases("checkpoint"):
                    whole = self.checkpoints.gather()
            with self.ranks.together():
                if self.ranks.first:
                    self._record_round(record, whole, log, on_round, on_line)
                self.trainer.boundary_here()
        began = time.perf_counter()
        with self.ranks.together():
            self.checkpoints.wait()
        return time.perf_counter() - began

    def _record_round(
        self,
        record: dict[str, Any],
        whole: Files | None,
        log: Log,
        on_round: Log | None,
        on_line: Callable[[str], None],
    ) -> None:
        """Write and show what a round leaves; whole: from `CheckpointManager.gather`."""
        self.run.append(record)
        log(record)
        # all that a round leaves is there before its checkpoint, or a kill between the two would lose it
        self.artifacts.save_round_samples()
        lines = self.artifacts.first_round_messages(record) if self.trainer.round == 1 else []
        if self._saves:
            with self.trainer.phases("checkpoint"):
                self.checkpoints.start(whole)
        else:
            self.checkpoints.check()
        if on_round:
            on_round(record)
        for line in lines:
            on_line(line)

    @property
    def _saves(self) -> bool:
        """Whether a checkpoint is written after the round that was just trained."""
        s = self.settings
        return self.trainer.round % s.save_every == 0 or self.trainer.round == s.rounds

    def _accepted_rounds(self) -> Iterator[dict[str, Any]]:
        """The records of the rounds that stand; the others are taken back or end the run, as --guard says."""
        while self.trainer.round < self.settings.rounds:
            try:
                yield self.trainer.one_round()
            except Fault as fault:
                try:
                    if self.settings.guard != "rollback":
                        raise
                    self.controller.roll_back(fault, self._return)
                    whole = self.checkpoints.gather()
                    with self.ranks.together():
                        if self.trainer.round:
                            self.checkpoints.save(whole, anew=True)  # with the α and τ that hold from here on
                except Fault:
                    self.run.append(fault.record)
                    with self.ranks.together():  # its files are written before anyone leaves
                        self.checkpoints.wait()
                        self.run.delete_replaced()
                        good = retention.steps(self.run.checkpoints)
                    where = f"the last good checkpoint is {good[0]}" if good else "no round was good yet"
                    raise WorkError(f"{fault}; stopped, {where}") from None

    def _return(self) -> int:
        """To the newest checkpoint, or the start where there is none; the round it holds."""
        newest = self.checkpoints.newest(every=self.checkpoints.every)
        if newest:
            self.checkpoints.restore(newest)
        else:
            self.trainer.reset()
        self.run.truncate_metrics(self.trainer.round)
        return self.trainer.round
