"""A run directory: config.toml, metrics.jsonl, checkpoints/, reference/, samples/, summary.json."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.settings import S, build, read_toml, to_toml

CONFIG, METRICS, SUMMARY, FORECAST = "config.toml", "metrics.jsonl", "summary.json", "forecast.json"
HEADER = "# orwcfm "


class Run:
    """Paths of a run, and how its files are written."""

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

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> "Run":
        """Make the directory; a run that is replaced stays beside it until `settle` or `undo`.

        Raises:
            UserError: it exists and is not empty (unless it is a run and `overwrite`), or cannot be written.
        """
        run = cls(path)
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                if not overwrite:
                    raise UserError(
                        f"--out {path}: exists and is not empty; use --overwrite, or --resume {path}"
                    )
                if not is_run(path):
                    raise UserError(
                        f"--out {path}: not a run, so --overwrite leaves it alone; choose another"
                    )
                run._replaced = path.rename(path.with_name(f".{path.name}.{os.getpid()}.replaced"))
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {path}: {error.strerror or error}") from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"--out {path}: not writable")
        return run

    def settle(self) -> None:
        """The run has something to show: what it replaced goes."""
        if self._replaced:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def undo(self) -> None:
        """The run came to nothing: remove it, and put back what it replaced."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced:
            self._replaced.rename(self.path)
            self._replaced = None

    def write_config(self, command: str, settings: BaseModel) -> None:
        """All settings, resolved, as TOML that --config reads again."""
        write_text(self.config, f"{HEADER}{command}\n" + to_toml(settings.model_dump()))

    def append(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl, on disk when this returns."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WorkError(f"{self.metrics}: {error.strerror or error}") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        try:
            lines = self.metrics.read_text().splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # a line cut off by a crash ends what is known
        return records

    def truncate_metrics(self, last: int, key: str = "round") -> None:
        """Keep the lines up to round (or step) `last`: what a checkpoint of that round knew."""
        kept = [r for r in self.read_metrics() if r[key] <= last]
        write_text(self.metrics, "".join(json.dumps(r) + "\n" for r in kept))


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old text or the new."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise WorkError(f"{path}: {error.strerror or error}") from None


def read_command(path: Path) -> str:
    """The command that made a directory (pretrain, finetune, sweep); empty where it is none of ours."""
    try:
        with (path / CONFIG).open(encoding="utf-8") as file:
            first = file.readline(80)
    except (OSError, UnicodeDecodeError):
        return ""
    return first.removeprefix(HEADER).strip() if first.startswith(HEADER) else ""


def is_run(path: Path) -> bool:
    """Whether a folder is a run: its config.toml begins as ours do."""
    return bool(read_command(path))


def resumed_settings(run: Run, kind: type[S], given: dict[str, Any], may_change: tuple[str, ...]) -> S:
    """Settings of a run that goes on.

    Raises:
        UserError: no run there; a setting given that a resumed run may not change.
    """
    if not is_run(run.path):
        raise UserError(f"--resume {run.path}: not a run (no config.toml)")
    flags = ", ".join(f"--{key.replace('_', '-')}" for key in given if key not in may_change)
    if flags:
        only = ", ".join(key.replace("_", "-") for key in may_change)
        raise UserError(f"--resume takes its settings from the run; {flags} cannot change (only {only})")
    return build(kind, read_toml(run.config), given, where=f"{run.config}: ")


def next_run_path(stem: str, root: Path = Path("runs")) -> Path:
    """runs/<stem>-001, or the first number that is free."""
    number = 1
    while (path := root / f"{stem}-{number:03d}").exists():
        number += 1
    return path


def newest_run(pattern: str = "*", root: Path = Path("runs")) -> Path | None:
    """The run under ./runs, of a name like that, which was begun last and has a checkpoint."""
    found = [p for p in root.glob(pattern) if is_run(p) and any((p / "checkpoints").glob("step_*"))]
    return max(found, key=lambda p: ((p / CONFIG).stat().st_mtime_ns, p.name), default=None)
