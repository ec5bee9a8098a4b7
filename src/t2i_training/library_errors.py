"""Turns exceptions of libraries into one line that says what failed and what to do. Imports no torch."""

import contextlib
import errno
import os
from traceback import walk_tb

from . import sanitize, stopping
from .errors import RunError, Unfit

_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


@contextlib.contextmanager
def readable_errors(flag: str, value: str):
    """Turn any exception within into a RunError that names the flag and its value."""
    try:
        yield
    except (Exception, SystemExit) as error:
        stopping.exit_if_stopped_early()  # torch's C++ turns the SystemExit of a signal handler into a RuntimeError
        if isinstance(error, SystemExit):
            raise
        # Cut off diffusers' advice to developers.
        reason = sanitize.reason(error)[:500].partition(" If you want to instead")[0]
        if "ignore_mismatched_sizes" in reason:  # from transformers, which names neither file nor sizes
            reason = "a config.json states other sizes than its weights have"
        kind = "" if isinstance(error, Unfit) else f"{type(error).__name__}: "
        raise RunError(f"{flag} {sanitize.printable(str(value))}: {kind}{reason}{cache_hint(error)}") from error


def cache_hint(error: BaseException, cache_dir: str | None = None) -> str:
    """Advice to append if the cause is a cache folder that is full or not writable; else an empty string."""
    import datasets
    from huggingface_hub import constants

    roots = [cache_dir, constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    while error is not None:
        number, file = getattr(error, "errno", None), str(getattr(error, "filename", None) or "")
        full = number in (errno.ENOSPC, errno.EDQUOT)
        if full or (isinstance(error, OSError) and number in _NO_PLACE):
            root = next((root for root in roots if root and file.startswith(str(root))), None)
            if root or (full and not file):
                root = root or cache_dir or constants.HF_HOME
                return (
                    f"; downloads and prepared data are kept in {root}: give --cache_dir a folder with room to write in"
                )
        error = error.__cause__ or error.__context__
    return ""


# Out of memory

STEP_ADVICE = (
    "lower --train_batch_size (and raise --gradient_accumulation_steps as much), or take --gradient_checkpointing, "
    "--cache_encodings, --mixed_precision=bf16"
)
PHASES = {  # function on the stack, the outermost first -> (what the run was doing, what to change)
    "inspect": ("inspecting the images", "free host memory"),
    "load_models": ("loading the models", "free memory on host and GPU"),
    "freeze": ("loading the models", "free memory on host and GPU"),
    "precompute": ("encoding", "lower --train_batch_size or --resolution, or leave --cache_encodings out"),
    "make_ema": ("making the average", "leave --use_ema out, or, for Stable Diffusion, take --offload_ema"),
    "make_optimizer": ("making the optimizer", STEP_ADVICE),
    "restore": ("reading the checkpoint", STEP_ADVICE),
    "validate": ("generating validation images", "lower --resolution, or leave --validation_prompt(s) out"),
    "export_atomically": ("exporting the model", "free memory; --resume_from_checkpoint=latest exports again"),
}  # fmt: skip
IN_STEP = "in step "


def note_step(error: BaseException, step: int, trained: bool) -> None:
    """Add a note to an exception: its step and, if any update was `trained`, how to resume. Stack traces print it."""
    way_out = "; --resume_from_checkpoint=latest continues from the last checkpoint" if trained else ""
    error.add_note(f"{IN_STEP}{step}{way_out}")


def out_of_memory(error: BaseException) -> str | None:
    """One line for an exception that means out of memory, on GPU or host; None for other exceptions."""
    kind, reason = type(error), sanitize.reason(error)
    worker = "dataloader worker" in reason.lower() and ("killed" in reason or "exited unexpectedly" in reason)
    words = ("out of memory", "allocate memory", "resource_exhausted", "shared memory")
    memory = worker or isinstance(error, MemoryError) or any(word in reason.lower() for word in words)
    if not memory or isinstance(error, SystemExit):  # already one line
        return None
    names = [frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)]
    doing, advice = next((PHASES[name] for name in names if name in PHASES), ("starting", STEP_ADVICE))
    for note in getattr(error, "__notes__", []):
        if note.startswith(IN_STEP) and doing == "starting":
            doing, semicolon, way_out = note.removeprefix("in ").partition(";")
            advice = f"{STEP_ADVICE}{semicolon}{way_out}"
    if worker or isinstance(error, MemoryError) or "shared memory" in reason:
        doing, advice = f"host memory, {doing}", "lower --dataloader_num_workers, or give the container more memory"
    process = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    return f"out of memory{process}, {doing}: {advice} ({kind.__name__}: {reason[:200]})"
