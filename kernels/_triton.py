"""triton and triton.language, or stand-ins where triton has no wheel (macOS): kernels then only import."""

import os
from types import SimpleNamespace
from typing import Any

triton: Any
tl: Any

try:
    triton, tl = __import__("triton"), __import__("triton.language").language
except ImportError:

    class _Constexpr:
        def __init__(self, value: Any):
            self.value = value

    triton = SimpleNamespace(jit=lambda fn: SimpleNamespace(fn=fn))
    tl = SimpleNamespace(constexpr=_Constexpr)

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in triton's interpreter, which has no inline assembly."""
