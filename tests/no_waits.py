"""A run in whose middle torch raises at whatever makes the host wait for the GPU; or: no_waits.py SCRIPT FLAGS...

Training is fast as long as Python runs ahead of the device. It may wait to read the losses, once a logging interval.
"""

import contextlib
import runpy
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

UPDATES = 5  # of a run inside; no logging interval may end before the last


@contextlib.contextmanager
def host_never_waits():
    """Between the ends of the second and the fourth weight update made inside, a wait is a RuntimeError.

    Not earlier: when several processes make the second, DDP agrees, once, on the order of its buckets. Not at all where
    they talk over gloo, which takes gradients through host memory.
    """
    modes, wanted = [], []

    def watch(_optimizer, _args, _kwargs):
        modes.append(torch.cuda.get_sync_debug_mode())
        over_gloo = torch.distributed.is_initialized() and "nccl" not in torch.distributed.get_backend_config()
        torch.cuda.set_sync_debug_mode("error" if len(modes) in (2, 3) and not over_gloo else "default")
        wanted[:] = [0, 0, *([0, 0] if over_gloo else [2, 2]), 0]

    hook = register_optimizer_step_post_hook(watch)
    try:
        yield
    finally:
        hook.remove()
        torch.cuda.set_sync_debug_mode("default")
    assert len(modes) == UPDATES
    assert modes == wanted


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with host_never_waits():
        runpy.run_path(sys.argv[0], run_name="__main__")
