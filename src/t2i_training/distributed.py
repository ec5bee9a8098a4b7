"""Barriers and reductions over gloo, on the CPU: without a time limit, and without waiting for the device.

NCCL's collectives time out after ten minutes, and rank 0 may take longer to write a checkpoint or prepare a data set.
"""

import contextlib
import datetime
import os

import torch
import torch.distributed

from .errors import RunError

_group = None  # torch's process groups live as long as the process, and accelerate's objects have no field for one


def init_cpu_group() -> None:
    """Make the gloo group. Call once on every process of a run with several."""
    global _group
    _group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def never_joined() -> str | None:
    """A warning for a process that is alone although the environment speaks of several. Exits if WORLD_SIZE says so.

    The tasks of a cluster or of MPI may be independent runs with an output folder each: these only get the warning.
    """
    names = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    name = next((name for name in names if os.environ.get(name, "").isdecimal()), None)  # a launcher's comes first
    way_out = "start them with `torchrun --nproc_per_node=N SCRIPT`, on a cluster one torchrun for each node"
    if name and int(os.environ[name]) > 1:
        alone = f"{os.environ[name]} processes were asked for ({name}), and this one is alone: {way_out}"
        if name == "WORLD_SIZE":
            raise RunError(alone)
        return alone
    if name is None and "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        return f"`accelerate launch` was asked for several processes, and on the CPU it starts one: {way_out}"
    return None


@contextlib.contextmanager
def _together():
    """If another rank died, exit quietly: it has already reported the reason."""
    try:
        yield
    except RuntimeError:  # what gloo raises when a connection is closed
        raise SystemExit(1) from None


def barrier(accelerator) -> None:
    """Wait for all processes."""
    if accelerator.num_processes > 1:
        with _together():
            torch.distributed.barrier(group=_group)


def all_reduce_max(accelerator, number: int) -> int:
    """The largest of all ranks' numbers, on every rank."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number)
    with _together():
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=_group)
    return int(tensor)


def prepare(accelerator, network, optimizer):
    """accelerate's `prepare` behind a barrier: DDP starts with a collective on the device, which has a time limit."""
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
