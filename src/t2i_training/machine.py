"""What the machine offers to a process of the run, CPU cores and memory; what is said where it is too little."""

import os
import shutil
import sys
from traceback import walk_tb

from . import texts
from .log import logger

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


STEP_ADVICE = (
    "lower --train_batch_size (and raise --gradient_accumulation_steps as much), or take --gradient_checkpointing, "
    "--cache_encodings, --mixed_precision=bf16"
)
PHASES = {  # function on the stack, the outermost first -> (what the run was doing, what to change)
    "inspect": ("looking at the pictures", "free host memory"),
    "load_models": ("loading the models", "free memory on host and GPU"),
    "cached": ("encoding", "lower --train_batch_size or --resolution, or leave --cache_encodings out"),
    "make_ema": ("making the average", "leave --use_ema out, or, for Stable Diffusion, take --offload_ema"),
    "make_optimizer": ("making the optimizer", STEP_ADVICE),
    "restore": ("reading the checkpoint", STEP_ADVICE),
    "validate": ("drawing validation pictures", "lower --resolution, or draw none: leave --validation_prompt(s) out"),
    "publish": ("exporting the model", "free memory; --resume_from_checkpoint=latest exports again"),
}  # fmt: skip


def explain_out_of_memory() -> None:
    """Have this process end with one line, and no stack trace, where the GPU's or the host's memory is used up."""

    before = sys.excepthook
    if before.__module__ == __name__:  # of an earlier run in this process
        return

    def hook(kind, error, traceback):
        line = out_of_memory(kind, error, traceback)
        if line is None:
            return before(kind, error, traceback)
        print(f"error: {line}", file=sys.stderr)

    sys.excepthook = hook


def out_of_memory(kind, error, traceback) -> str | None:
    """What is said of an exception that means too little memory, None for others. Closes the bar, names its step."""
    from . import runtime

    reason = texts.reason(error)
    worker = "dataloader worker" in reason.lower() and ("killed" in reason or "exited unexpectedly" in reason)
    words = ("out of memory", "allocate memory", "resource_exhausted", "shared memory")
    if not worker and not issubclass(kind, MemoryError) and not any(word in reason.lower() for word in words):
        return None
    names = [frame.f_code.co_name for frame, _ in walk_tb(traceback)]
    doing, advice = next((PHASES[name] for name in names if name in PHASES), ("starting", STEP_ADVICE))
    if runtime.steps and doing == "starting":
        before, made = runtime.steps
        doing, advice = f"step {made + 1}", STEP_ADVICE
        if made > before:
            advice += "; --resume_from_checkpoint=latest continues from the last checkpoint"
    if runtime.progress_bar is not None:
        runtime.progress_bar.close()
    if worker or issubclass(kind, MemoryError) or "shared memory" in reason:
        doing, advice = f"host memory, {doing}", "lower --dataloader_num_workers, or give the container more memory"
    process = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    return f"out of memory{process}, {doing}: {advice} ({kind.__name__}: {reason[:200]})"
