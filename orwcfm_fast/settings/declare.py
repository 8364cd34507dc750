"""How a setting is declared, and the settings that every command has."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PANELS = (
    "Method", "Reward", "Model and data", "Sampling", "Measures", "Training", "Large models", "Safety", "Output",
    "Machine",
)  # fmt: skip
"""The groups of a command's help, in the order in which a user decides."""

Precision = Literal["auto", "fp32", "bf16"]


def setting(
    default: Any,
    *,
    panel: str,
    help: str,
    default_text: str = "",
    metavar: str = "",
    complete: str = "",
    **bounds: Any,
) -> Any:
    """A field of a settings class.

    Args:
        panel: one of PANELS, under which the option stands in `--help`.
        help: what the setting does, with its unit.
        default_text: the default in words, where the value itself (0, "", None) does not tell it.
        metavar: the placeholder of the value in `--help`; by default its type.
        complete: a kind of `orwcfm list` whose names the shell offers as values.
        bounds: of pydantic's `Field`: ge, gt, le, lt, allow_inf_nan.
    """
    assert panel in PANELS
    shown: dict[str, Any] = {
        "panel": panel, "default_text": default_text, "metavar": metavar, "complete": complete,
    }  # fmt: skip
    return Field(default, description=help, json_schema_extra=shown, **bounds)


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    seed: int = setting(0, panel="Machine", help="seed of all random numbers", ge=-(2**63), lt=2**63)
    device: str = setting("auto", panel="Machine", help="auto, cpu, cuda or cuda:N", metavar="DEVICE")
    precision: Precision = setting(
        "auto",
        panel="Machine",
        help="number format of the network; auto chooses bf16 where the device computes faster in it",
    )


class DataFolder(Settings):
    """Where datasets that are downloaded lie."""

    data_dir: str = setting(
        "",
        panel="Model and data",
        help="folder of downloaded datasets",
        default_text="in the cache folder",
        metavar="FOLDER",
    )
