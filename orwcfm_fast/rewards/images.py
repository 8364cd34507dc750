"""Rewards of images [B, C, H, W] in [-1, 1] that need no network."""

import functools
import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.pixels import check_images, to_levels
from orwcfm_fast.rewards.registry import Reward, reward, reward_factory
from orwcfm_fast.settings import RewardOptions

JPEG_QUALITY = 95
NVJPEG_SIDE = 64
"""Smallest side that nvjpeg encodes: below it sizes stay Pillow's, in which published figures of 32×32 are given."""


def jpeg_kilobytes(images: Tensor, quality: int) -> Tensor:
    """Size of each image's JPEG file in kB (1,000 bytes), [B].

    Colour images from 64×64 up that lie on a GPU are encoded there by nvjpeg, which keeps colour at full resolution
    (4:4:4); all others by Pillow on threads, which halves it (4:2:0), so its files are smaller.
    """
    check_images(images)
    levels = to_levels(images).to(torch.uint8)
    large = levels.shape[1] == 3 and min(levels.shape[-2:]) >= NVJPEG_SIDE
    if large and levels.is_cuda and nvjpeg_works(levels.device):
        return _nvjpeg_bytes(levels, quality) / 1000
    return _pillow_bytes(levels, quality) / 1000


def _nvjpeg_bytes(levels: Tensor, quality: int) -> Tensor:
    from torchvision.io import encode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torchvision points to torchcodec
        return torch.tensor([float(len(file)) for file in encode_jpeg([*levels.contiguous()], quality)])


@functools.cache
def nvjpeg_works(device: torch.device) -> bool:
    """Whether this torchvision encodes on that GPU."""
    try:
        return bool(_nvjpeg_bytes(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device), 50)[0] > 0)
    except (ImportError, AttributeError, RuntimeError):
        return False


def _pillow_bytes(levels: Tensor, quality: int) -> Tensor:
    from PIL import Image

    def size(pixels) -> float:
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
            buffer, "JPEG", quality=quality
        )
        return buffer.tell()

    with ThreadPoolExecutor() as pool:
        pictures = levels.permute(0, 2, 3, 1).cpu().contiguous().numpy()
        return torch.tensor(list(pool.map(size, pictures)), dtype=torch.float32)


def _quality(argument: str) -> int:
    if argument and not (argument.isdigit() and 1 <= int(argument) <= 95):
        raise UserError(f"JPEG quality '{argument}': should be a whole number from 1 to 95")
    return int(argument or JPEG_QUALITY)


@reward_factory("jpeg-compressibility")
def jpeg_compressibility(argument: str, options: RewardOptions) -> Reward:
    """minus the kB of the JPEG; jpeg-compressibility:Q for quality Q (95)"""
    quality = _quality(argument)
    return lambda images: -jpeg_kilobytes(images, quality)


@reward_factory("jpeg-incompressibility")
def jpeg_incompressibility(argument: str, options: RewardOptions) -> Reward:
    """the kB of the JPEG; jpeg-incompressibility:Q for quality Q (95)"""
    quality = _quality(argument)
    return lambda images: jpeg_kilobytes(images, quality)


@reward("brightness")
def brightness(images: Tensor) -> Tensor:
    """mean pixel value, in [-1, 1]"""
    return images.flatten(1).mean(1)
