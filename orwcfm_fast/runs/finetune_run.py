"""A whole fine-tuning run: load, train, record, save, evaluate. What `orwcfm finetune` calls."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.device import resolve_device
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.errors import Interrupted, RewardError, UserError
from orwcfm_fast.evaluation.held_out import Evaluator, evaluator_for
from orwcfm_fast.method.callbacks import Progress, ReportProgress
from orwcfm_fast.method.samplers import times as solver_times
from orwcfm_fast.reporting.tracking import Log, check_loggers, loggers
from orwcfm_fast.rewards import RewardSum, check_code_named, make_holdout, make_reward
from orwcfm_fast.rewards.identity import record_code
from orwcfm_fast.runs import closing_evaluation, drift_control
from orwcfm_fast.runs.artifacts import RunArtifacts
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.checkpointing import CheckpointManager
from orwcfm_fast.runs.interrupt import DEADLINE, SignalHandler, StopRequested
from orwcfm_fast.runs.load import Loaded, Loader, Watch
from orwcfm_fast.runs.resolve import anchored, resolved, run_name
from orwcfm_fast.runs.result import Result
from orwcfm_fast.runs.resume import MAY_CHANGE, restarted_settings
from orwcfm_fast.runs.rounds import Rounds
from orwcfm_fast.runs.run import ReadOnlyRun, Run, next_run_path, resume_command, resumed_settings
from orwcfm_fast.settings import Finetune
from orwcfm_fast.sharding import gathered


class Finetuning:
    """One run in one directory, new or resumed; made by `prepare`.

    Args:
        settings: resolved: model, data, reward, precision as they will be.
        loaded: the pretrained model, which is also the reference.
        run: its directory.
        ranks: those that work on it; the first writes its files.
    """

    def __init__(
        self, settings: Finetune, loaded: Loaded, run: Run, ranks: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.settings, self.loaded, self.resumed = settings, loaded, False
        self.ranks = ranks
        ranks.spread([*loaded.policy.network.state_dict().values()])

        def make_evaluator() -> tuple[RewardSum, RewardSum | None, Evaluator]:
            reward, holdout = make_reward(settings.reward, settings), make_holdout(settings)
            return reward, holdout, evaluator_for(loaded.policy.data, reward, reward.name, holdout)

        # what it trains, the others find in the cache
        reward, holdout, self.evaluator = ranks.in_turn(make_evaluator)
        self.trainer = build_trainer(
            loaded.policy,
            reward,
            settings,
            holdout=holdout,
            features=self.evaluator.features,
            ranks=ranks,
        )
        self.reference = self.trainer.reference
        self.controller = self.trainer.find(RunController)
        self.last_wait = 0.0  # seconds for the last checkpoint, which no round is trained beside
        self._work_in(run)

    def _work_in(self, run: Run) -> None:
        self.run, self.checkpoints = run, CheckpointManager(run, self.trainer, self.ranks)
        self.artifacts = RunArtifacts(run, self.trainer, self.evaluator)

    @classmethod
    def prepare(
        cls,
        settings: Finetune | None,
        given: dict[str, Any],
        *,
        resume: Path | None = None,
        out: Path | None = None,
        overwrite: bool = False,
        watch_pretraining: Watch | None = None,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> "Finetuning":
        """Check everything that can be checked, load the model, make the directory.

        Args:
            settings: of a new run; None with `resume`.
            given: the settings that the user set by hand.
            resume: a run to go on with.
            ranks: all of which call this.

        Raises:
            UserError: anything wrong with what the user gave; nothing is left behind.
        """
        if settings and (before := restarted_settings(settings, out, overwrite)):
            resume, given = out, before
        if resume:
            run = Run(resume)
            settings = resumed_settings(run, Finetune, given, MAY_CHANGE)
            for key in ("reward", "holdout_reward"):
                check_code_named(getattr(settings, key), given.get(key, []), run.config, key)
        assert settings is not None
        ranks.check_same(settings.model_dump() | checkpoint.versions() | {"--out": out, "--resume": resume})
        solver_times(settings.nfe, settings.solver, settings.grid)
        check_loggers(settings.log)
        device = ranks.device(resolve_device(settings.device))
        if settings.reward:
            ranks.in_turn(lambda: make_reward(settings.reward, settings))
        ranks.in_turn(lambda: make_holdout(settings))
        loader = Loader(
            device, settings.precision, settings.model, settings.data, watch_pretraining, settings, given
        )
        if resume:
            started = checkpoint.is_checkpoint(run.reference)  # else it was killed before its first round
            spec = str(run.reference) if started else settings.checkpoint
            return cls.go_on(settings, ranks.in_turn(lambda: loader.load(spec)), run, ranks)
        spec = settings.checkpoint
        loaded = ranks.in_turn(lambda: loader.start(spec))
        return cls.begin(settings, loaded, out, overwrite, ranks)

    @classmethod
    def begin(
        cls,
        settings: Finetune,
        loaded: Loaded,
        out: Path | None = None,
        overwrite: bool = False,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> "Finetuning":
        """A new run of a model that is loaded."""
        settings = resolved(settings, loaded)
        ranks.check_same(settings.model_dump())
        path = ranks.from_first(lambda: out or next_run_path(run_name(settings)))
        task = cls(settings, loaded, Run(path), ranks)
        with ranks.together():
            task._work_in(Run.create(path, overwrite) if ranks.first else ReadOnlyRun(path))
        try:
            with ranks.together():
                task._begin()
        except BaseException:
            task.run.discard()
            raise
        return task

    @classmethod
    def go_on(
        cls, settings: Finetune, loaded: Loaded, run: Run, ranks: ProcessGroup = SINGLE_PROCESS
    ) -> "Finetuning":
        """A run that exists, from its newest checkpoint; `loaded` is its reference."""
        run = run if ranks.first else ReadOnlyRun(run.path)
        with ranks.together():
            run.lock()
        try:
            task = cls(settings, loaded, run, ranks)
            task._go_on()
        except BaseException:
            run.unlock()
            raise
        return task

    def notes(self) -> list[str]:
        """What the user should know before the first round."""
        if not self.resumed:
            return self.about()
        more = f" and {len(self.trainer.current.losses)} steps" if self.trainer.current else ""
        return [*self.about(), f"resumed after round {self.trainer.round}{more}"]

    def about(self) -> list[str]:
        """What is run, in words."""
        s = self.settings
        rounds = f"{s.rounds} round{'s' * (s.rounds > 1)}"
        lines = [
            f"{s.method}, {anchored(s)} τ={s.tau:g} {s.weights} weights, {s.coupling} coupling; "
            f"{rounds} of {s.rollout} samples ({s.solver}, {s.nfe} evaluations) and {s.steps_per_round} steps of "
            f"{s.batch}; {self.loaded.policy.device}, {s.precision}"
        ]
        if self.evaluator.accuracy is not None:
            held_out = f"{self.evaluator.judged_on:,} held-out real digits"
            lines.append(f"digits classifier: {self.evaluator.accuracy:.1%} on {held_out}")
        return lines

    def _begin(self) -> None:
        """Write what a new run must hold before its first round."""
        # the policy is at its start, in float32; the reference may be held in less
        policy = replace(self.trainer.policy, base_only=self.reference.base_only)
        own = policy.tensors()
        if policy.pipeline:
            own.pop("model", None)  # lies in the pipeline's own folder
        tensors = gathered(own, keep=self.ranks.first)
        if not self.ranks.first:
            return
        self.run.write_config("finetune", self.settings)
        self._record_code()
        self.run.samples.mkdir(exist_ok=True)
        checkpoint.save(self.run.reference, {"kind": "reference", **policy.describe()}, **tensors)
        self.artifacts.save_round_samples()

    def _record_code(self) -> None:
        record_code([*self.settings.reward, *self.settings.holdout_reward], self.run.path)

    def _go_on(self) -> None:
        """Go on from the newest whole checkpoint; rounds after it are forgotten."""
        self.resumed = True
        newest = self.checkpoints.newest(set_aside=True)
        if newest:
            self.checkpoints.restore(newest)
        if (done := self.trainer.round) > self.settings.rounds:
            raise UserError(
                f"--rounds {self.settings.rounds}: the run has done {done} already; name more, or none"
            )
        with self.ranks.together():
            self.run.truncate_metrics(self.trainer.round)
            if not newest:
                self._begin()
            elif self.ranks.first:
                self.run.write_config("finetune", self.settings)
                self._record_code()
                self.artifacts.discard_unreadable_forecast()
                self.checkpoints.prune()  # a kill may have come between the last save and this

    def train(
        self,
        watch: Callable[[Progress], None] | None = None,
        on_round: Log | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """All rounds that are left; each is recorded, saved and shown, `on_line` called with every message.

        Raises:
            WorkError: the reward failed, something became non-finite, or no room is left; says where the run
                is saved.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        on_line = on_line or (lambda text: None)
        self.controller.report_to(on_line)
        s, resume = self.settings, resume_command(self.run, "finetune", self.settings)
        try:
            deadline = DEADLINE if self.ranks.world > 1 else None
            with SignalHandler(f"left at once; {resume}" if self.ranks.first else "", deadline) as signals:
                try:
                    self.trainer.callbacks += [ReportProgress(watch)] if watch else []
                    self.trainer.callbacks.append(signals)
                    logs = s.log if self.ranks.first else []
                    with loggers(logs, self.run.path, self.run.path.name, s.model_dump()) as log:
                        rounds = Rounds(self.run, self.trainer, self.checkpoints, self.artifacts)
                        self.last_wait = rounds.train(log, on_round, on_line)
                except StopRequested:
                    where = f"interrupted {self.trainer.where()}, saved at {self.checkpoints.save_together()}"
                    raise Interrupted(f"{where}; {resume}", signals.exit_code) from None
        except (RewardError, UserError) as error:
            # found while a round was drawn or weighed: the policy is still that of the last whole round
            if self.trainer.round == 0:
                if not self.resumed:
                    with self.ranks.together():
                        self.run.discard()
                raise
            raise type(error)(f"{error}; the run is saved at {self.checkpoints.save_together()}") from error
        except OSError as error:
            self.checkpoints.settle()
            raise self.run.write_failed(error, resume) from error
        finally:
            if sys.exc_info()[0]:
                try:
                    self.checkpoints.settle()
                finally:
                    self.run.unlock()

    def finish(self, began: float, watch: Callable[[Progress], None] | None = None) -> Result | None:
        """Held-out evaluation before and after, the pictures and summary.json; None on all ranks but the first.

        Args:
            watch: called while the settings are trained again with τ = 0, where that is wanted.
        """
        try:
            result = self._finish(began, watch)
            for rewards in self.trainer.rewards():
                rewards.close()
            return result
        except KeyboardInterrupt:
            resume = resume_command(self.run, "finetune", self.settings)
            raise Interrupted(f"interrupted; training is done and saved; to evaluate it: {resume}") from None
        except OSError as error:
            raise self.run.write_failed(error, resume_command(self.run, "finetune", self.settings)) from error
        finally:
            self.run.unlock()

    @property
    def has_drift_control(self) -> bool:
        """Whether `finish` trains the settings again with τ = 0."""
        return self.settings.drift_control and not drift_control.is_idle(self.settings)

    def _finish(self, began: float, watch: Callable[[Progress], None] | None) -> Result | None:
        s, trainer = self.settings, self.trainer
        measured = closing_evaluation.evaluate(trainer, self.evaluator, s, self.has_drift_control, watch)
        with self.ranks.together():
            if not self.ranks.first:
                return None
            # the final policy draws no rollout of its own
            self.checkpoints.closing = closing_evaluation.values(measured[1], s.rollout)
            self.checkpoints.prune()
            records, seconds = self.run.read_metrics(), time.perf_counter() - began
            before, after, *at_rest = measured
            best = self.checkpoints.best()
            result = Result(self.run, s, before, after, records, seconds, best, at_rest, self.last_wait)
            self.artifacts.save_results(
                result, [f"{'+'.join(s.reward)} on {self.loaded.name}", *self.about()]
            )
            return result
