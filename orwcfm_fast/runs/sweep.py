"""A grid of fine-tuning runs that start from one loaded model; what `orwcfm sweep` calls."""

import copy
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orwcfm_fast.device import resolve_device
from orwcfm_fast.errors import Interrupted, UserError, WorkError
from orwcfm_fast.files import write_text
from orwcfm_fast.method.callbacks import Progress
from orwcfm_fast.method.samplers import times as solver_times
from orwcfm_fast.reporting.fronts import Outcome, plain_forecast, write_fronts
from orwcfm_fast.reporting.tracking import check_loggers
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.finetune_run import Finetuning
from orwcfm_fast.runs.load import Loaded, Loader, Watch
from orwcfm_fast.runs.resolve import FILLED, resolved, with_model_defaults
from orwcfm_fast.runs.run import Run, is_run, next_run_path, read_command, resume_command
from orwcfm_fast.runs.sweep_grid import check_named, grid, widened
from orwcfm_fast.settings import Finetune, Predict, RewardOptions, Settings, Sweep
from orwcfm_fast.theory.forecast import forecast_many
from orwcfm_fast.theory.prediction import FORECAST_ROUNDS, MANY_PROMPTS, Reference, draw_reference

REWARD_KEYS = [key for key in RewardOptions.model_fields if key not in Settings.model_fields]


