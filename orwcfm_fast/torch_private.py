"""All that the package uses of torch's private modules; only the memory plan of a pipeline needs them.

There is no public name for any of them up to torch 2.15. A release that moves one fails here, and nowhere else.
"""

import torch

from orwcfm_fast.errors import WorkError

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map
except ImportError as error:
    raise WorkError(
        f"the memory plan of a pipeline needs names that torch {torch.__version__} has moved ({error}); "
        "it was made with torch 2.11 to 2.15"
    ) from error

__all__ = ["FakeTensorMode", "TorchDispatchMode", "tree_leaves", "tree_map"]
