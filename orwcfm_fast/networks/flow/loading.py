"""`diffusers:PATH_OR_ID` to a policy: its prompts encoded, its transformers loaded, what was requested checked."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from orwcfm_fast.device import out_of_memory, resolve_precision
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.networks.flow.call import Condition
from orwcfm_fast.networks.flow.description import Description, describe_pipeline, telling
from orwcfm_fast.networks.flow.encodings import CachedConditions, encoded
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.networks.flow.inputs import (
    arguments_of,
    common_arguments,
    embedded_guidance,
    read_files,
    sizes_of,
)
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.networks.prompts import Conditions, Prompt, read_prompts
from orwcfm_fast.settings import Conditioned

OPTIONS = ("guidance", "image_size", "prompt_tokens")


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
        how: what the user requested; saved: as `Policy.pipeline_state` gave it, for what was not.
        frozen: the denoisers' own weights will not be trained, and are held in the precision they are used in.

    Raises:
        UserError: no such pipeline, prompts or image size; the pipeline is no flow.
    """
    found = describe_pipeline(model)
    prompts, options = requested(found, how, saved or {})
    arguments = common_arguments(found.kind, **options)
    dtype = resolve_precision(precision, device, found.parameters)
    with telling(found.model), sizes_explained(found, arguments, prompts[0], options):
        conditions = encode(found, arguments, prompts, device)
        parts = dict.fromkeys(found.denoisers, dtype if frozen else torch.float32)
        pipe = found.load(found.encoders, parts | {"default": torch.float32}, device)
        network = PipelineVelocity(pipe, arguments, conditions=conditions)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            shape = network.shape
            check_one_shape(network, prompts)
            check_guidance(found, network, options["guidance"])
            output = network.call(conditions[0], final=network.samples(1)).output
            made = sizes_of(network.decoded(output).shape)
        if any(made.get(name, size) != size for name, size in sizes_asked(arguments, prompts[0]).items()):
            raise ValueError(f"samples are {made}, not as requested")
    return Policy(
        network.eval(), shape, found.model, "prompts", dtype, conditions=Conditions(prompts, device),
        decode_chunk=how.vae_chunk, options=options,
    )  # fmt: skip


