"""The device, the number format of a network, and the cache folder."""

import os
import platform
from pathlib import Path

import torch

from orwcfm_fast.errors import UserError, WorkError

OUT_OF_MEMORY = (
    "can't allocate memory",  # the CPU's allocator
    "out of memory",  # the CUDA driver, also by way of Triton and NCCL
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN, of a handle or a workspace
    "unable to find an engine to execute",  # cuDNN, where no engine's workspace fits
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU's, the CPU allocator's or Python's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, WorkError):  # this package's own, whose text may quote one
        return False
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def resolve_device(name: str) -> torch.device:
    """The torch device of a name: auto, cpu, cuda or cuda:N. A GPU that is named by number becomes the current one.

    Raises:
        UserError: the name is no device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}': not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device '{name}': this machine has {torch.cuda.device_count()} CUDA GPUs; use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}': only cpu and cuda are supported")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where events, streams and graphs are made
    return device


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        named = platform.processor() or platform.machine()
    return f"{named}, {torch.get_num_threads()} threads"


def fast_bf16(device: torch.device, parameters: int = 10**9) -> bool:
    """Whether a network of that many parameters computes faster in bfloat16 on the device.

    A GPU of compute capability 8.0 or a CPU with AMX gains from 200,000 parameters. A CPU with AVX512-BF16 alone
    multiplies about twice as fast, which outweighs the casts from 10 million parameters.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) and parameters >= 200_000
    can = torch.cpu.get_capabilities()
    if can.get("amx_tile"):
        return parameters >= 200_000
    return bool(can.get("avx512_bf16")) and parameters >= 10_000_000


def resolve_precision(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """The dtype of auto, fp32 or bf16; auto is the faster one for a network of that many parameters."""
    if name == "auto":
        return torch.bfloat16 if fast_bf16(device, parameters) else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def cache_dir() -> Path:
    """The folder $ORWCFM_CACHE, by default ~/.cache/orwcfm."""
    return Path(os.environ.get("ORWCFM_CACHE") or Path.home() / ".cache" / "orwcfm")
