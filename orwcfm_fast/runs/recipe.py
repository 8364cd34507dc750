"""Recipes: whole experiments as TOML files that ship with the package."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orwcfm_fast.checkpoints.shipped import shipped
from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import Registry
from orwcfm_fast.runs.run import newest_run

RECIPES = Registry("recipe")
FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Recipe:
    """One experiment: the settings of its commands, as far as they are not the defaults.

    Attributes:
        pretrain, finetune: settings by name; no `pretrain` where a published pipeline is fine-tuned.
        sweep: lists of settings to compare.
    """

    name: str
    title: str
    pretrain: dict[str, Any]
    finetune: dict[str, Any]
    sweep: dict[str, list[Any]]

    def __post_init__(self) -> None:
        swept = "; ".join(
            f"{key} {', '.join(f'{v:g}' for v in values)}" for key, values in self.sweep.items()
        )
        object.__setattr__(self, "__doc__", f"{self.title}; {swept}" if swept else self.title)

    def pretraining(self) -> dict[str, Any]:
        """Settings of its pretraining.

        Raises:
            UserError: it has none.
        """
        if not self.pretrain:
            raise UserError(
                f"recipe '{self.name}': fine-tunes a published pipeline; nothing is pretrained, "
                f"start with orwcfm finetune --recipe {self.name}"
            )
        return self.pretrain

    def pretrained(self) -> str:
        """The newest run under ./runs that pretrained this recipe's model, else the model itself where it ships.

        Raises:
            UserError: there is neither.
        """
        model = self.pretrain["model"]
        run = newest_run(f"pretrain-{self.pretrain['data']}-*", model=model)
        if run is None and shipped(model):
            return model
        if run is None:
            raise UserError(
                f"recipe '{self.name}': no pretrained model under ./runs; first orwcfm pretrain --recipe {self.name}, "
                "or name one with --checkpoint"
            )
        return str(run)


def _read(file: Path) -> Recipe:
    found = tomllib.loads(file.read_text("utf-8"))
    pretrain = found.get("pretrain", {})
    if isinstance(pretrain, str):  # that of another recipe
        pretrain = tomllib.loads((FOLDER / f"{pretrain}.toml").read_text("utf-8"))["pretrain"]
    return Recipe(file.stem, found["title"], pretrain, found["finetune"], found.get("sweep", {}))


for _file in sorted(FOLDER.glob("*.toml")):
    RECIPES.register(_file.stem)(_read(_file))
