"""What surrounds a run: the accelerator, the output folder's lock, the seed, stop signals, precision."""

import contextlib
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
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list
from tqdm.auto import tqdm

from . import machine, processes, texts
from .checks import DefaultSeed, public_config

logger = get_logger("t2i_training")
logger.logger.addFilter(lambda record: _make_printable(record))
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_locks = {}  # open lock files by output folder: closing one would release it
FAILED = 127  # stands for a stop signal when the run cannot go on; above them all
_stop_signal = _failure = None
_loop_runs = False
progress_bar = None  # of the run under way


def start(args) -> Accelerator:
    """Accelerator, logging, lock on the output folder, stop signals. Call once, before anything is loaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # captions are tokenized one by one, in forked workers
    if args.local_rank != -1 and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    # A second run in one process (main() called again) may ask for another precision or accumulation.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        # As a plugin: given as a number, the environment of `accelerate launch` would have the last word.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        mixed_precision=_possible_precision(args.mixed_precision),
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / args.logging_dir)),
    )
    _log_above_progress_bars()
    logging.getLogger("t2i_training").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    _quiet_libraries(accelerator)
    _refuse_backends(accelerator)
    if accelerator.num_processes > 1:
        processes.connect()
    args.mixed_precision = accelerator.mixed_precision  # as launched: run_config.yaml and the card say what was done
    if accelerator.is_main_process:
        _lock(output_dir)
    processes.wait(accelerator)
    if getattr(args, "allow_tf32", False):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    machine.explain_out_of_memory()
    _catch_signals()
    return accelerator


def _make_printable(record: logging.LogRecord) -> bool:
    message = record.getMessage().removeprefix("[RANK 0] ")  # what accelerate adds; others log errors alone
    record.msg, record.args = texts.printable(message), ()
    return True


def _refuse_backends(accelerator) -> None:
    if accelerator.distributed_type == DistributedType.XLA:
        raise SystemExit("error: TPUs are not for this script: train_text_to_image_flax.py runs on them")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        name = accelerator.distributed_type.value
        raise SystemExit(
            f"error: {name} shards the weights, which these scripts cannot save yet: use plain --multi_gpu"
        )


def _log_above_progress_bars() -> None:
    class Handler(logging.StreamHandler):
        def emit(self, record):
            tqdm.write(self.format(record), file=sys.stderr)

    lines = {"format": "%(asctime)s %(levelname)s %(message)s", "datefmt": "%H:%M:%S"}
    logging.basicConfig(handlers=[Handler()], level=logging.WARNING, **lines)


def _possible_precision(wanted: str | None) -> str | None:
    """fp16 needs a GPU; without one the guides' commands still run, in full precision, and say so."""
    if (wanted or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16" and PartialState().device.type == "cpu":
        warnings.warn("fp16 needs a GPU: training in fp32", stacklevel=3)
        return "no"
    return wanted


def _quiet_libraries(accelerator):
    import datasets
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    if not accelerator.is_main_process:
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
        raise SystemExit(f"error: --output_dir {output_dir} is in use by another run") from None
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


def write_config(args, resumed: bool) -> None:
    """Write run_config.yaml, which --config takes. A resumed run names the flags that are others than they were."""
    from .files import write_text

    file, config = Path(args.output_dir) / "run_config.yaml", public_config(args)
    if resumed:
        with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):  # none there, or the user's
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            names = before.keys() & config.keys() - {"output_dir", "resume_from_checkpoint"}
            changed = [f"--{n} {before[n]} -> {config[n]}" for n in sorted(names) if before[n] != config[n]]
            if changed:
                logger.warning(f"flags that have changed since the run before: {', '.join(changed)}")
    write_text(file, yaml.safe_dump(config, allow_unicode=True))


@contextlib.contextmanager
def readable_errors(flag: str, value: str):
    """Loading a model can fail in many ways inside several libraries; say it in one line that names the flag."""
    try:
        yield
    except (Exception, SystemExit) as error:
        heed_early_stop()  # torch's C++ makes an error of its own of the exit that a signal raises
        if isinstance(error, SystemExit):
            raise
        line = f"{flag} {texts.printable(str(value))}: {type(error).__name__}: {texts.reason(error)[:500]}"
        raise SystemExit(f"error: {line}") from error


def finish(stopped_by: int) -> None:
    """Unlock the output folder. If the run was stopped, leave with the error, or with status 128 + signal."""
    default_signals()
    while _locks:
        _locks.popitem()[1].close()
    if stopped_by:
        logger.info("stopped; the same command with --resume_from_checkpoint=latest continues")
        raise SystemExit(_failure or 128 + stopped_by)


def _catch_signals() -> None:
    """A stop signal lets the loop finish its step and save; a second one, or one before the loop, ends the run."""
    global _stop_signal, _failure, _loop_runs
    _stop_signal, _failure, _loop_runs, owner, first = None, None, False, os.getpid(), 0.0

    def on_signal(number, _frame):
        global _stop_signal
        nonlocal first
        if os.getpid() != owner:  # a forked worker, which a Ctrl-C reaches as well
            return
        if not _loop_runs:
            default_signals()
            _stop_signal = number
            raise SystemExit(128 + number)
        if not first:
            _stop_signal, first = number, time.monotonic()
            logger.warning(f"{signal.Signals(number).name}: finishing the step and saving; once more aborts")
        elif time.monotonic() - first > 1:  # sooner it is the same one, passed on by a launcher that got it too
            default_signals()
            os.kill(owner, number)

    if threading.current_thread() is threading.main_thread():  # elsewhere signals are the caller's business
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's SIGHUP
                signal.signal(number, on_signal)


def begin_loop() -> None:
    """From here on there is something to save: a stop signal waits for the end of its step."""
    global _loop_runs
    heed_early_stop()
    _loop_runs = True


def heed_early_stop() -> None:
    """Exit as a stop signal wanted to before the loop, where a library has passed over that."""
    if _stop_signal and not _loop_runs:
        raise SystemExit(128 + _stop_signal) from None


def default_signals() -> None:
    """Give the signals back to Python: the run is over, or is to be aborted by the next one."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def stop_requested(accelerator) -> int:
    """Number of the signal the run was asked to stop with, 0 for none; equal on all processes."""
    return processes.largest(accelerator, _stop_signal or 0)
