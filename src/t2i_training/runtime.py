"""What surrounds a run: the accelerator, the output folder's lock, the seed, stop signals, precision."""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
)

from . import log, machine, names, packages, processes, texts
from .checks import DefaultSeed, public_config
from .log import logger
from .weight_files import Unfit

# Those of clusters are announcements: minutes before a time limit (Slurm, LSF, SGE), or at a soft limit, once a second.
_ANNOUNCEMENTS = tuple(getattr(signal, n) for n in ("SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, n))
STOP_SIGNALS = (*(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, n)), *_ANNOUNCEMENTS)
# Of collectives on the devices; NCCL's default is ten minutes. Whatever is long waits over gloo (processes.py). What is
# left are first steps: a process that compiles, counts FLOPs or starts trackers while the others wait for gradients.
COLLECTIVE_LIMIT = datetime.timedelta(hours=1)
_locks = {}  # open lock files by output folder: closing one would release it
FAILED = 127  # stands for a stop signal when the run cannot go on; above them all
_stop_signal = _failure = None
_phase = "before the loop"  # then "loop", then "after the loop"
progress_bar = None  # of the run under way
steps = None  # of the run under way, once it trains: those made before it began, and those made by now


def start(args) -> Accelerator:
    """Accelerator, logging, lock on the output folder, stop signals. Call once, before anything is loaded."""
    global progress_bar, steps
    progress_bar = steps = None  # an earlier run's, in the same process
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # captions are tokenized one by one, in forked workers
    if args.local_rank != -1 and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    # A second run in one process (main() called again) may ask for another precision or accumulation.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    output_dir = Path(args.output_dir)
    on_cpu = processes.launched() and not torch.accelerator.is_available()  # else accelerate would join none of them
    PartialState(cpu=on_cpu, timeout=COLLECTIVE_LIMIT)  # before anything else makes one without
    accelerator = Accelerator(
        cpu=on_cpu,
        # As a plugin: given as a number, the environment of `accelerate launch` would have the last word.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        mixed_precision=_possible_precision(args.mixed_precision),
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / args.logging_dir)),
        # DDP keeps no second copy of the gradients, and sends no buffers round: all networks' are constants.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    log.to_stderr()
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    _quiet_libraries(accelerator)
    _refuse_backends(accelerator)
    if accelerator.num_processes > 1:
        processes.connect()
    elif alone := processes.never_joined():
        logger.warning(alone)
    args.mixed_precision = accelerator.mixed_precision  # as launched: run_config.yaml and the card say what was done
    if accelerator.is_main_process:
        _lock(output_dir)
        log.open_file(args.log_file, args.hub_token)
        logger.info(_what_is_trained(args))
    processes.wait(accelerator)
    if getattr(args, "allow_tf32", False):
        torch.set_float32_matmul_precision("high")  # cuDNN's convolutions are in TF32 unless told otherwise
    machine.explain_out_of_memory()
    _catch_signals()
    packages.try_out(args, accelerator.device)
    return accelerator


def _what_is_trained(args) -> str:
    """The first line of a log: script, models, and where the result will be."""
    models = [f"--{name}={value}" for name, value in vars(args).items() if name.startswith("pretrained_")]
    return f"{Path(sys.argv[0]).name} {' '.join(models)} --output_dir={args.output_dir}"


def _refuse_backends(accelerator) -> None:
    if accelerator.distributed_type == DistributedType.XLA:
        raise SystemExit("error: TPUs are not for this script: train_text_to_image_flax.py runs on them")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        name = accelerator.distributed_type.value
        raise SystemExit(
            f"error: {name} shards the weights, which these scripts cannot save yet: use plain --multi_gpu"
        )


def _possible_precision(wanted: str | None) -> str | None:
    """fp16 needs a GPU; without one the guides' commands still run, in full precision, and say so."""
    precision = wanted or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision not in (None, "no", "fp16", "bf16"):  # of `accelerate config`: fp8
        raise SystemExit(f"error: accelerate is set to mixed precision {precision}: give --mixed_precision=bf16")
    if precision == "fp16" and PartialState().device.type == "cpu":
        warnings.warn("fp16 needs a GPU: training in fp32", stacklevel=3)
        return "no"
    return wanted


