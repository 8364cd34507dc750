"""triton and triton.language, or stand-ins where triton has no wheel (macOS): kernels then only import."""

from types import SimpleNamespace
from typing import Any

triton: Any
tl: Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda fn: SimpleNamespace(fn=fn))
    tl = SimpleNamespace(constexpr=object)
