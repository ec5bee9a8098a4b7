"""What the machine offers to a process of the run: CPU cores, and shared memory for loader workers."""

import os
import shutil

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
        workers = min(workers, shutil.disk_usage(SHARED_MEMORY).free // (3 * batch * local))  # 2 ahead, 1 on its way
    return workers