def _quiet_libraries(accelerator):
    import datasets
    import diffusers
    import transformers

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # it calls it an error that there are only .bin files
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    if not accelerator.is_main_process or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _lock(output_dir: Path) -> None:
    """Claim the folder for this process; the kernel lets go when the process dies, however it dies.

    A POSIX record lock, not flock: loader workers would inherit the latter and hold it on after a SIGKILL.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = _locks.pop(output_dir.resolve(), None) or open(output_dir / ".lock", "a")  # noqa: SIM115
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = processes.never_joined() if PartialState().num_processes == 1 else None
        reason = f"in use by another run{f': {alone}' if alone else ''}"
        raise SystemExit(f"error: --output_dir {output_dir} is {reason}") from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some cluster file systems
            return logger.warning(f"{output_dir} cannot be locked: do not start a second run on it")
        raise SystemExit(f"error: --output_dir {output_dir} cannot be written: {error.strerror}") from None
    _locks[output_dir.resolve()] = handle


def fail(message: str) -> NoReturn:
    """End a run under way with one line, below the progress bar as it last stood."""
    if progress_bar is not None:
        progress_bar.close()
    raise SystemExit(f"error: {texts.printable(message)}")


def fail_after_step(message: str) -> None:
    """As `fail`, but as a stop signal would: the processes finish the step under way together, and save."""
    global _stop_signal, _failure
    _stop_signal, _failure = FAILED, f"error: {texts.printable(message)}"


def settle_seed(args, position: dict) -> None:
    """Set args.seed, equal on all processes, to the seed of the checkpoint with this manifest, or keep or draw one."""
    stored = position.get("seed")
    if stored is not None and args.seed not in (None, stored) and not isinstance(args.seed, DefaultSeed):
        raise SystemExit(f"error: --seed {args.seed} differs from the checkpoint's, {stored}: leave it out to continue")
    seed = [stored if stored is not None else args.seed if args.seed is not None else secrets.randbelow(2**31)]
    args.seed = int(broadcast_object_list(seed)[0])
    logger.info(f"seed {args.seed}")


def write_config(args, resumed: bool) -> bool:
    """Write run_config.yaml, which --config takes. A resumed run names the flags that are others than they were.

    Returns whether there are any.
    """
    from .files import write_text

    changed, file, config = [], Path(args.output_dir) / "run_config.yaml", public_config(args)
    if resumed:
        with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):  # none there, or the user's
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            names = before.keys() & config.keys() - {"output_dir", "resume_from_checkpoint"}
            changed = [f"--{n} {before[n]} -> {config[n]}" for n in sorted(names) if before[n] != config[n]]
            if changed:
                logger.warning(f"flags that have changed since the run before: {', '.join(changed)}")
    write_text(file, yaml.safe_dump(config, allow_unicode=True))
    return bool(changed)


@contextlib.contextmanager
def readable_errors(flag: str, value: str):
    """Loading a model can fail in many ways inside several libraries; say it in one line that names the flag."""
    try:
        yield
    except (Exception, SystemExit) as error:
        heed_early_stop()  # torch's C++ makes an error of its own of the exit that a signal raises
        if isinstance(error, SystemExit):
            raise
        reason = texts.reason(error)[:500].partition(" If you want to instead")[0]  # diffusers' advice to its callers
        if "ignore_mismatched_sizes" in reason:  # transformers', which names neither
            reason = "a config.json states other sizes than its weights have"
        kind = "" if isinstance(error, Unfit) else f"{type(error).__name__}: "
        line = f"{flag} {texts.printable(str(value))}: {kind}{reason}{names.cache_hint(error)}"
        raise SystemExit(f"error: {line}") from error


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. An error that ends it stands in --log_file too."""
    try:
        main()
    except BaseException as error:
        log.error_into_file(error)
        raise


def finish(stopped_by: int, complete: bool = False) -> None:
    """Unlock the output folder. If the run was stopped before it was complete, leave with status 128 + signal.

    After an error that let the step be finished, leave with that.
    """
    default_signals()
    while _locks:
        _locks.popitem()[1].close()
    if _failure and stopped_by:
        raise SystemExit(_failure)
    if stopped_by and not complete:
        logger.info("stopped; the same command with --resume_from_checkpoint=latest continues")
        raise SystemExit(128 + stopped_by)


def _catch_signals() -> None:
    """A stop signal lets the loop finish its step and save; one before the loop ends the run at once.

    So does a second one that is no announcement. A signal that something else in this process handles is left to it,
    unless it is one of those by which people and systems stop any program.
    """
    global _stop_signal, _failure, _phase
    _stop_signal, _failure, _phase, owner, first = None, None, "before the loop", os.getpid(), 0.0

    def on_stop_signal(number, _frame):
        global _stop_signal
        nonlocal first
        name = signal.Signals(number).name
        if os.getpid() != owner:  # a forked worker, which a Ctrl-C reaches as well
            return
        if _phase == "before the loop":
            default_signals()
            _stop_signal = number
            logger.warning(f"{name}: stopped before the first update; saved checkpoints and encodings are kept")
            raise SystemExit(128 + number)
        if number in _ANNOUNCEMENTS and _stop_signal:
            return
        if not first:
            _stop_signal, first = number, 0.0 if number in _ANNOUNCEMENTS else time.monotonic()
            logger.warning(f"{name}: {_WHAT_FOLLOWS[_phase]}; {_ABORT}")
        elif time.monotonic() - first > 1:  # sooner it is the same one, passed on by a launcher that got it too
            default_signals()
            os.kill(owner, number)

    if threading.current_thread() is not threading.main_thread():  # elsewhere signals are the caller's business
        return
    for number in STOP_SIGNALS:
        handler = signal.getsignal(number)
        if handler == signal.SIG_IGN:  # nohup's SIGHUP
            continue
        if number in _ANNOUNCEMENTS and handler != signal.SIG_DFL and not _is_ours(handler):
            logger.warning(f"{signal.Signals(number).name} does not stop this run: other code handles it")
            continue
        signal.signal(number, on_stop_signal)


_WHAT_FOLLOWS = {"loop": "finishing the step and saving", "after the loop": "all updates are made, finishing the rest"}
_ABORT = "once more aborts"


def _is_ours(handler) -> bool:
    return getattr(handler, "__module__", None) == __name__


def begin_loop() -> None:
    """From here on there is something to save: a stop signal waits for the end of its step."""
    global _phase
    heed_early_stop()
    _phase = "loop"


def end_loop() -> None:
    """From here on nothing is left to save but the result: a first stop signal changes nothing."""
    global _phase
    _phase = "after the loop"


def heed_early_stop() -> None:
    """Exit as a stop signal wanted to before the loop, where a library has passed over that."""
    if _stop_signal and _phase == "before the loop":
        raise SystemExit(128 + _stop_signal) from None


def default_signals() -> None:
    """Give the signals back to Python: the run is over, or is to be aborted by the next one."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if _is_ours(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def stopping() -> bool:
    """Whether this process has been asked to stop, and has updates left to make; others may not know of it yet."""
    return bool(_stop_signal) and _phase == "loop"


def stop_requested(accelerator) -> int:
    """Number of the signal the run was asked to stop with, 0 for none; equal on all processes."""
    return processes.largest(accelerator, _stop_signal or 0)
