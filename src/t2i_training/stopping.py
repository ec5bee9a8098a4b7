"""Stop signals: what a run does when it is asked to end. One before the loop ends it at once, one in it after its step.

Imports no torch.
"""

import os
import signal
import threading
import time

from . import sanitize
from .log import logger

# Those of clusters are announcements: minutes before a time limit (Slurm, LSF, SGE), or at a soft limit, once a second.
_ANNOUNCEMENTS = tuple(getattr(signal, n) for n in ("SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, n))
STOP_SIGNALS = (*(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, n)), *_ANNOUNCEMENTS)
FAILED = 127  # stands for a stop signal when the run cannot go on; above them all
_stop_signal = _failure = None
_phase = "before the loop"  # then "loop", then "after the loop"


def fail_after_step(message: str) -> None:
    """As `fail`, but as a stop signal would: the processes finish the step under way together, and save."""
    global _stop_signal, _failure
    _stop_signal, _failure = FAILED, f"error: {sanitize.printable(message)}"


def catch_signals() -> None:
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


def asked_to_stop() -> bool:
    """Whether this process has been asked to stop, and has updates left to make; others may not know of it yet."""
    return bool(_stop_signal) and _phase == "loop"


def stop_requested(accelerator) -> int:
    """Number of the signal the run was asked to stop with, 0 for none; equal on all processes."""
    from . import distributed  # and with it torch

    return distributed.largest(accelerator, _stop_signal or 0)


def failure() -> str | None:
    """The line that `fail_after_step` was given, if it was called."""
    return _failure
