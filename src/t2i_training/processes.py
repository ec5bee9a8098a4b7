"""Several processes of one run waiting for each other over the CPU (gloo): no device is waited for, and no time limit.

A collective on the device gives up after ten minutes, and writing a checkpoint, or preparing a data set, may take more.
"""

import contextlib
import datetime

import torch
import torch.distributed

_group = None


def connect() -> None:
    """Call once on every process, where there are several."""
    global _group
    _group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


@contextlib.contextmanager
def _together():
    """The end of another process ends this one too, in silence: that one has said why."""
    try:
        yield
    except RuntimeError:  # gloo's, of a connection that is closed
        raise SystemExit(1) from None


def wait(accelerator) -> None:
    """Wait for all processes."""
    if accelerator.num_processes > 1:
        with _together():
            torch.distributed.barrier(group=_group)


def largest(accelerator, number: int) -> int:
    """The largest of the processes' numbers, on all of them."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number)
    with _together():
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=_group)
    return int(tensor)


@contextlib.contextmanager
def main_first(accelerator):
    """The main process goes through this block before the others do."""
    if not accelerator.is_main_process:
        wait(accelerator)
    yield
    if accelerator.is_main_process:
        wait(accelerator)
