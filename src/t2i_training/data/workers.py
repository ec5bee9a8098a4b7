"""How many loader workers a process starts, by the CPU cores and the shared memory that there are."""

import os
import shutil

from ..log import logger

SHARED_MEMORY = "/dev/shm"  # where loader workers put their batches


def cores() -> int:
    """CPU cores for this process: those it may run on, shared with the run's other processes on the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def loader_workers(args, batch_size: int) -> int:
    """--dataloader_num_workers; by default one on each core but one, 8 at most, and as many as shared memory holds."""
    if args.dataloader_num_workers is not None:
        return args.dataloader_num_workers
    workers = min(8, cores() - 1)
    if workers and os.path.isdir(SHARED_MEMORY):  # containers are often given 64 MB, and beyond it a worker dies
        batch = 8 * args.resolution**2 * batch_size  # bytes: pixels, perhaps twice, and what is drawn
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        hold = shutil.disk_usage(SHARED_MEMORY).free // (3 * batch * local)  # workers' batches: 2 ahead, 1 on its way
        if hold < workers:
            logger.warning(
                f"{SHARED_MEMORY} holds the batches of {hold} loader workers, not of {workers}: loading may be slower; "
                "give the container more (docker run --shm-size=8g), or --dataloader_num_workers"
            )
        workers = min(workers, hold)
    return workers
