"""Resuming a fine-tuning run, also where a launcher repeats its command: after a rank died, or a job was requeued."""

import os
from pathlib import Path
from typing import Any

from orwcfm_fast.distributed import launched
from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.models import defaults_of
from orwcfm_fast.runs.resolve import agrees, left_open
from orwcfm_fast.runs.run import CONFIG, FORMER, read_command
from orwcfm_fast.settings import Finetune, build, read_toml

MAY_CHANGE = ("rounds", "device", "log", "graph", "compile", "shard")


def restarted_settings(settings: Finetune, out: Path | None, overwrite: bool) -> dict[str, Any] | None:
    """The settings given by a command that torchrun repeats, if its run is in `out` already and should be resumed.

    Raises:
        UserError: `out` holds another run; a restart would not find its run, or would replace it.
    """
    if not launched():
        return None
    if overwrite:
        raise UserError("--overwrite: a restart by torchrun would replace the trained run; leave it out")
    if out is None:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UserError("--max-restarts: name the run with --out DIR, so that a restart can resume it")
        return None
    if read_command(out) != "finetune":
        return None
    own = build(Finetune, FORMER, read_toml(out / CONFIG), where=f"{out / CONFIG}: ")
    published = ("lora", "lora_alpha", "lora_kind") if own.lora_init else ()
    by_model = {*defaults_of(own.model), *published, *FORMER} - settings.model_fields_set
    given = {k: v for k, v in settings.model_dump().items() if k not in by_model and not left_open(k, v)}
    for key, value in given.items():
        if key not in MAY_CHANGE and not agrees(key, value, getattr(own, key)):
            has = f"--{key.replace('_', '-')} {getattr(own, key)}"
            raise UserError(f"--out {out}: holds a run with {has}, not {value}; choose another")
    return given
