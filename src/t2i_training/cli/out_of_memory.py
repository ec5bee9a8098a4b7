"""Memory that is used up, on GPU or host, as one line: what the run was doing, and which of its flags would help."""

import os
from traceback import walk_tb

from .. import sanitize

IN_STEP, CONTINUED = "in step ", "--resume_from_checkpoint=latest continues from the last checkpoint"


def _in_step(flags: dict, resuming: bool) -> str:
    """The changes that make a step of a run with these flags smaller, and what they save, the largest first.

    None of them changes the samples of an update. If the run is `resuming` or can be resumed, not --use_8bit_adam: its
    state is another one.
    """
    if not flags:
        return "lower --train_batch_size, and raise --gradient_accumulation_steps as much"
    ways, size, is_lora = [], flags["train_batch_size"], "rank" in flags
    if flags.get("use_8bit_adam") is False and not is_lora and not resuming:
        ways.append("--use_8bit_adam saves three quarters of the optimizer's state")
    if flags.get("gradient_checkpointing") is False:
        ways.append("--gradient_checkpointing saves most of the activations")
    if size > 1:
        parts = next(n for n in range(2, size + 1) if size % n == 0)
        steps = parts * flags["gradient_accumulation_steps"]
        ways.append(
            f"--train_batch_size={size // parts} with --gradient_accumulation_steps={steps} saves {1 - 1 / parts:.0%} "
            "of the activations"
        )
    typed = "mixed_precision" in flags["typed"]
    if (flags["mixed_precision"] if typed else os.environ.get("ACCELERATE_MIXED_PRECISION")) in (None, "no"):
        ways.append("--mixed_precision=bf16 saves half of the frozen networks and much of the activations")
    if flags.get("cache_encodings") is False:
        ways.append("--cache_encodings saves the frozen networks")
    if flags.get("offload_ema") is False and flags.get("use_ema"):
        ways.append("--offload_ema saves the average")
    if _reads_pixels(flags):
        ways.append("a lower --resolution saves activations")
    return ", ".join(ways) or "nothing is left that saves memory but a larger GPU"


def _reads_pixels(flags: dict) -> bool:
    """Whether images are trained at --resolution: not in the prior, whose validation images alone have it."""
    return "use_aspect_ratio_buckets" in flags


def _encoding(flags: dict, _resuming: bool) -> str:
    smaller = "lower --train_batch_size" + " or --resolution" * _reads_pixels(flags)
    return f"{smaller}, or leave --cache_encodings out"


def _averaging(flags: dict, _resuming: bool) -> str:
    return "take --offload_ema, or leave --use_ema out" if "offload_ema" in flags else "leave --use_ema out"


def _validating(flags: dict, _resuming: bool) -> str:
    name = "validation_prompt" if "validation_prompt" in flags else "validation_prompts"
    return f"{'lower --resolution, or ' if flags.get('resolution') else ''}leave --{name} out"


PHASES = {  # function on the stack, the outermost first -> (what the run was doing, what to change)
    "inspect": ("inspecting the images", "free host memory"),
    "load_models": ("loading the models", "free memory on host and GPU"),
    "freeze": ("loading the models", "free memory on host and GPU"),
    "precompute": ("encoding", _encoding),
    "make_ema": ("making the average", _averaging),
    "make_optimizer": ("making the optimizer", _in_step),
    "restore": ("reading the checkpoint", _in_step),
    "validate": ("generating validation images", _validating),
    "export_atomically": ("exporting the model", "free memory; --resume_from_checkpoint=latest exports again"),
}  # fmt: skip


def note_step(error: BaseException, step: int, trained: bool) -> None:
    """Add a note to an exception: its step and, if any update was `trained`, how to resume. Stack traces print it."""
    error.add_note(f"{IN_STEP}{step}{f'; {CONTINUED}' if trained else ''}")


def _has_flags(name: str, frame) -> bool:
    return name == "main" and hasattr(frame.f_locals.get("args"), "output_dir")


def line(error: BaseException) -> str | None:
    """One line for an exception that means out of memory, on GPU or host; None for other exceptions."""
    kind, reason = type(error), sanitize.reason(error)
    worker = "dataloader worker" in reason.lower() and ("killed" in reason or "exited unexpectedly" in reason)
    words = (
        "out of memory", "allocate memory", "resource_exhausted", "shared memory",
        "alloc_failed", "allocation_failed", "failed to cuda calloc",  # of cuBLAS, cuDNN, NCCL
    )  # fmt: skip
    memory = worker or isinstance(error, MemoryError) or any(word in reason.lower() for word in words)
    if not memory or isinstance(error, SystemExit):  # already one line
        return None
    frames = [(frame.f_code.co_name, frame) for frame, _ in walk_tb(error.__traceback__)]
    flags = next((vars(frame.f_locals["args"]) for name, frame in frames if _has_flags(name, frame)), {})
    doing, advice = next((PHASES[name] for name, _ in frames if name in PHASES), ("starting", _in_step))
    continued = ""
    for note in getattr(error, "__notes__", []):
        if note.startswith(IN_STEP):
            step, semicolon, way_out = note.removeprefix("in ").partition(";")
            doing, continued = step if doing == "starting" else doing, f"{semicolon}{way_out}"
    if callable(advice):
        advice = advice(flags, bool(continued or flags.get("resume_from_checkpoint")))
    if worker or isinstance(error, MemoryError) or "shared memory" in reason:
        doing, advice = f"host memory, {doing}", "lower --dataloader_num_workers, or give the container more memory"
    process = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    return f"out of memory{process}, {doing}: {advice}{continued} ({kind.__name__}: {reason[:200]})"
