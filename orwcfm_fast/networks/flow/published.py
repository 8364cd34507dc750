"""Published low-rank adapters of a pipeline, in the keys of diffusers, PEFT or kohya's scripts."""

import inspect
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from orwcfm_fast.checkpoints.headers import check_safetensors
from orwcfm_fast.errors import UserError, warn
from orwcfm_fast.files import read_small
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.flow.library import library
from orwcfm_fast.networks.policy import LORA_METADATA, Policy

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"  # beside the weights, where PEFT saved them
MAX_CONFIG_BYTES = 1 << 20


def load_published(policy: Policy, files: Sequence[str]) -> None:
    """Add the adapters in `files`, one for each transformer, as START.

    Raises:
        UserError: no such file, none of safetensors, or no adapter of this pipeline; names it.
    """
    pipeline = policy.pipeline
    assert pipeline
    parts = lora.parts(pipeline)
    if len(files) > len(parts):
        raise UserError(
            f"--lora-init: {len(files)} files, but the pipeline has {len(parts)} transformer(s) to adapt"
        )
    first = next(iter(parts))
    state: dict[str, Tensor] = {}
    known: dict[str, lora.Record] = {}
    where = ""
    try:
        for file, (prefix, part) in zip(files, parts.items(), strict=False):
            where = f"--lora-init {file}"
            tensors, known[prefix] = _read(Path(file), pipeline.pipe, first, part)
            if not tensors:
                raise UserError(
                    f"{where}: holds no low-rank adapter of {policy.model}'s {prefix.rstrip('.')}"
                )
            state |= {prefix + key: value for key, value in tensors.items()}
        where = f"--lora-init {' '.join(files)}"
        lora.add_saved(pipeline, lora.START, state, known, where)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except Exception as error:  # of a dozen converters, and of what a header claims
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{where}: no LoRA of {policy.model} ({reason})") from error


def _read(path: Path, pipe: Any, first: str, part: nn.Module) -> tuple[dict[str, Tensor], lora.Record]:
    """An adapter of a transformer, by its own names of layers; `first`: the prefix of the first one's keys."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    check_safetensors(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(LORA_METADATA)
    metadata = {key.removeprefix(first): value for key, value in json.loads(text or "{}").items()}
    bare = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    if all(_names_layer(part, key) for key in bare):
        beside = path.with_name(PEFT_CONFIG)
        return bare, json.loads(read_small(beside, MAX_CONFIG_BYTES)) if beside.is_file() else metadata
    alphas: dict[str, float] = {}
    if hasattr(pipe, "lora_state_dict"):
        both = "return_alphas" in inspect.signature(pipe.lora_state_dict).parameters
        found = pipe.lora_state_dict(tensors, **({"return_alphas": True} if both else {}))
        tensors, *more = found if isinstance(found, tuple) else (found,)
        alphas = {key: float(value) for key, value in (more[0] if more and more[0] else {}).items()}
    others = sorted({key.partition(".")[0] for key in tensors if not key.startswith(first)})
    tensors = {key.removeprefix(first): value for key, value in tensors.items() if key.startswith(first)}
    if tensors and others:
        warn(f"{path}: its adapters of {', '.join(others)} are left out")
    if not any(".lora_A." in key for key in tensors):
        library()
        from diffusers.utils import convert_unet_state_dict_to_peft

        tensors = convert_unet_state_dict_to_peft(tensors)
    if alphas:
        by_layer = {
            key.removeprefix(first).partition(".lora_")[0].removesuffix(".alpha"): value
            for key, value in alphas.items()
            if key.startswith(first)
        }
        alpha = Counter(by_layer.values()).most_common(1)[0][0]
        different = {f"^{layer}": value for layer, value in by_layer.items() if value != alpha}
        metadata = {"lora_alpha": alpha, "alpha_pattern": different}
    return tensors, metadata


def _names_layer(part: nn.Module, key: str) -> bool:
    layer = key.partition(".lora_")[0]
    try:
        part.get_submodule(layer)
    except AttributeError:
        return False
    return True
