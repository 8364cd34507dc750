"""Memory of the recipes for large models, on paper: `python -m orwcfm_fast.benchmarks.large_models --out FILE`.

`doctor --plan` of each recipe that names a published pipeline, on GPUs of three sizes, from the configurations in
`published`. Nothing is measured here. Given names of recipes, only those are computed; the file's others stay.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from orwcfm_fast.benchmarks.published import MODELS, write
from orwcfm_fast.networks.flow.library import PREFIX, library
from orwcfm_fast.planning.pipeline import plan_pipeline_for
from orwcfm_fast.runs.recipe import RECIPES
from orwcfm_fast.settings import Finetune, build

GPUS = (24, 80, 141)  # GiB


def rows(recipe: str) -> list[dict[str, Any]]:
    """One row a GPU."""
    library()
    with tempfile.TemporaryDirectory() as folder:
        model = f"{PREFIX}{write(recipe, Path(folder) / recipe)}"
        s = build(Finetune, RECIPES.get(recipe).finetune | {"model": model})
        planned = plan_pipeline_for(s, GPUS, all_weights=False)
    found = []
    for gib, plans in zip(GPUS, planned, strict=True):
        (plan,) = plans.values()
        found.append({
            "gpu_gib": gib, "fits": plan.fits, "micro_batch": plan.micro_batch, "chunk": plan.chunk, "peak": plan.peak,
            "phases": plan.phases, "weights": plan.weights, "velocity_tflop": plan.flops / 1e12,
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=[*MODELS], metavar="RECIPE")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    kept = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    for recipe in arguments.recipes:
        kept[recipe] = rows(recipe)
        arguments.out.write_text(
            json.dumps({name: kept[name] for name in MODELS if name in kept}, indent=1) + "\n"
        )
        for row in kept[recipe]:
            print(
                f"{recipe}, {row['gpu_gib']} GiB: {row['peak'] / 2**30:.1f} GiB, micro-batch {row['micro_batch']}, "
                f"chunk {row['chunk']}{'' if row['fits'] else ': too small'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
