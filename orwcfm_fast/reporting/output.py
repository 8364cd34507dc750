"""Writing samples to files: one PNG image, a folder of PNGs, or one .npz."""

from pathlib import Path

import numpy as np
from torch import Tensor

from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.reporting.images import grid_image, to_pil, to_pixels
from orwcfm_fast.reporting.pictures import save_animation, save_samples

FILES = (".png", ".npz")


def file_kind(path: Path) -> str:
    """The suffix in lower case; "" for a folder's name, which may have a dot in a number: samples-t0.5."""
    suffix = path.suffix.lower()
    return suffix if suffix in FILES or (suffix[1:2].isalpha() and not path.is_dir()) else ""


def check_target(path: Path, overwrite: bool) -> None:
    """Raise UserError where writing samples to `path` would fail or overwrite something."""
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
    """Write samples [N, *shape] to `path`: an .npz (array "samples"), one .png, or a folder of PNGs or WebPs.

    Raises:
        UserError: the samples are vectors or sound, of which there is no folder of PNGs.
        WorkError: the files could not be written.
    """
    try:
        if file_kind(path) == ".npz":
            with path.open("wb") as file:
                np.savez(file, samples=samples.cpu().numpy())
        elif file_kind(path) == ".png":
            if samples.dim() == 4:
                grid_image(samples, columns=max(8, round(len(samples) ** 0.5))).save(path)
            else:
                save_samples(path, {f"{len(samples)} samples": samples})
        elif samples.dim() not in (4, 5):
            what = "sound" if samples.dim() == 3 else "vectors"
            raise UserError(f"--out {path}: these samples are {what}; write a .png or .npz")
        else:
            path.mkdir(exist_ok=True)
            width = len(str(len(samples) - 1))
            for i, video in enumerate(samples if samples.dim() == 5 else ()):
                save_animation(path / f"{i:0{width}d}.webp", video[None], 1)
            for i, image in enumerate(to_pixels(samples) if samples.dim() == 4 else ()):
                to_pil(image).save(path / f"{i:0{width}d}.png")
    except OSError as error:
        raise WorkError(f"{path}: {error.strerror or error}") from None
    return path