class Sweeping:
    """All runs of a grid in one directory; made by `prepare`, which finds the runs that are done.

    Args:
        runs: the resolved settings of each run by its name.
        base: the pretrained model, loaded once; every run trains a copy.
        run: the directory of the sweep, in which every run is a directory.
        new: whether this process made the directory; it is removed, and what it replaced put back, where no run
            begins.
    """

    def __init__(self, settings: Sweep, runs: dict[str, Finetune], base: Loaded, run: Run, new: bool) -> None:
        self.settings, self.runs, self.base, self.run, self.new = settings, runs, base, run, new

    @classmethod
    def prepare(
        cls,
        settings: Sweep,
        given: dict[str, Any],
        out: Path | None = None,
        overwrite: bool = False,
        watch_pretraining: Watch | None = None,
    ) -> "Sweeping":
        """Check the whole grid, load the model, and make the directory or find what is done in it.

        A sweep that exists at `out` continues with its own settings, to which values of α and τ may be added.

        Args:
            settings: of a new sweep.
            given: the settings that the user set, which a sweep that exists must agree with.
            watch_pretraining: called while the digits model is pretrained.

        Raises:
            UserError: a wrong setting, reward, model or directory; nothing is left behind.
        """
        existing = out if out and not overwrite and read_command(out) == "sweep" else None
        if existing:
            settings = widened(existing, given)
        runs = grid(settings)
        if existing:
            check_named(runs, given, existing)
        solver_times(settings.nfe, settings.solver, settings.grid)
        check_loggers(settings.log)
        if settings.reward:
            make_reward(settings.reward, settings)
        s = settings
        loader = Loader(resolve_device(s.device), s.precision, s.model, s.data, watch_pretraining, s, given)
        base = loader.start(s.checkpoint)
        runs = {name: resolved(one, base) for name, one in runs.items()}
        first = next(iter(runs.values()))
        settings = with_model_defaults(settings, first.model)
        settings = settings.model_copy(update={key: getattr(first, key) for key in FILLED})
        if existing:
            run = Run(existing)
            run.lock()
        else:
            stem = "".join(c if c.isalnum() else "-" for c in f"{first.data}-{'+'.join(first.reward)}")
            run = Run.create(out or next_run_path(f"sweep-{stem}"), overwrite)
        task = cls(settings, runs, base, run, new=existing is None)
        run.write_config("sweep", settings)
        return task

    def finished(self) -> list[str]:
        """The names of the runs that are done."""
        return [name for name in self.runs if (self.run.path / name / "summary.json").is_file()]

    def forecast(self) -> str:
        """Forecast every run from common samples of the model, into forecast.json; what was done, as one line."""
        if (prompts := self.base.policy.conditions) and len(prompts) > 1:
            return MANY_PROMPTS
        found = self._forecasts()
        groups: dict[tuple, list[str]] = {}
        for name, s in self.runs.items():
            known = s.target_w2 is None and not s.standardize_rewards  # these cannot be forecast
            if known and name not in found:
                rewards = tuple(str(getattr(s, key)) for key in REWARD_KEYS)
                key = (rewards, s.rounds, s.method, s.weights, s.normalize_weights)
                groups.setdefault(key, []).append(name)
        if not groups:
            return "all runs are forecast already"
        s = self.settings
        how = Predict(solver=s.solver, nfe=s.nfe, grid=s.grid, chunk=s.chunk, seed=s.seed)
        references: dict[tuple, Reference] = {}
        for (rewards, rounds, method, weights, normalize), names in groups.items():
            if rewards not in references:
                own_settings = self.runs[names[0]]
                with self._or_nothing():
                    reward = make_reward(own_settings.reward, own_settings)
                    references[rewards] = draw_reference(self.base.policy, reward, how)
            reference = references[rewards]
            pairs = [(self.runs[name].alpha, self.runs[name].tau) for name in names]
            once = [*dict.fromkeys(pairs)]
            try:
                forecasts = forecast_many(
                    reference.samples, reference.rewards[: how.n], once, min(rounds, FORECAST_ROUNDS),
                    method=method, weighting=weights, normalize=normalize, features=reference.features,
                    scored=reference.rewards, exact_w2=False, seed=s.seed,
                )  # fmt: skip
            except UserError as error:
                return f"no forecast: {error}"
            own = dict(zip(once, map(plain_forecast, forecasts), strict=True))
            found |= {name: own[pair] for name, pair in zip(names, pairs, strict=True)}
        write_text(self.run.forecast, json.dumps(found, indent=1) + "\n")
        return f"{len(found)} runs forecast from {how.n} samples of the model"

    def _forecasts(self) -> dict[str, Any]:
        return json.loads(self.run.forecast.read_text()) if self.run.forecast.is_file() else {}

    def train_all(
        self,
        watch: Callable[[str, float], None] | None = None,
        on_result: Callable[[Outcome], None] | None = None,
    ) -> None:
        """Train every run that is not done, one after the other, and write the fronts after each.

        Args:
            watch: called with the name of a run and the share of it that is done.
            on_result: called with the outcome of each run.

        Raises:
            WorkError: some runs failed; the others are done.
            Interrupted: Ctrl-C or SIGTERM; finished runs stay.
        """
        try:
            with self._or_nothing():
                self._train_each(watch, on_result)
            self.run.delete_replaced()
        finally:
            self.run.unlock()

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Leave nothing behind where a new sweep fails before any run has started."""
        try:
            yield
        except BaseException:
            if self.new and not any(is_run(self.run.path / name) for name in self.runs):
                self.run.discard()
            self.run.delete_replaced()
            raise

    def _train_each(
        self, watch: Callable[[str, float], None] | None, on_result: Callable[[Outcome], None] | None
    ) -> None:
        failed: dict[str, str] = {}
        for name in [n for n in self.runs if n not in self.finished()]:
            try:
                self._train(name, watch)
            except (WorkError, UserError) as error:
                failed[name] = str(error)  # the exception itself would keep the networks of the run in memory
                continue
            except (KeyboardInterrupt, Interrupted) as stopped:
                left = len(self.runs) - len(self.finished())
                raise Interrupted(
                    f"interrupted in run {name}, {left} to go; {self._again()} goes on",
                    getattr(stopped, "code", 130),
                ) from None
            outcomes = self.write()
            if on_result:
                on_result(next(o for o in outcomes if o.path.name == name))
        if failed:
            name, first = next(iter(failed.items()))
            raise WorkError(
                f"{len(failed)} of {len(self.runs)} runs failed, first {name}: {first}; "
                f"{self._again()} tries them again"
            )

    def _again(self) -> str:
        return resume_command(self.run, "sweep", *self.runs.values())

    def _train(self, name: str, watch: Callable[[str, float], None] | None) -> None:
        began, task = time.perf_counter(), self._task(name)
        s = task.settings

        def at(p: Progress) -> None:
            assert watch
            watch(name, (p.round + p.step / s.steps_per_round) / s.rounds)

        try:
            task.train(at if watch else None)
            task.finish(began)
        finally:
            task.run.unlock()

    def _task(self, name: str) -> Finetuning:
        """A new run, or the one that exists."""
        gc.collect()  # the last run's trainer and callbacks refer to each other
        policy = replace(self.base.policy, network=copy.deepcopy(self.base.policy.network))
        loaded = replace(self.base, policy=policy)
        path = self.run.path / name
        if is_run(path):
            return Finetuning.go_on(self.runs[name], loaded, Run(path))
        shutil.rmtree(path, ignore_errors=True)
        return Finetuning.begin(self.runs[name], loaded, path)

    def write(self) -> list[Outcome]:
        """Write fronts.csv, fronts.png and report.html of the runs that are done; their outcomes."""
        forecasts = self._forecasts()
        outcomes = [Outcome.read(self.run.path / name, forecasts.get(name)) for name in self.finished()]
        if outcomes:
            write_fronts(self.run.path, self.settings, outcomes)
        return outcomes
