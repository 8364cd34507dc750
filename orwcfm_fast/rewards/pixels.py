"""Pictures as Pillow would hold and resize them, in batch on their own device."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.errors import UserError


def check_images(samples: Tensor) -> None:
    """Refuse samples that are no pictures.

    Raises:
        UserError: the shape is not [B, 1 or 3, H, W].
    """
    if samples.dim() != 4 or samples.shape[1] not in (1, 3):
        raise UserError(f"needs images [B, 1 or 3, H, W], these samples are {list(samples.shape)}")


def to_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] → whole numbers 0 … 255, float32: what an 8-bit file of them would hold."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255)


def resize(levels: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Levels [B, C, H, W] to another size, antialiased: rows, then columns, each rounded to 8 bits as in Pillow."""
    for shape in ((levels.shape[-2], width), (height, width)):
        if levels.shape[-2:] != shape:
            levels = F.interpolate(levels, shape, mode=interpolation, antialias=True)
            levels = levels.add_(0.5).floor_().clamp_(0, 255)  # halves go up, unlike round_
    return levels


@dataclass(frozen=True)
class Transform:
    """An image model's own evaluation transform.

    Attributes:
        size: (height, width) that the model takes.
        mean, std: of each channel of pixels in [0, 1].
        mode: shortest (resize, then crop the middle), longest (then pad) or squash.
        fill: level of the padding.
        resize_to: side before cropping, where larger than the crop.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    mode: str = "shortest"
    fill: float = 0
    resize_to: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] → [B, len(mean), *size], float32."""
        levels = self._fit(to_levels(images))
        mean, std = (
            torch.tensor(v, device=levels.device).mul_(255).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        if len(self.mean) == 3 and levels.shape[1] == 1:
            levels = levels.expand(-1, 3, -1, -1)
        return (levels - mean).div_(std)

    def _fit(self, levels: Tensor) -> Tensor:
        height, width = self.size
        h, w = levels.shape[-2:]
        ratios = (h / height, w / width)
        if self.mode == "squash":
            return resize(levels, height, width, self.interpolation)
        if self.mode == "longest":
            h, w = (round(side / max(ratios)) for side in (h, w))
        elif height == width:  # torchvision's rule for one side, which cuts off where the others round
            side = self.resize_to or height
            h, w = (side if s == min(h, w) else int(side * s / min(h, w)) for s in (h, w))
        else:
            h, w = (round(side / min(ratios)) for side in (h, w))
        levels = resize(levels, h, w, self.interpolation)
        if h < height or w < width:
            left, top = max(width - w, 0), max(height - h, 0)
            around = (left // 2, (left + 1) // 2, top // 2, (top + 1) // 2)
            levels = F.pad(levels, around, value=self.fill)
            h, w = levels.shape[-2:]
        top, left = round((h - height) / 2), round((w - width) / 2)
        return levels[..., top : top + height, left : left + width]
