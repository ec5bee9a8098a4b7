"""Several processes of one run waiting for each other over the CPU (gloo): no device is waited for, and no time limit.

A collective on the device gives up after ten minutes, and writing a checkpoint, or preparing a data set, may take more.
"""

import contextlib
import datetime
import os

import torch
import torch.distributed

from .errors import RunError

_group = None  # torch keeps groups for the process, and the accelerator, which all calls here get, has no place for one


def init_cpu_group() -> None:
    """Call once on every process, where there are several."""
    global _group
    _group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def launched() -> bool:
    """Whether torchrun, or what goes about it likewise, has started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def never_joined() -> str | None:
    """What to say in a process that is alone, where the environment tells of several; exits where it is one of them.

    Tasks of a cluster or of MPI may be runs of their own, each with its output folder, and so may go on.
    """
    names = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    name = next((name for name in names if os.environ.get(name, "").isdecimal()), None)  # a launcher's comes first
    way_out = "start them with `torchrun --nproc_per_node=N SCRIPT`, on a cluster one torchrun for each node"
    if name and int(os.environ[name]) > 1:
        alone = f"{os.environ[name]} processes were asked for ({name}), and this one is alone: {way_out}"
        if name == "WORLD_SIZE":
            raise RunError(f"{alone}")
        return alone
    if name is None and "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        return f"`accelerate launch` was asked for several processes, and on the CPU it starts one: {way_out}"
    return None


@contextlib.contextmanager
def _together():
    """The end of another process ends this one too, in silence: that one has said why."""
    try:
        yield
    except RuntimeError:  # gloo's, of a connection that is closed
        raise SystemExit(1) from None


def barrier(accelerator) -> None:
    """Wait for all processes."""
    if accelerator.num_processes > 1:
        with _together():
            torch.distributed.barrier(group=_group)


def all_reduce_max(accelerator, number: int) -> int:
    """The largest of the processes' numbers, on all of them."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number)
    with _together():
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=_group)
    return int(tensor)


def prepare(accelerator, network, optimizer):
    """accelerate's `prepare`, when all processes have come here: DDP's first collective, on the device, has a limit."""
    barrier(accelerator)
    return accelerator.prepare(network, optimizer)


@contextlib.contextmanager
def main_first(accelerator):
    """The main process goes through this block before the others do."""
    if not accelerator.is_main_process:
        barrier(accelerator)
    yield
    if accelerator.is_main_process:
        barrier(accelerator)