def encode(
    found: Description, arguments: dict[str, Any], prompts: Sequence[Prompt], device: torch.device
) -> CachedConditions:
    """The pipeline's conditions; its encoders are loaded only where the cache lacks some, and then let go."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def missing(inputs: Sequence[dict[str, Any]]) -> Iterator[Condition]:
        default = {"default": torch.float32} | dict.fromkeys(found.encoders, dtype)
        pipe = found.load(found.denoisers, default, device)
        encoder = PipelineVelocity(pipe, arguments, device)
        for each in inputs:
            yield encoder.encoded(**read_files(each))

    made_of = {"kind": found.kind.__name__, "dtype": str(dtype), "arguments": arguments}
    conditions = encoded(found.folder, made_of, [inputs_of(p) for p in prompts], missing)
    gc.collect()  # the encoders hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return conditions


def inputs_of(prompt: Prompt) -> dict[str, Any]:
    """What the pipeline is called with for a prompt."""
    return {"prompt": prompt.text, **prompt.inputs}


def check_one_shape(network: PipelineVelocity, prompts: Sequence[Prompt]) -> None:
    """Raises UserError where the samples of a prompt have another shape than those of the first."""
    for row, prompt in enumerate(prompts):
        if not prompt.inputs:
            continue
        seen = network.call(network.conditions[row], answer=network.zeros, leave="second").seen["sample"]
        shapes = [[*x.shape[1:]] for x in seen]
        own = [[*shape] for shape in network.traits.shapes]
        if shapes != own:
            raise UserError(
                f"--prompts: '{prompt.text[:60]}' makes samples {shapes}, the first prompt {own}; give all prompts "
                "one height, width and num_frames, and pictures of one size"
            )


def sizes_asked(arguments: dict[str, Any], prompt: Prompt) -> dict[str, int]:
    inputs = arguments | prompt.inputs
    return {name: inputs[name] for name in ("height", "width", "num_frames") if inputs.get(name)}


@contextmanager
def sizes_explained(
    found: Description, arguments: dict[str, Any], prompt: Prompt, options: dict[str, Any]
) -> Iterator[None]:
    """An error that comes of a size which the pipeline cannot make names those that it can.

    Raises:
        UserError: in place of that error.
    """
    try:
        yield
    except (UserError, WorkError):
        raise
    except Exception as error:
        from orwcfm_fast.networks.flow.without_weights import check_sizes, without_weights
        from orwcfm_fast.torch_private import FakeTensorMode

        sizes = sizes_asked(arguments, prompt)
        if sizes and not out_of_memory(error):
            inputs = {**arguments, **read_files(inputs_of(prompt))}
            bare = found.load(found.shells, {}, torch.device("cpu"))
            own = {key: v for key, v in arguments.items() if key not in sizes}
            field = without_weights(bare, own, FakeTensorMode(allow_non_fake_inputs=True))
            check_sizes(field, inputs, sizes, "--image-size" if options["image_size"] else "height, width")
        raise


def check_guidance(found: Description, network: PipelineVelocity, guidance: float) -> None:
    """Raises UserError where guidance was requested and changes nothing."""
    if guidance == 1:
        return
    x = torch.randn(1, *network.shape, generator=torch.Generator().manual_seed(0)).to(network.device)
    t, row = torch.tensor([0.5]), torch.tensor([0])
    condition = network.conditions[0]
    before, velocities = condition.inputs, []
    try:
        with torch.no_grad():
            for scale in (guidance, guidance + 1):
                condition.inputs = {"guidance_scale": scale, **before}
                velocities.append(network.one_by_one(t, x, row))
    finally:
        condition.inputs = before
    if torch.equal(*velocities):
        more = "" if "true_cfg_scale" not in arguments_of(found.kind) else (
            ' (prompts as JSON lines may hold "true_cfg_scale" and "negative_prompt")'
        )  # fmt: skip
        raise UserError(f"--guidance {guidance:g}: model {found.model} was made without; leave it out{more}")


def requested(
    found: Description, how: Conditioned, saved: dict[str, Any]
) -> tuple[list[Prompt], dict[str, Any]]:
    """Prompts and `OPTIONS`: as given, else as saved, else the defaults.

    Raises:
        UserError: no prompts, or none that can be read.
    """
    takes = arguments_of(found.kind)
    if how.prompts:
        prompts = read_prompts(how.prompts, takes)
    elif saved.get("prompts"):
        prompts = [Prompt.of(values, takes) for values in saved["prompts"]]
    else:
        raise UserError("--prompts: a pipeline needs a file of prompts, one a line")
    if file := getattr(how, "eval_prompts", ""):
        known = {(p.text, json.dumps(p.inputs)) for p in prompts}
        for prompt in read_prompts(file, takes, "--eval-prompts"):
            if (prompt.text, json.dumps(prompt.inputs)) in known:
                raise UserError(
                    f"--eval-prompts {file}: '{prompt.text[:60]}' is trained on as well; hold out others"
                )
            prompts.append(replace(prompt, held_out=True))
    prompts.sort(key=lambda prompt: prompt.held_out)
    if prompts[0].held_out:
        raise UserError(f"--prompts {how.prompts}: every prompt is held out; none is left to train on")
    given = {key: getattr(how, key) or saved.get(key) for key in OPTIONS}
    denoisers: list[Any] = [*found.denoisers.values()]
    own = embedded_guidance(found.kind, [denoiser.config for denoiser in denoisers])
    return prompts, {
        "guidance": float(given["guidance"] or own),
        "image_size": int(given["image_size"] or 0),
        "prompt_tokens": int(given["prompt_tokens"] or 0),
    }
