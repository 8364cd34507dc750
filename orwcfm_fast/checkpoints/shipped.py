"""Checkpoints that come with the package."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "shipped"


def shipped(name: str) -> Path | None:
    """The folder of that checkpoint; None where none of that name ships."""
    folder = FOLDER / name
    return folder if folder.is_dir() else None
