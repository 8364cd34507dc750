"""Image samples as pixels: enlarged and smoothed to look at, or exactly as they are."""

import numpy as np
import torch
from torch import Tensor

SIDE = 48  # pixels that a small image is enlarged to, about
MOST = 128  # pixels that a large image is reduced to
GAP = 2


def to_pixels(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1], of one or three channels, as uint8 [N, H, W, C]."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def to_pil(pixels: np.ndarray):
    """One image, uint8 [H, W, C], as a PIL image."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def resized(images: Tensor) -> tuple[np.ndarray, str]:
    """Images [N, C, H, W] in [-1, 1] at a size to look at.

    Returns:
        uint8 [N, h, w, 3], and how they were resized, for the caption; an empty text where they were not.
    """
    from PIL import Image

    height, width = images.shape[2:]
    longest, factor = max(height, width), max(1, round(SIDE / images.shape[2]))
    if longest > MOST:
        size, words = (width * MOST // longest, height * MOST // longest), f"reduced to {MOST} pixels"
    else:
        size, words = (
            (width * factor, height * factor),
            f"enlarged ×{factor} and smoothed (bicubic)",
        )
    tiles = [
        to_pil(image).convert("RGB").resize(size, Image.Resampling.BICUBIC) for image in to_pixels(images)
    ]
    return np.stack([np.asarray(tile) for tile in tiles]), words if size != (width, height) else ""


def tiled(tiles: np.ndarray, columns: int, gap: int = GAP) -> np.ndarray:
    """Tiles uint8 [N, h, w, C] in rows of `columns` on a white ground, `gap` pixels around each."""
    n, height, width, channels = tiles.shape
    rows = -(-n // columns)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8
    )
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def grid_image(images: Tensor, columns: int = 8):
    """Images [N, C, H, W] in [-1, 1] as one PIL image; each pixel a square, so that no image is under 64 high."""
    zoom = max(1, 64 // images.shape[2])
    return to_pil(tiled(to_pixels(images).repeat(zoom, 1).repeat(zoom, 2), columns))
