"""What a pipeline's call takes: checked against its own signature, images read from their files."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orwcfm_fast.errors import UserError

# set by the sampler, not by a prompt
RESERVED = {
    "self", "num_inference_steps", "timesteps", "sigmas", "generator", "latents", "audio_latents", "output_type",
    "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "num_images_per_prompt",
    "num_videos_per_prompt", "num_waveforms_per_prompt", "attention_kwargs", "joint_attention_kwargs",
}  # fmt: skip
FILES = re.compile(r"image|mask|video|reference")  # arguments whose texts are paths of pictures
MAX_FRAMES = 4096


def arguments_of(kind: type) -> list[str]:
    """What a prompt of that pipeline may hold besides its text: the arguments of its `__call__`."""
    takes = inspect.signature(inspect.unwrap(kind.__call__)).parameters
    return [name for name in takes if name not in RESERVED | {"prompt"}]


def common_arguments(kind: type, guidance: float, image_size: int, prompt_tokens: int) -> dict[str, Any]:
    """The settings --guidance, --image-size and --prompt-tokens as arguments of the pipeline's call.

    Raises:
        UserError: it takes no such argument.
    """
    takes = inspect.signature(inspect.unwrap(kind.__call__)).parameters
    found: dict[str, Any] = {}
    for flag, value, names in (
        ("--image-size", image_size, ("height", "width")),
        ("--prompt-tokens", prompt_tokens, ("max_sequence_length",)),
        ("--guidance", guidance if guidance != 1 else 0, ("guidance_scale",)),
    ):
        if not value:
            continue
        if missing := [name for name in names if name not in takes]:
            raise UserError(f"{flag} {value:g}: {kind.__name__} takes no {missing[0]}; leave it out")
        found |= dict.fromkeys(names, value)
    if "guidance_scale" in takes:
        found.setdefault("guidance_scale", guidance)
    return found


def embedded_guidance(kind: type, configs: Iterable[Mapping[str, Any]]) -> float:
    """The pipeline's own guidance, from its call's signature, where a transformer embeds it; else 1, which is none.

    Args:
        configs: of its transformers.
    """
    takes = inspect.signature(inspect.unwrap(kind.__call__)).parameters
    if "guidance_scale" not in takes or not any(config.get("guidance_embeds") for config in configs):
        return 1.0
    return float(takes["guidance_scale"].default)


def read_files(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with pictures in place of their paths.

    Raises:
        UserError: a file that is not there, or is no picture.
    """
    return {key: _read(key, value) if FILES.search(key) else value for key, value in inputs.items()}


def paths_of(inputs: dict[str, Any]) -> list[Path]:
    """The files that inputs name."""
    values = (
        value if isinstance(value, list) else [value] for key, value in inputs.items() if FILES.search(key)
    )
    return [Path(v) for value in values for v in value if isinstance(v, str)]


def _read(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_read(key, v) for v in value]
    if not isinstance(value, str):
        return value
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(value) as file:
            if "video" not in key:
                return file.convert("L" if "mask" in key else "RGB")
            frames: Iterable[Any] = ImageSequence.Iterator(file)
            return [f.convert("RGB") for f, _ in zip(frames, range(MAX_FRAMES), strict=False)]
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "no picture that can be read"
        raise UserError(f"{key} {value}: {reason}") from None


def sizes_of(shape: Sequence[int]) -> dict[str, int]:
    """Height, width and frames of decoded samples of that shape [B, (F,) 3, H, W]; none of sound."""
    if len(shape) < 4:
        return {}
    found = {"height": shape[-2], "width": shape[-1]}
    return found | ({"num_frames": shape[1]} if len(shape) == 5 else {})
