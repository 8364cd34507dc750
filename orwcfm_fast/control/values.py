"""The values that a run may change by itself, as a checkpoint holds them."""

import math
from typing import Any

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import Finetune

KINDS = {"alpha": float, "tau": float, "micro_batch": int, "chunk": int, "reward_batch": int}


def read_values(state: Any, s: Finetune, where: str) -> dict[str, Any]:
    """α, τ and batch sizes from a checkpoint's state.json; as the settings say where it holds none.

    Raises:
        UserError: values of other kinds or out of bounds.
    """
    start = {"alpha": s.alpha, "tau": s.tau, **BatchSizes.of(s).values()}
    if state is None:
        return start
    try:
        found = {name: kind({"reward_batch": s.reward_batch, **state}[name]) for name, kind in KINDS.items()}
    except (TypeError, ValueError, KeyError, OverflowError):
        raise UserError(f"{where}: state.json: control is damaged") from None
    sizes_fit = found["micro_batch"] >= 1 and found["chunk"] >= 1 and found["reward_batch"] >= 0
    if not (0 <= found["alpha"] < math.inf and abs(found["tau"]) < math.inf and sizes_fit):
        raise UserError(f"{where}: state.json: control is out of bounds: {state}")
    return found
