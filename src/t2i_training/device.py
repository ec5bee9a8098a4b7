"""What differs between kinds of devices: NVIDIA's and AMD's GPUs ("cuda"), Intel's ("xpu"), Apple's ("mps"), the CPU.

`torch.accelerator` hides most of it, memory figures from torch 2.9 on; the modules that it calls are in every release.
"""

import re

import torch

from . import sanitize
from .errors import RunError


def pins_memory(device: torch.device) -> bool:
    """Whether pinned host memory makes copies to the device faster: not if it shares the host's memory, or has none."""
    return device.type not in ("cpu", "mps", "meta")


def release_memory(device: torch.device) -> None:
    """Return the allocator's unused blocks, whose sizes the next phase of a run may not need."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def restart_peak_memory(device: torch.device) -> None:
    if _counts_memory(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that torch's allocator had given out at once since the restart; None where it does not count."""
    return torch.get_device_module(device).max_memory_allocated(device) if _counts_memory(device) else None


def _counts_memory(device: torch.device) -> bool:
    return hasattr(torch.get_device_module(device), "max_memory_allocated")  # neither the CPU's nor Apple's


def name(device: torch.device) -> str:
    """What its driver calls it, e.g. "NVIDIA L4"; of devices that tell no name their kind."""
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 works on it in software alone: NVIDIA's before Ampere."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def try_out(device: torch.device) -> None:
    """Run one kernel. Exits with one line if this torch was built for other GPUs, or the driver or the GPU fails."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Cut off what CUDA adds for developers.
        reason = re.split(" Search for `| CUDA kernel errors might", sanitize.reason(error))[0]
        if "no kernel image" in reason:
            major, minor = torch.cuda.get_device_capability(device)
            built = " ".join(torch.cuda.get_arch_list())
            raise RunError(
                f"torch {torch.__version__} has no kernels for {name(device)} (sm_{major}{minor}), it is built for "
                f"{built}: install one that is, as https://pytorch.org/get-started/previous-versions says"
            ) from error
        raise RunError(
            f"the GPU does not work ({reason[:200]}): the driver's tool (nvidia-smi, rocm-smi, xpu-smi) may say which "
            "process holds it"
        ) from error
