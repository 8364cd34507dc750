"""Tiny random pipelines of many families: `build(name)` gives one, and what it is called with."""

import tiny_images  # noqa: F401  each fills the table
import tiny_sounds  # noqa: F401
import tiny_videos  # noqa: F401
import torch
from tiny_parts import EDIT, FAMILIES, SOUND, VIDEO, Made, Parts

__all__ = ["EDIT", "FAMILIES", "SOUND", "VIDEO", "build"]


def build(name: str) -> Made:
    """A pipeline of that family, its weights drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, call = FAMILIES[name](Parts())
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for p in part.parameters():
                p.data = torch.where(p.isfinite() & (p.abs() < 10), p, 0.02)  # some are left uninitialised
    pipe.set_progress_bar_config(disable=True)
    return pipe, call
