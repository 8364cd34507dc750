"""Writing samples to files: one PNG image, a folder of PNGs, or one .npz."""

from pathlib import Path

import numpy as np
from torch import Tensor

from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.reporting.pictures import grid_image, save_samples

FILES = (".png", ".npz")


def file_kind(path: Path) -> str:
    """The suffix in lower case; "" for a folder's name, which may have a dot in a number: samples-t0.5."""
    suffix = path.suffix.lower()
    return suffix if suffix in FILES or (suffix[1:2].isalpha() and not path.is_dir()) else ""


def check_target(path: Path, overwrite: bool) -> None:
    """Raises UserError where writing to `path` would fail or destroy something."""
    kind = file_kind(path)
    if kind in FILES and path.is_dir():
        raise UserError(f"--out {path}: is a folder")
    if kind and kind not in FILES:
        raise UserError(f"--out {path}: should end in .png or .npz, or be a folder")
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"--out {path}: exists; use --overwrite")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"--out {path}: no folder {folder}")


def write_samples(samples: Tensor, path: Path) -> Path:
    """Samples [N, *shape] to `path`: .npz (array "samples"), .png (one image), else a folder of PNGs."""
    try:
        if file_kind(path) == ".npz":
            with path.open("wb") as file:
                np.savez(file, samples=samples.cpu().numpy())
        elif file_kind(path) == ".png":
            if samples.dim() == 4:
                grid_image(samples, columns=max(8, round(len(samples) ** 0.5))).save(path)
            else:
                save_samples(path, {f"{len(samples)} samples": samples})
        elif samples.dim() != 4:
            raise UserError(f"--out {path}: these samples are vectors; write a .png or .npz")
        else:
            path.mkdir(exist_ok=True)
            width = len(str(len(samples) - 1))
            for i, image in enumerate(samples):
                grid_image(image[None], 1, 1).crop((2, 2, 2 + image.shape[2], 2 + image.shape[1])).save(
                    path / f"{i:0{width}d}.png"
                )
    except OSError as error:
        raise WorkError(f"{path}: {error.strerror or error}") from None
    return path
