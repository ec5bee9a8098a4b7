"""Why a run is on the CPU although the machine has a GPU: what its environment, torch, container and driver say."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from ..log import logger

# Of a container that was started without its GPUs, DEVICES has none, and LISTED all of the machine.
DEVICES, LISTED = Path("/dev"), Path("/proc/driver/nvidia/gpus")
WSL_TOOL = "/usr/lib/wsl/lib/nvidia-smi"
VARIABLES = {
    "NVIDIA": ("CUDA_VISIBLE_DEVICES",),
    "AMD": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}
HIDING = ("", "-1", "nodevfiles")  # the last is Slurm's, for a job without a GPU
ASK = "on a cluster, ask for a GPU (Slurm: --gres=gpu:1)"


def report(asked: str | None, other_build: Callable[[str], str | None], begin: Callable[[], object]) -> None:
    """Log one line, with the reason and the way out, if there is a sign of a GPU; for a run that is on the CPU.

    `asked` says where the CPU was asked for; then the line is no warning. `other_build(maker)` tells what is wrong if
    the framework is built for something else than that maker's GPUs, and `begin()` raises its error.
    """
    found = _find()
    if found is None:
        return
    maker, evidence = found
    line = f"training on the CPU, although {evidence}"
    if asked:
        logger.info(f"{line}: {asked}")
    else:
        reason = _hidden(maker) or other_build(maker) or _closed(maker) or _broken(maker, begin)
        logger.warning(f"{line}: {reason}")


def report_torch(asked: bool) -> None:
    """`report` for torch; `asked`: accelerate was told to use the CPU."""
    where = "accelerate is set to use the CPU (`accelerate config`, --cpu or ACCELERATE_USE_CPU)" if asked else None
    report(where, _other_torch, torch.cuda.init)


def _other_torch(maker: str) -> str | None:
    wanted = {"NVIDIA": "cuda", "AMD": "hip"}[maker]
    if getattr(torch.version, wanted) is not None:
        return None
    built = "for CUDA" if torch.version.cuda else "for ROCm" if torch.version.hip else "without GPUs"
    return (
        f"torch {torch.__version__} is built {built}: install torch and torchvision for "
        f"{'CUDA' if wanted == 'cuda' else 'ROCm'}, as https://pytorch.org/get-started/locally says"
    )


def _find() -> tuple[str, str] | None:
    """(maker, what speaks for a GPU of theirs); None if nothing does."""
    models = dict.fromkeys(_model(entry / "information") for entry in _entries(LISTED))
    if models:
        return "NVIDIA", f"this machine has {', '.join(models)}"
    if devices := _devices("NVIDIA"):
        return "NVIDIA", f"there is {devices[0]}"
    if _tool():
        return "NVIDIA", "nvidia-smi is installed"
    if devices := _devices("AMD"):
        return "AMD", f"there is {devices[0]}, of an AMD GPU"
    return None


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _model(file: Path) -> str:
    found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(errors="replace"), re.M) if file.is_file() else None
    return found[1] if found else "an NVIDIA GPU"


def _devices(maker: str) -> list[Path]:
    if maker == "AMD":
        return [path for path in [DEVICES / "kfd"] if path.exists()]
    return sorted(path for path in DEVICES.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal())


def _tool() -> str | None:
    return shutil.which("nvidia-smi") or (WSL_TOOL if os.path.exists(WSL_TOOL) else None)


def _hidden(maker: str) -> str | None:
    for name in VARIABLES[maker]:
        value = os.environ.get(name)
        if value is not None and value.strip().lower() in HIDING:
            return f"{name}={value} hides it: unset it or, {ASK}"
    return None


def _closed(maker: str) -> str | None:
    """A container or a job that was not given the device, or a user who may not open it."""
    devices = _devices(maker)
    if not devices and _entries(LISTED):
        return "this container was started without it: docker run --gpus all, apptainer --nv"
    for device in devices:
        try:
            os.close(os.open(device, os.O_RDWR))
        except PermissionError as error:
            way_out = "become a member of the groups render and video" if maker == "AMD" else ASK
            return f"{device} cannot be opened ({error.strerror}): {way_out}"
        except OSError:  # the driver fails, of which `_broken` says more
            return None
    return None


def _broken(maker: str, begin: Callable[[], object]) -> str:
    """What the framework says when it is made to begin and, if that is not enough, what the driver's tool says."""
    try:
        begin()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
    else:
        reason = "no reason is given"
    if old := re.search(r"driver on your system is too old \(found version (\d+)\)", reason):
        version = f"{int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}"
        return (
            f"its driver is for CUDA {version}, and torch {torch.__version__} for CUDA {torch.version.cuda}: update "
            "the driver, or install a torch for the driver's CUDA"
        )
    named = [f"{name}={os.environ[name]}" for name in VARIABLES[maker] if name in os.environ]
    hint = f" ({named[0]} may name none that is there)" if named else ""
    return f"{reason}{hint}; {_tool_says() if maker == 'NVIDIA' else 'see what rocminfo says'}"


def _tool_says() -> str:
    tool = _tool()
    if tool is None:
        return "see what nvidia-smi says"
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run: {type(error).__name__}"
    said = next((line for line in (done.stdout + done.stderr).splitlines() if line.strip()), "nothing")
    return f"nvidia-smi says: {said.strip()[:200]}"
