"""A pipeline of diffusers by its configurations alone: found, checked, and its parts without weights."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.files import read_small
from orwcfm_fast.networks.flow.call import DENOISERS, ENCODERS
from orwcfm_fast.networks.flow.learning import NotAFlow
from orwcfm_fast.networks.flow.library import PREFIX, library

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
MAX_CONFIG_BYTES = 1 << 20
NO_FLOW = ("epsilon", "sample", "v_prediction")  # predictions of schedulers that are no flow's


@dataclass(frozen=True)
class Description:
    """A pipeline by its configurations alone.

    Attributes:
        model: diffusers:PATH, absolute, or diffusers:ID; folder: where it lies.
        kind: its class; shells: its modules by name, without weights, on the meta device.
    """

    model: str
    folder: Path
    kind: type
    shells: dict[str, nn.Module]

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        return {name: shell for name, shell in self.shells.items() if DENOISERS.match(name)}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {name: shell for name, shell in self.shells.items() if ENCODERS.match(name)}

    @property
    def decoders(self) -> dict[str, nn.Module]:
        """What is neither: it stays loaded, for decoding."""
        rest = self.shells.keys() - self.denoisers.keys() - self.encoders.keys()
        return {name: self.shells[name] for name in sorted(rest)}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for shell in self.denoisers.values() for p in shell.parameters())

    def load(self, shells: dict[str, nn.Module], dtype: dict[str, torch.dtype], device: torch.device) -> Any:
        """The pipeline with `shells` in place of some parts; the others have their weights, on a device."""
        pipe = self.kind.from_pretrained(  # type: ignore[attr-defined]
            self.folder, dtype=dtype, use_safetensors=True, local_files_only=True, **shells
        )
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name not in shells:
                part.to(device).eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@contextmanager
def telling(model: str, what: str = "cannot be loaded") -> Iterator[None]:
    """What diffusers finds amiss with a pipeline, as one line."""
    try:
        yield
    except (UserError, WorkError):
        raise
    except NotAFlow as error:
        raise UserError(f"model {model}: no flow-matching pipeline: {error}") from error
    except Exception as error:  # a dozen kinds, of configurations and of weights
        reason = " ".join(str(error).split())[:200]
        if out_of_memory(error):
            raise WorkError(f"model {model}: out of memory while it was loaded: {reason}") from error
        raise UserError(f"model {model}: {what}: {type(error).__name__}: {reason}") from error


def describe_pipeline(model: str, weights: bool = True) -> Description:
    """Find a pipeline and read its configurations.

    Args:
        weights: of a pipeline on the Hub, fetch them too.

    Raises:
        UserError: diffusers is missing, nothing is there, or it is no flow-matching pipeline.
    """
    diffusers, name = library(), model.removeprefix(PREFIX)
    folder = Path(name).resolve()
    if folder.is_dir():
        model = f"{PREFIX}{folder}"
    else:
        folder = _fetched(model, name, weights)
    if (folder / MODULAR_INDEX).is_file() and not (folder / INDEX).is_file():
        raise UserError(
            f"model {model}: a modular pipeline of diffusers ({MODULAR_INDEX}), which is not read; use the model's "
            f"standard pipeline, whose folder has a {INDEX}"
        )
    index = _json(model, folder / INDEX)
    kind, scheduler = str(index.get("_class_name")), str((index.get("scheduler") or [None])[-1])
    if not isinstance(found := getattr(diffusers, kind, None), type):
        raise UserError(f"model {model}: {kind} is no pipeline of diffusers {diffusers.__version__}")
    _check_scheduler(model, folder, kind, scheduler)
    with telling(model):
        shells = {
            name: shell
            for name, value in sorted(index.items(), key=lambda item: not DENOISERS.match(item[0]))
            if isinstance(value, list) and value[-1] and (shell := _shell(model, folder, name, *value))
        }
    return Description(model, folder, found, shells)


def _check_scheduler(model: str, folder: Path, kind: str, scheduler: str) -> None:
    own = getattr(library(), scheduler, None)
    config = dict(own().config) if isinstance(own, type) else {}
    file = folder / "scheduler" / "scheduler_config.json"
    config |= _json(model, file) if file.is_file() else {}
    if config.get("prediction_type") in NO_FLOW:
        raise UserError(
            f"model {model}: {kind} with {scheduler} is no flow-matching pipeline: it predicts "
            f"'{config['prediction_type']}', a flow its velocity"
        )


def _shell(model: str, folder: Path, name: str, package: str, kind: str) -> nn.Module | None:
    """A part without weights, on the meta device; None where it is no network."""
    diffusers = library()
    if hasattr(diffusers.pipelines, package):
        module = getattr(diffusers.pipelines, package)
    elif package in ("diffusers", "transformers"):
        module = importlib.import_module(package)
    else:
        raise UserError(f"model {model}: its {name} is code of its own ({package}), which is not run")
    found = getattr(module, kind)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return None
    config = _json(model, folder / name / "config.json")
    with torch.device("meta"):
        if package == "transformers":
            return found(found.config_class.from_pretrained(folder / name)).eval()  # type: ignore[attr-defined]
        return found.from_config(config).eval()  # type: ignore[attr-defined]


def _fetched(model: str, name: str, weights: bool) -> Path:
    """A pipeline of the Hub, in its client's own cache."""
    from huggingface_hub import snapshot_download

    try:
        if weights:
            return Path(library().DiffusionPipeline.download(name, use_safetensors=True))
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"]))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model {model}: no such folder, and no download possible ({reason})") from None


def _json(model: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path, MAX_CONFIG_BYTES))
        if isinstance(found, dict):
            return found
        reason = "no JSON object"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {error}"
    raise UserError(
        f"model {model}: {path.parent.name}/{path.name}: {reason}; should be a diffusers pipeline"
    )
