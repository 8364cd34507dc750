"""Metrics to Weights & Biases or TensorBoard as well, under the names of metrics.jsonl."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orwcfm_fast.errors import UserError

Record = dict[str, Any]
Log = Callable[[Record], None]
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError for a --log that is unknown or whose package is not installed."""
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
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            yield lambda record: _scalars(writer, record)
        return
    import wandb

    own = wandb.run is None  # a run that the user began stays the user's
    session = wandb.run or wandb.init(
        project=project or "orwcfm", name=run, dir=str(folder), config=settings, reinit="finish_previous"
    )
    try:
        yield lambda record: session.log(record, step=record["round"])
    finally:
        if own:
            session.finish()


def _scalars(writer: Any, record: Record) -> None:
    for key, value in record.items():
        if isinstance(value, int | float):
            writer.add_scalar(key, value, record["round"])
    writer.flush()
