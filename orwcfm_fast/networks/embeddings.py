"""Prompt embeddings of a pipeline: computed once, kept on disk by what they were made of and from."""

import gc
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orwcfm_fast.device import cache_dir

if TYPE_CHECKING:
    from orwcfm_fast.networks.diffusers import Family

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
BATCH = 16
SAMPLED, BLOCK = 64, 1 << 16


def fingerprint(folder: Path) -> str:
    """Of the text encoders and tokenizers: small files whole, of large ones the size and 64 blocks in between."""
    digest = hashlib.sha256()
    for file in sorted(p for name in ENCODERS for p in (folder / name).rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size} ".encode())
        with file.open("rb") as data:
            if size <= SAMPLED * BLOCK:
                digest.update(data.read())
                continue
            for k in range(SAMPLED):
                data.seek((size - BLOCK) * k // (SAMPLED - 1))
                digest.update(data.read(BLOCK))
    return digest.hexdigest()


def embed(
    folder: Path, family: "Family", shell: Any, texts: Sequence[str], tokens: int, device: torch.device
) -> list[Tensor]:
    """Embeddings [P + 1, tokens, …] and pooled [P + 1, …] of P texts and, last, of the empty one.

    Text encoders are loaded only where the cache lacks them, and are gone when this returns.

    Args:
        folder: of the pipeline; shell: its transformer, on any device.
        tokens: of T5.
    """
    import safetensors.torch

    texts = [*texts, ""]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made_of = json.dumps([family.kind, fingerprint(folder), str(dtype), tokens, texts])
    file = cache_dir() / "embeddings" / f"{hashlib.sha256(made_of.encode()).hexdigest()}.safetensors"
    try:
        found = safetensors.torch.load_file(file)
        return [found["embeds"], found["pooled"]]
    except (OSError, KeyError, safetensors.SafetensorError):
        embeds, pooled = _encode(folder, family, shell, texts, tokens, device, dtype)
    gc.collect()  # the text encoders hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    safetensors.torch.save_file({"embeds": embeds, "pooled": pooled}, beside)
    beside.rename(file)
    return [embeds, pooled]


def _encode(folder, family, shell, texts, tokens, device, dtype) -> list[Tensor]:
    import diffusers

    pipeline = getattr(diffusers, family.kind).from_pretrained(
        folder, transformer=shell, vae=None, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    for name in ENCODERS:
        if isinstance(encoder := getattr(pipeline, name, None), torch.nn.Module):
            encoder.to(device).eval()
    with torch.inference_mode():
        parts = [
            family.encode(pipeline, texts[i : i + BATCH], tokens, device) for i in range(0, len(texts), BATCH)
        ]
        return [torch.cat([part.cpu() for part in values]) for values in zip(*parts, strict=True)]
