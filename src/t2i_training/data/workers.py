"""The number of loader workers per process, from the CPU cores and the shared memory available."""

import os
import shutil

from ..log import logger

SHARED_MEMORY = "/dev/shm"  # loader workers pass their batches through it


def cores() -> int:
    """CPU cores per process: those it may run on, divided by the run's processes on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def loader_workers(args, pixels: int) -> int:
    """--dataloader_num_workers; by default the cores minus one, at most 8, and as many as fit into shared memory, each
    with batches of so many `pixels`.
    """
    if args.dataloader_num_workers is not None:
        return args.dataloader_num_workers
    workers = min(8, cores() - 1)
    if workers and os.path.isdir(SHARED_MEMORY):  # containers often have 64 MB, and a worker that exceeds it dies
        batch = 8 * pixels  # bytes: colours, perhaps twice, and noise
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # Per worker: 2 batches ahead, 1 in transfer.
        hold = shutil.disk_usage(SHARED_MEMORY).free // (3 * batch * local)
        if hold < workers:
            logger.warning(
                f"{SHARED_MEMORY} holds the batches of {hold} loader workers, not of {workers}: loading may be slower; "
                "give the container more (docker run --shm-size=8g), or --dataloader_num_workers"
            )
        workers = min(workers, hold)
    return workers
