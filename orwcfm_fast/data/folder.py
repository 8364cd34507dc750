"""A folder of images."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orwcfm_fast.data.datasets import dataset
from orwcfm_fast.errors import UserError, warn
from orwcfm_fast.files import open_regular

MAX_PIXELS = 50_000_000
"""Of one image."""
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
OTHERS = (".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".ppm", ".tga", ".npy", ".npz")
"""Kinds of image files that are not read; a warning counts them."""
NAMED = 5  # unreadable files that an error names
BACKGROUND = 255  # white, behind transparent pixels


@dataset("folder", None, "unet-cifar10", "jpeg-compressibility")
def folder(data_dir: Path, argument: str):
    """folder:PATH, every PNG, JPEG, WebP, BMP and TIFF below it, cropped square and resized to 32×32 RGB

    Transparent pixels show white; EXIF orientation is applied; of several frames the first is taken. Hidden files
    are passed over.
    """
    root = Path(argument)
    if not root.is_dir():
        raise UserError(f"data 'folder:{argument}': no such folder; write folder:PATH")
    files = sorted(path for path in root.rglob("*") if not path.is_dir() and not _is_hidden(path, root))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise UserError(f"data 'folder:{argument}': no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} below it")
    if others := sorted({path.suffix.lower() for path in files} & {*OTHERS}):
        count = sum(path.suffix.lower() in others for path in files)
        warn(f"data 'folder:{argument}': {count} {' and '.join(others)} files are not read")
    found, refused = [], []
    for path in images:
        try:
            found.append(read_image(path))
        except Exception as error:  # Pillow raises a dozen kinds
            refused.append(f"{_shown(path)} ({type(error).__name__}: {str(error).split(chr(10))[0]})")
    if refused:
        more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise UserError(
            f"data 'folder:{argument}': {len(refused)} of {len(images)} files cannot be read as an image: "
            f"{', '.join(refused[:NAMED])}{more}; remove them"
        )
    return torch.stack(found).permute(0, 3, 1, 2).float() / 127.5 - 1, None


def _is_hidden(path: Path, root: Path) -> bool:
    """Also macOS's ._x.png, which hold no image, and __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)


def _shown(path: Path) -> str:
    """A path in one line of printable characters."""
    return "".join(c if c.isprintable() else "?" for c in str(path))[-200:]


def read_image(path: Path) -> Tensor:
    """One image file, cropped square and resized, uint8 [32, 32, 3].

    Raises:
        ValueError, OSError and others of Pillow: no image, damaged, too large, or of a pixel format without a range.
    """
    from PIL import Image, ImageOps

    with open_regular(path) as file, Image.open(file, formats=tuple(FORMATS)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels, over {MAX_PIXELS:,}")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
            upright = _from_16_bits(upright)
        elif upright.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits, whose range is not known")
        if upright.has_transparency_data:
            back = Image.new("RGBA", upright.size, (BACKGROUND,) * 3 + (255,))
            upright = Image.alpha_composite(back, upright.convert("RGBA"))
        fitted = ImageOps.fit(upright.convert("RGB"), (32, 32), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(32, 32, 3)


def _from_16_bits(image):
    """A grey image of 16 bits as one of 8; Pillow's own conversion cuts values off at 255."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    levels = ((values + 128) // 257).clip(0, 255).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        levels[values == transparent] = BACKGROUND
    return Image.fromarray(levels)
