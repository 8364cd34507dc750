"""`diffusers:PATH_OR_ID` to a policy: its folder, what must be so before anything is loaded, its parts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orwcfm_fast.device import out_of_memory, resolve_precision
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.files import read_small
from orwcfm_fast.networks.diffusers import FAMILIES, PREFIX, SCHEDULER, Family, Pipeline, library
from orwcfm_fast.networks.embeddings import embed
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.networks.prompts import Conditions, Prompt, read_prompts
from orwcfm_fast.settings import Conditioned

MAX_CONFIG_BYTES = 1 << 20
OPTIONS = ("guidance", "image_size", "prompt_tokens")


@dataclass(frozen=True)
class Description:
    """A pipeline by its configurations alone.

    Attributes:
        model: diffusers:PATH, absolute, or diffusers:ID; folder: where it lies.
        transformer, vae: without weights, on the meta device.
    """

    model: str
    folder: Path
    family: Family
    transformer: Any
    vae: Any

    @property
    def scale(self) -> int:
        """Pixels of an image along one side of a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """Of a latent of an image of that size, 0 for the pipeline's own.

        Raises:
            UserError: a size that it cannot make; names those next to it.
        """
        config = self.transformer.config
        unit = self.family.patch(config) * self.scale
        size = image_size or self.family.own_side(config) * self.scale
        if size % unit:
            low = size // unit * unit
            near = f"{low} or {low + unit}" if low else f"{unit}"
            raise UserError(
                f"--image-size {size}: this pipeline makes multiples of {unit} pixels; use {near}"
            )
        most = config.get("pos_embed_max_size")
        if most and size // unit > most:
            raise UserError(f"--image-size {size}: this pipeline knows images up to {most * unit} pixels")
        side = size // self.scale
        return self.family.channels(config), side, side


@contextmanager
def telling(model: str) -> Iterator[None]:
    """What diffusers finds amiss with a pipeline's files, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a dozen kinds, of configurations and of weights
        reason = " ".join(str(error).split())[:200]
        if out_of_memory(error):
            raise WorkError(f"model {model}: out of memory while it was loaded: {reason}") from error
        raise UserError(f"model {model}: cannot be loaded: {type(error).__name__}: {reason}") from error


def describe_pipeline(model: str, weights: bool = True) -> Description:
    """Find a pipeline and read its configurations.

    Args:
        weights: of a pipeline on the Hub, fetch them too.

    Raises:
        UserError: diffusers is missing, nothing is there, or it is no flow-matching pipeline known here.
    """
    diffusers, name = library(), model.removeprefix(PREFIX)
    folder = Path(name).resolve()
    if folder.is_dir():
        model = f"{PREFIX}{folder}"
    else:
        folder = _fetched(model, name, weights)
    index = _json(model, folder / "model_index.json")
    kind, scheduler = str(index.get("_class_name")), str((index.get("scheduler") or [None])[-1])
    if kind not in FAMILIES or scheduler != SCHEDULER:
        raise UserError(
            f"model {model}: {kind} with {scheduler} is no flow-matching pipeline known here; "
            f"SD3, SD3.5 and FLUX with {SCHEDULER} are"
        )
    family = FAMILIES[kind]
    with telling(model), torch.device("meta"):
        transformer, vae = (
            getattr(diffusers, kind).from_config(_json(model, folder / part / "config.json")).eval()
            for part, kind in (("transformer", family.transformer_kind), ("vae", "AutoencoderKL"))
        )
    return Description(model, folder, family, transformer, vae)


def _fetched(model: str, name: str, weights: bool) -> Path:
    """A pipeline of the Hub, in its client's own cache."""
    from huggingface_hub import snapshot_download

    try:
        if weights:
            return Path(library().DiffusionPipeline.download(name, use_safetensors=True))
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
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


def load_pipeline(
    model: str,
    how: Conditioned,
    device: torch.device,
    precision: str = "auto",
    saved: dict[str, Any] | None = None,
    frozen: bool = True,
) -> Policy:
    """A policy of a pipeline's own weights, on its prompts.

    Args:
        how: what was asked for; saved: as `Policy.pipeline_state` gave it, for what was not.
        frozen: the transformer's own weights will not be trained, and are held in the precision they are used in.

    Raises:
        UserError: no such pipeline, prompts or image size.
    """
    prompts, options = asked(how, saved or {})
    found = describe_pipeline(model)
    family, transformer = found.family, found.transformer
    shape = found.shape(options["image_size"])
    guidance = options["guidance"]
    embeds_guidance = family.embeds_guidance(transformer.config)
    if guidance != 1 and not (embeds_guidance or family.by_difference):
        raise UserError(f"--guidance {guidance:g}: model {found.model} was made without; leave it out")
    tokens = options["prompt_tokens"] or family.own_tokens
    dtype = resolve_precision(precision, device, sum(p.numel() for p in transformer.parameters()))
    with telling(found.model):
        table = embed(found.folder, family, transformer, [p.text for p in prompts], tokens, device)
        network = family(_part(found, transformer, dtype if frozen else torch.float32), guidance)
        around = Pipeline(
            family, _part(found, found.vae, torch.float32).to(device).requires_grad_(False),
            _scheduler(found), shape[1] * shape[2] // family.patch(transformer.config) ** 2,
            how.vae_chunk, dtype, options,
        )  # fmt: skip
    return Policy(
        network.to(device).eval(), shape, found.model, "prompts", dtype, pipeline=around,
        conditions=Conditions(prompts, table, device), guidance=1.0 if embeds_guidance else guidance,
    )  # fmt: skip


def _part(found: Description, shell: Any, dtype: torch.dtype) -> nn.Module:
    name = "vae" if shell is found.vae else "transformer"
    return type(shell).from_pretrained(
        found.folder, subfolder=name, dtype=dtype, use_safetensors=True, local_files_only=True
    ).eval()  # fmt: skip


def _scheduler(found: Description) -> Any:
    return getattr(library(), SCHEDULER).from_pretrained(
        found.folder, subfolder="scheduler", local_files_only=True
    )


def asked(how: Conditioned, saved: dict[str, Any]) -> tuple[list[Prompt], dict[str, Any]]:
    """Prompts and `OPTIONS`: as given, else as saved, else the defaults.

    Raises:
        UserError: no prompts, or none that can be read.
    """
    if how.prompts:
        prompts = read_prompts(how.prompts)
    elif saved.get("prompts"):
        prompts = [Prompt.of(values) for values in saved["prompts"]]
    else:
        raise UserError("--prompts: a pipeline needs a file of prompts, one a line")
    given = {key: getattr(how, key) or saved.get(key) for key in OPTIONS}
    return prompts, {
        "guidance": float(given["guidance"] or 1.0),
        "image_size": int(given["image_size"] or 0),
        "prompt_tokens": int(given["prompt_tokens"] or 0),
    }
