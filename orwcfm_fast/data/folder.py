"""A folder of images."""

from pathlib import Path

import torch

from orwcfm_fast.data.datasets import dataset
from orwcfm_fast.errors import UserError

MAX_PIXELS = 50_000_000
"""Of one image."""


@dataset("folder", None, "unet-cifar10", "jpeg-compressibility")
def folder(data_dir: Path, argument: str):
    """folder:PATH, every PNG and JPEG below it, cropped square and resized to 32×32 RGB"""
    from PIL import Image, ImageOps

    if not Path(argument).is_dir():
        raise UserError(f"data 'folder:{argument}': no such folder; write folder:PATH")
    files = sorted(p for p in Path(argument).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"data 'folder:{argument}': no .png, .jpg or .jpeg below it")
    images = []
    for file in files:
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels, over {MAX_PIXELS:,}")
                fitted = ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.LANCZOS)
        except Exception as error:  # Pillow raises a dozen kinds
            raise UserError(f"data 'folder': {file} is not an image to be used: {error}") from None
        images.append(torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(32, 32, 3))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1, None
