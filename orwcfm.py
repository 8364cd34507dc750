"""The public API under the name of the tool: `from orwcfm import ORWCFMTrainer`."""

from orwcfm_fast import __all__ as __all__
from orwcfm_fast import __getattr__ as __getattr__
from orwcfm_fast import __version__ as __version__
