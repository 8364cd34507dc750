"""Metrics to Weights & Biases or TensorBoard as well, under the names of metrics.jsonl."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orwcfm_fast.errors import UserError
from orwcfm_fast.files import read_small, write_text

Record = dict[str, Any]
Log = Callable[[Record], None]
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError for a logger that is unknown or whose package is not installed."""
    for name in names:
        kind, colon, project = name.partition(":")
        if kind not in PACKAGES or (colon and (kind != "wandb" or not project)):
            raise UserError(f"--log {name}: should be tensorboard, wandb or wandb:PROJECT")
        if find_spec(PACKAGES[kind]) is None:
            raise UserError(f"--log {name}: {kind} is not installed; pip install 'orwcfm-fast[{kind}]'")


@contextmanager
def loggers(names: Sequence[str], folder: Path, run: str, settings: Record) -> Iterator[Log]:
    """A function that logs a round's metrics to every logger named; all are closed at the end.

    Args:
        names: tensorboard, wandb or wandb:PROJECT; wandb's own environment decides whether it goes online.
        folder: where their files go. run: the name to show. settings: logged with the run.
    """
    check_loggers(names)
    with ExitStack() as stack:
        logs = [stack.enter_context(_open(name, folder, run, settings)) for name in names]

        def log(record: Record) -> None:
            for one in logs:
                one(record)

        yield log


@contextmanager
def _open(name: str, folder: Path, run: str, settings: Record) -> Iterator[Log]:
    kind, _, project = name.partition(":")
    if kind == "tensorboard":
        board = TensorBoard(folder / "tensorboard")
        try:
            yield board.log
        finally:
            board.close()
        return
    import wandb

    own = wandb.run is None  # a run that the user began stays the user's
    session = wandb.run or wandb.init(
        project=project or "orwcfm", name=run, dir=str(folder), config=settings, reinit="finish_previous",
        id=_wandb_id(folder), resume="allow",
    )  # fmt: skip
    try:
        yield lambda record: session.log(record, step=record["round"])
    finally:
        if own:
            session.finish()


def _wandb_id(folder: Path) -> str:
    """The run's id at wandb, drawn once and kept in its folder, so that a resumed run is the same run there."""
    file = folder / "wandb-id.txt"
    if not file.is_file():
        write_text(file, secrets.token_hex(8) + "\n")
    return read_small(file, 100).decode().strip()


class TensorBoard:
    """Writes scalars by round; a round that is logged again replaces it and those after it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.last = folder, 0
        self.writer: Any = None

    def log(self, record: Record) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None or record["round"] <= self.last:
            # the first round of this process, or one that the guard rolled back
            self.close()
            self.writer = SummaryWriter(str(self.folder), purge_step=record["round"])
        for key, value in record.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, record["round"])
        self.writer.flush()
        self.last = record["round"]

    def close(self) -> None:
        if self.writer:
            self.writer.close()
