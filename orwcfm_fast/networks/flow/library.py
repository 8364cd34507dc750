"""Names of pipelines, `diffusers:PATH_OR_ID`, and the library that they are of; imports nothing heavy by itself."""

from typing import Any

from orwcfm_fast.errors import UserError

PREFIX = "diffusers:"
PIPELINE_DEFAULTS = {"lr": 1e-4, "chunk": 8, "eval_n": 64, "grid": "own"}
"""Its samples cost seconds; its adapters learn at the rate that diffusers' own scripts give them."""


def is_pipeline(model: str) -> bool:
    return model.startswith(PREFIX)


def library() -> Any:
    """diffusers, without its log lines and progress bars.

    Raises:
        UserError: the extra is missing; says how to install it.
    """
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise UserError(
            f"model diffusers:…: {error.name or error} is missing: pip install 'orwcfm-fast[diffusers]'"
        ) from None
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return diffusers
