"""A run directory: config.toml, metrics.jsonl, checkpoints/, reference/, samples/, summary.json."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orwcfm_fast.checkpoints import retention
from orwcfm_fast.errors import UserError, WorkError, warn
from orwcfm_fast.files import open_regular, read_small, write_text
from orwcfm_fast.rewards import user_code
from orwcfm_fast.runs.lock import LOCK, RunLock
from orwcfm_fast.settings import S, build, read_toml, to_toml

CONFIG, METRICS, SUMMARY, FORECAST = "config.toml", "metrics.jsonl", "summary.json", "forecast.json"
FORMER = {"lora_targets": ["all"], "times": "uniform"}  # what runs had before they recorded these settings
HEADER = "# orwcfm "
MAX_METRICS_BYTES = 1 << 30


class Run:
    """A run directory: the paths of its files, and how they are written and read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG
        self.metrics = self.path / METRICS
        self.summary = self.path / SUMMARY
        self.forecast = self.path / FORECAST
        self.checkpoints = self.path / "checkpoints"
        self.reference = self.path / "reference"
        self.samples = self.path / "samples"
        self._replaced: Path | None = None
        self._own_folder = True
        self._lock: RunLock | None = None

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> "Run":
        """Make and lock the directory. A run that it replaces is kept beside it until `delete_replaced` or `discard`.

        Raises:
            UserError: it exists and is not empty (unless it is a run and `overwrite` is given), cannot be written,
                or another process works in it.
        """
        run = cls(path)
        try:
            if path.exists() and (not path.is_dir() or _has_content(path)):
                if not overwrite:
                    raise UserError(
                        f"--out {path}: exists and is not empty; use --overwrite, or --resume {path}"
                    )
                if not is_run(path):
                    raise UserError(
                        f"--out {path}: not a run, so --overwrite leaves it alone; choose another"
                    )
                old = RunLock(path)
                run._replaced = path.rename(path.with_name(f".{path.name}.{os.getpid()}.replaced"))
                old.release()
            run._own_folder = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            run.lock()
            if _has_content(path):
                raise UserError(f"--out {path}: another process has just started a run there; choose another")
        except OSError as error:
            raise UserError(f"--out {path}: {error.strerror or error}") from None
        return run

    def lock(self) -> None:
        """Lock the directory against every other process until `unlock` or the end of this one.

        Raises:
            UserError: another process holds the lock; the message names it.
        """
        try:
            self._lock = RunLock(self.path)
        except OSError as error:
            raise UserError(f"run {self.path}: {error.strerror or error}") from None

    def unlock(self) -> None:
        if self._lock:
            self._lock.release()
            self._lock = None

    def delete_replaced(self) -> None:
        """Delete the run that this one replaced; called once this one has a result of its own."""
        if self._replaced:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def discard(self) -> None:
        """Remove this run, which has no result, and put back the one it replaced; a folder that was there stays."""
        if self._own_folder:
            shutil.rmtree(self.path, ignore_errors=True)
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self.unlock()
        if self._replaced:
            self._replaced.rename(self.path)
            self._replaced = None

    def write_config(self, command: str, settings: BaseModel) -> None:
        """Write all settings, resolved, as TOML that --config can read."""
        write_text(self.config, f"{HEADER}{command}\n" + to_toml(settings.model_dump()))

    def append(self, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; it is on disk when this returns.

        Raises:
            OSError: it could not be written.
        """
        with self.metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_failed(self, error: OSError, resume: str) -> WorkError:
        """The error to raise after a failed write: which one it was, what is saved, and the command that resumes."""
        newest = next(iter(retention.steps(self.checkpoints)), None)
        saved = f"saved at {newest}; once that is fixed: {resume}" if newest else "no checkpoint is left"
        return WorkError(f"{error.filename or self.path}: {error.strerror or error}; {saved}")

    def read_metrics(self, key: str = "round") -> list[dict[str, Any]]:
        """The records of metrics.jsonl up to the first incomplete line; `key` is the one that each must have."""
        try:
            lines = read_small(self.metrics, MAX_METRICS_BYTES).decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.metrics}: {error.strerror or error}") from None
        records = []
        for line in lines:
            try:
                record = json.loads(line)
                if not isinstance(record[key], int):
                    raise TypeError
            except (ValueError, LookupError, TypeError, RecursionError):
                break  # a crash cut this line off; what follows cannot be trusted
            records.append(record)
        return records

    def truncate_metrics(self, last: int, key: str = "round") -> None:
        """Keep the records up to round (or step) `last`, the one of the checkpoint that training resumes from."""
        kept = {r[key]: r for r in reversed(self.read_metrics(key)) if r[key] <= last}
        if key == "round" and len(kept) < last:
            warn(f"{self.metrics}: damaged, {last - len(kept)} of its first {last} rounds are lost")
        write_text(self.metrics, "".join(json.dumps(r) + "\n" for _, r in sorted(kept.items())))


class ReadOnlyRun(Run):
    """A run as seen by all ranks but the first, which alone writes its files."""

    def lock(self) -> None:
        pass

    def delete_replaced(self) -> None:
        pass

    def discard(self) -> None:
        pass

    def write_config(self, command: str, settings: BaseModel) -> None:
        pass

    def append(self, metrics: dict[str, Any]) -> None:
        pass

    def truncate_metrics(self, last: int, key: str = "round") -> None:
        pass


def _has_content(path: Path) -> bool:
    """Whether a folder holds more than the files of a run that was killed before it wrote its settings."""
    return any(p.name not in (LOCK, f".{CONFIG}.part") for p in path.iterdir())


def read_command(path: Path) -> str:
    """The command that made a run directory (pretrain, finetune or sweep); empty where it is not a run."""
    try:
        with open_regular(path / CONFIG) as file:
            first = file.readline(80).decode()
    except (OSError, UnicodeDecodeError):
        return ""
    return first.removeprefix(HEADER).strip() if first.startswith(HEADER) else ""


def is_run(path: Path) -> bool:
    """Whether a folder is a run: its config.toml starts with the header of ours."""
    return bool(read_command(path))


def resumed_settings(run: Run, kind: type[S], given: dict[str, Any], may_change: tuple[str, ...]) -> S:
    """Settings of a run to resume: its own, and those of `given` that `may_change`.

    Raises:
        UserError: there is no run, or `given` changes a setting that may not change.
    """
    if not is_run(run.path):
        raise UserError(f"--resume {run.path}: not a run (no config.toml)")
    former = {key: value for key, value in FORMER.items() if key in kind.model_fields}
    written = build(kind, former, read_toml(run.config), where=f"{run.config}: ")
    changed = [key for key, value in given.items() if not _same(key, value, getattr(written, key), run.path)]
    flags = ", ".join(f"--{key.replace('_', '-')}" for key in changed if key not in may_change)
    if flags:
        only = ", ".join(key.replace("_", "-") for key in may_change)
        raise UserError(f"--resume takes its settings from the run; {flags} cannot change (only {only})")
    return build(kind, written.model_dump(), given)


def _same(key: str, given: Any, written: Any, folder: Path) -> bool:
    if key not in ("reward", "holdout_reward"):
        return given == written
    from orwcfm_fast.rewards.identity import same_rewards

    return same_rewards(given, written, folder)


def named_code(*settings: BaseModel) -> list[str]:
    """--reward and --holdout-reward where there is user code among them, which every command must name again."""
    return [
        f"--{key.replace('_', '-')} {shlex.quote(spec)}"
        for key in ("reward", "holdout_reward")
        if user_code(specs := [*dict.fromkeys(spec for s in settings for spec in getattr(s, key))])
        for spec in specs
    ]


def resume_command(run: Run, command: str, *settings: BaseModel) -> str:
    """The command that resumes the run.

    Args:
        settings: of the run, or of each run of a sweep, whose rewards may be user code.
    """
    flag = "--out" if command == "sweep" else "--resume"
    return " ".join([f"orwcfm {command} {flag} {shlex.quote(str(run.path))}", *named_code(*settings)])


def next_run_path(stem: str, root: Path = Path("runs")) -> Path:
    """runs/<stem>-001, or the first such name that is free."""
    number = 1
    while (path := root / f"{stem}-{number:03d}").exists():
        number += 1
    return path


def newest_run(pattern: str = "*", root: Path = Path("runs"), model: str = "") -> Path | None:
    """The newest run under `root` with a matching name, a checkpoint and, where it is given, that model, or None."""
    found = [p for p in root.glob(pattern) if is_run(p) and any((p / "checkpoints").glob("step_*"))]
    if model:
        found = [p for p in found if read_toml(p / CONFIG).get("model") == model]
    return max(found, key=lambda p: ((p / CONFIG).stat().st_mtime_ns, p.name), default=None)
