"""What a benchmark found, kept as a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save(
    found: dict[str, Any], folder: str | Path, plot: Callable[[dict[str, Any], Path], None], what: str = ""
) -> Path:
    """Write <what><device>-<date>.json, and the plot beside it; returns the JSON file's path."""
    name = f"{what}{found['device']}-{found['date'][:10]}".lower()
    path = Path(folder) / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, path.with_suffix(".png"))
    return path
