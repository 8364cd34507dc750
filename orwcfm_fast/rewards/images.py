"""Rewards of images [B, C, H, W] in [-1, 1] that need no network."""

import io
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.registry import Score, reward, reward_factory
from orwcfm_fast.settings import RewardOptions

JPEG_QUALITY = 95


def to_bytes(images: Tensor) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] to uint8 [B, H, W, C] on the CPU, rounded."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"needs images [B, 1 or 3, H, W], these samples are {list(images.shape)}")
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def jpeg_kilobytes(images: Tensor, quality: int) -> Tensor:
    """Size of each image's JPEG file in kB (1,000 bytes), [B]; Pillow, default subsampling."""
    from PIL import Image

    def size(pixels) -> float:
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
            buffer, "JPEG", quality=quality
        )
        return buffer.tell() / 1000

    with ThreadPoolExecutor() as pool:
        return torch.tensor(list(pool.map(size, to_bytes(images).numpy())))


def _quality(argument: str) -> int:
    if argument and not (argument.isdigit() and 1 <= int(argument) <= 95):
        raise UserError(f"JPEG quality '{argument}': should be a whole number from 1 to 95")
    return int(argument or JPEG_QUALITY)


@reward_factory("jpeg-compressibility")
def jpeg_compressibility(argument: str, options: RewardOptions) -> Score:
    """minus the kB of the JPEG; jpeg-compressibility:Q for quality Q (95)"""
    quality = _quality(argument)
    return lambda images: -jpeg_kilobytes(images, quality)


@reward_factory("jpeg-incompressibility")
def jpeg_incompressibility(argument: str, options: RewardOptions) -> Score:
    """the kB of the JPEG; jpeg-incompressibility:Q for quality Q (95)"""
    quality = _quality(argument)
    return lambda images: jpeg_kilobytes(images, quality)


@reward("brightness")
def brightness(images: Tensor) -> Tensor:
    """mean pixel value, in [-1, 1]"""
    return images.flatten(1).mean(1)
