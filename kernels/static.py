"""What the kernels compile to, without a GPU: `python -m orwcfm_fast.kernels.static [--json]`.

Each launch is compiled as the launcher would run it (argument alignments included) for sm_80, sm_90 and
sm_100; figures come from the cubin's SASS. Not under TRITON_INTERPRET=1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from orwcfm_fast.kernels._launch import Launch
from orwcfm_fast.kernels._triton import triton
from orwcfm_fast.kernels.anchored_residual import plan_anchored_residual
from orwcfm_fast.kernels.group_norm_silu import plan_group_norm_silu, plan_group_norm_silu_backward
from orwcfm_fast.kernels.interpolate import plan_interpolate
from orwcfm_fast.kernels.random_numbers import plan_draw

TARGETS = (80, 90, 100)
IMAGES, MASKED, ODD, HUGE = (1024, 3, 32, 32), (1024, 1, 28, 28), (1024, 1023), (1, 2**31 + 1024)
FEW = (64, 3, 32, 32)  # cut into smaller programs, so that every multiprocessor has some
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


MAPS = {  # of the CIFAR-10 U-Net, and of a larger image, whose pixels do not fit into registers at once
    "128x32x32": (64, 128, 32, 32),
    "256x16x16": (64, 256, 16, 16),
    "384x32x32": (64, 384, 32, 32),
    "128x64x64": (16, 128, 64, 64),
}


class Row(NamedTuple):
    """One kernel on one target; the last three are those of kernels that run over elements without a loop."""

    kernel: str
    case: str
    target: str
    registers: int
    stack: int
    local: int
    narrowest: int | None
    """bytes of the narrowest global access"""
    bytes_per_element: float | None
    instructions_per_element: float | None
    """of the whole program"""


def launches() -> Iterator[tuple[str, Launch]]:
    """Every kernel in every way in which it is compiled for common shapes; on meta tensors, aligned."""
    yield from _launches_of_the_path()
    yield from _launches_of_the_norm()
    seed, index = (torch.empty(n, dtype=torch.int64, device="meta") for n in ((), (1024,)))
    for case, kind, shape, dtype in (
        ("t", "uniform", (), torch.float32),
        ("3x32x32", "normal", (3, 32, 32), torch.float32),
        ("3x5x5", "normal", (3, 5, 5), torch.float32),
        ("of 50000", "choice", (), torch.int64),
    ):
        yield f"{kind}, {case}", plan_draw(kind, shape, seed, index, 1, dtype, 50000)[0][0]


def _launches_of_the_norm() -> Iterator[tuple[str, Launch]]:
    cases = [(shape, torch.bfloat16) for shape in MAPS] + [("128x32x32", torch.float32)]
    for shape, dtype in cases:
        x = torch.empty(MAPS[shape], dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        p = torch.empty(x.shape[1], device="meta")
        launch, (_, mean, rstd) = plan_group_norm_silu(x, p, p, 32, True)
        yield f"{_TYPES[dtype]}, {shape}", launch[0]
        yield f"{_TYPES[dtype]}, {shape}", plan_group_norm_silu_backward(x, x, p, p, mean, rstd, True)[0][0]


def _launches_of_the_path() -> Iterator[tuple[str, Launch]]:
    def samples(shape, dtype, last=False):
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.to(memory_format=torch.channels_last) if last else x

    def per_sample(batch):
        seed = torch.empty((), dtype=torch.int64, device="meta")
        return seed, torch.empty(batch, dtype=torch.int64, device="meta"), samples(batch, torch.float32)

    cases = [(d, d, IMAGES, False) for d in (torch.bfloat16, torch.float16, torch.float32)]
    cases += [(torch.bfloat16, torch.float32, IMAGES, False)]
    cases += [
        (torch.bfloat16, torch.bfloat16, *rest)
        for rest in ((MASKED, False), (ODD, False), (IMAGES, True), (FEW, False))
    ]
    for dtype, x1_dtype, shape, last in cases:
        v, x1 = samples(shape, dtype, last), samples(shape, x1_dtype, last)
        seed, index, w = per_sample(shape[0])
        name = _TYPES[dtype] + (f", x1 {_TYPES[x1_dtype]}" if x1_dtype != dtype else "")
        name += (
            ", channels_last"
            if last
            else {MASKED: ", masked", ODD: ", odd D", FEW: ", batch 64"}.get(shape, "")
        )
        yield name, plan_anchored_residual(v, v, x1, seed, index, w, w)[0][0]
        if dtype == x1_dtype:
            yield name, plan_interpolate(x1, w, seed, index)[0][0]
            yield f"{name}, t drawn", plan_interpolate(x1, None, seed, index)[0][0]
            yield f"{name}, late t drawn", plan_interpolate(x1, None, seed, index, late=True)[0][0]
    for name, which, v in (
        ("bf16, D > 2^31", 0, samples(HUGE, torch.bfloat16)),  # 64-bit sizes
        ("fp32", 1, samples((2, 2**20), torch.float32)),  # sums of chunks
    ):
        seed, index, w = per_sample(v.shape[0])
        yield name, plan_anchored_residual(v, v, v, seed, index, w, w)[0][which]


def compile_launch(launch: Launch, target: int):
    """Compile as the launcher would specialise: 16-divisible pointers and integers, ones folded."""
    constants, attributes, signature = {}, {}, {}
    options = {"num_warps": 4, "enable_fp_fusion": True} | {
        k: v for k, v in launch.meta.items() if not k.isupper()
    }
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.args.get(name, launch.meta.get(name))
        if name.isupper() or (isinstance(value, int) and value == 1):
            constants[name], signature[name] = value, "constexpr"
            continue
        if isinstance(value, torch.Tensor):
            signature[name], number = "*" + _TYPES[value.dtype], 0  # a launcher's own allocation
        elif isinstance(value, int):
            signature[name], number = "i32" if -(2**31) <= value < 2**31 else "i64", value
        else:
            signature[name], number = "fp32", 1
        if number % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=triton.backends.compiler.GPUTarget("cuda", target, 32), options=options
    )


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def _width(op: str) -> int:
    return next((_WIDTHS[part] for part in op.split(".") if part in _WIDTHS), 4)


def measure(launch: Launch, case: str, target: int) -> Row:
    """Figures of one compiled launch."""
    cubin = compile_launch(launch, target).asm["cubin"]
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1])  # type: ignore[index]
        for what in ("REG", "STACK", "LOCAL")
    )
    sass = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", _cuobjdump(cubin, "-sass"))
    code = [op for op in sass if op != "NOP"]
    local += sum(_width(op) for op in code if op.startswith(("LDL", "STL")))
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    row = Row(name, case, f"sm_{target}", registers, stack, local, None, None, None)
    per_thread = _elements_of_a_thread(launch)
    if per_thread is None:
        return row
    # single numbers of a sample or of a group are read and written 8 (seed, index) or 4 bytes at a time
    widths = [_width(op) for op in code if op.startswith(("LDG", "STG")) and _width(op) not in (4, 8)]
    return row._replace(
        narrowest=min(widths),
        bytes_per_element=round(sum(widths) / per_thread, 2),
        instructions_per_element=round(len(code) / per_thread, 1),
    )


def _elements_of_a_thread(launch: Launch) -> float | None:
    """That a thread computes in the whole program, where that has no loop."""
    meta = launch.meta
    if "BLOCKS" in meta:
        return meta["BLOCKS"] * meta["BLOCK"] / (32 * meta["num_warps"])
    if meta.get("HELD"):
        return meta["PIXELS"] * meta["TILE"] * meta["LANES"] / (32 * meta["num_warps"])
    return None


def table(rows: list[Row]) -> str:
    """Markdown, as kernels/README.md shows it."""
    head = "| kernel | case | target | registers | stack B | local B | narrowest access | B an element | instructions |"

    def cell(x):
        return "" if x is None else f"{x:g}" if isinstance(x, float) else str(x)

    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(Row._fields), *lines])


def measure_all(targets: tuple[int, ...] = TARGETS) -> list[Row]:
    """Every launch on every target; about 30 s where triton's cache is cold."""
    work = [(launch, case, target) for target in targets for case, launch in launches()]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda args: measure(*args), work))


if __name__ == "__main__":
    figures = measure_all()
    print(json.dumps([row._asdict() for row in figures]) if "--json" in sys.argv else table(figures))
