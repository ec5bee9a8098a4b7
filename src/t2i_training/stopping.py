"""Stop signals: what a run does when it is asked to end. One before the loop ends it at once, one in it after its step.

Imports no torch.
"""

import contextlib
import os
import signal
import threading
import time

from .errors import RunError
from .log import logger

# Those of clusters are announcements: minutes before a time limit (Slurm, LSF, SGE), or at a soft limit, once a second.
_ANNOUNCEMENTS = tuple(getattr(signal, n) for n in ("SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, n))
STOP_SIGNALS = (*(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, n)), *_ANNOUNCEMENTS)
FAILED = 127  # in place of a signal's number where the run cannot go on: larger than any, so that all processes take it
_SETTING_UP, _IN_LOOP, _DONE = "setting up", "in the loop", "done"


class StopRequest:
    """Whether a run has been asked to stop, by a signal or by a failure that lets it finish its step.

    A script makes one in `main`, and from then on a stop signal ends the run: at once while it is set up, inside
    `after_step()` once the update under way is made and saved. Later it changes nothing. A second signal that is no
    announcement aborts. A signal that something else in this process handles is left to it, unless it is one of those
    by which people and systems stop any program.
    """

    def __init__(self):
        self.agreed = 0  # number of the signal that all processes know of, 0 for none
        self.failure = None  # the error to end with, after the step under way
        self._number = 0  # of the signal that this process got
        self._since = None  # when it got one that a second one can follow to abort
        self._phase, self._owner = _SETTING_UP, os.getpid()
        if threading.current_thread() is not threading.main_thread():  # elsewhere signals are the caller's business
            return
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            if handler == signal.SIG_IGN:  # nohup's SIGHUP
                continue
            if number in _ANNOUNCEMENTS and handler != signal.SIG_DFL and not _is_ours(handler):
                logger.warning(f"{signal.Signals(number).name} does not stop this run: other code handles it")
                continue
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, _frame) -> None:
        if os.getpid() != self._owner:  # a forked worker, which a Ctrl-C reaches as well
            return
        if self._number and number in _ANNOUNCEMENTS:
            return
        if self._since is not None:
            if time.monotonic() - self._since > 1:  # sooner it is the same one, passed on by a launcher that got it too
                self.restore_signals()
                os.kill(self._owner, number)
            return
        self._number, self._since = number, None if number in _ANNOUNCEMENTS else time.monotonic()
        logger.warning(f"{signal.Signals(number).name}: {_WHAT_FOLLOWS[self._phase]}")
        self.exit_if_early()

    def exit_if_early(self) -> None:
        """Exit if a signal came while the run was set up. Called again where a library has swallowed the exit."""
        if self._number and self._phase == _SETTING_UP:
            raise SystemExit(128 + self._number) from None

    @contextlib.contextmanager
    def after_step(self):
        """Within, a stop signal waits for the end of the update under way, which the loop then saves."""
        self.exit_if_early()
        self._phase = _IN_LOOP
        try:
            yield
        except BaseException:
            self.restore_signals()  # there is no step to finish any more
            raise
        self._phase = _DONE

    def fail_after_step(self, message: str) -> None:
        """End the run with this line, but let all processes finish and save the update under way. From any thread."""
        self.failure = RunError(message)

    @property
    def pending(self) -> bool:
        """Whether this process has been asked to stop, and has updates left to make; others may not know of it yet."""
        return bool(self._number or self.failure) and self._phase == _IN_LOOP

    def agree(self, accelerator) -> int:
        """After each update, on all processes: the number to stop with, if any of them has been asked to; else 0."""
        from . import distributed  # and with it torch

        self.agreed = distributed.all_reduce_max(accelerator, FAILED if self.failure else self._number)
        return self.agreed

    def restore_signals(self) -> None:
        """Give the signals back to Python: the run is over, or is to be aborted by the next one."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if _is_ours(signal.getsignal(number)):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


_ABORT = "; once more aborts"
_WHAT_FOLLOWS = {
    _SETTING_UP: "stopped before the first update; saved checkpoints and encodings are kept",
    _IN_LOOP: f"finishing the step and saving{_ABORT}",
    _DONE: f"all updates are made, finishing the rest{_ABORT}",
}


def _is_ours(handler) -> bool:
    return isinstance(getattr(handler, "__self__", None), StopRequest)


def exit_if_stopped_early() -> None:
    """Exit if a signal came while the run was set up, and a library took the exit for an error of its own.

    For places that no request is handed to: that of the run under way is found in the process's table of signals.
    """
    for number in STOP_SIGNALS:
        if _is_ours(handler := signal.getsignal(number)):
            handler.__self__.exit_if_early()
