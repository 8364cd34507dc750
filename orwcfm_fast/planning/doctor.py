"""What orwcfm finds on this machine: versions, device, kernels, folders."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from orwcfm_fast.device import cache_dir, device_name, fast_bf16, resolve_device

PACKAGES = (
    "orwcfm-fast",
    "torch",
    "triton",
    "torchvision",
    "torchcfm",
    "open_clip_torch",
    "POT",
    "torch-fidelity",
    "wandb",
    "diffusers",
    "transformers",
)


def examine() -> dict[str, dict[str, str]]:
    """What was found, by section and name."""
    device = resolve_device("auto")
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "device": _device(device),
        "kernels": _kernels(device),
        "places": {
            "cache": f"{cache_dir()} ({'writable' if _writable(cache_dir()) else 'NOT writable'})",
            "runs": os.path.abspath("runs"),
            "free disk": f"{shutil.disk_usage('.').free / 1e9:.0f} GB",
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device(device: torch.device) -> dict[str, str]:
    sizes = {"MLPs": 50_000, "the digits U-Net": 700_000, "the CIFAR-10 U-Net": 36_000_000}
    precision = ", ".join(f"{'bf16' if fast_bf16(device, n) else 'fp32'} for {k}" for k, n in sizes.items())
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": f"{device} ({device_name(device)}, {memory / 2**30:.0f} GiB)",
        "precision auto": precision,
    }


def _kernels(device: torch.device) -> dict[str, str]:
    if device.type == "cuda" and _version("triton") != "not installed":
        which = "Triton kernels, because the device is a GPU"
    elif device.type == "cuda":
        which = "none: the device is a GPU but triton is not installed (pip install triton)"
    else:
        which = "plain-torch reference, because the device is a CPU"
    return {op: which for op in ("interpolate", "anchored_residual", "group_norm_silu", "random numbers")}


def _writable(path) -> bool:
    while not path.exists():
        path = path.parent
    return os.access(path, os.W_OK)
