"""Stop signals. During set-up a signal ends the run at once; in the training loop it ends it after the current update.

Imports no torch.
"""

import contextlib
import os
import signal
import threading
import time

from .errors import RunError
from .log import logger

# Clusters announce a time limit with these: minutes before it (Slurm, LSF, SGE), or once a second after a soft limit.
_ANNOUNCEMENTS = tuple(getattr(signal, n) for n in ("SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, n))
STOP_SIGNALS = (*(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, n)), *_ANNOUNCEMENTS)
FAILED = 127  # pseudo signal number of a failure; larger than any real one, so that the maximum over ranks picks it
_SETTING_UP, _IN_LOOP, _DONE = "setting up", "in the loop", "done"


class StopRequest:
    """Whether a run has been asked to stop, by a signal or by a failure that lets it finish its step.

    A script makes one in `main`; this installs the signal handlers. During set-up a signal ends the run at once. Within
    `after_step()` it ends the run once the current update is made and saved. After the loop it changes nothing. A
    second SIGTERM, SIGINT or SIGHUP aborts. SIGUSR1, SIGUSR2 and SIGXCPU are left to other code that handles them.
    """

    def __init__(self):
        self.agreed = 0  # number of the signal that all ranks agreed to stop for, 0 for none
        self.failure = None  # RunError to end with, after the current update
        self._number = 0  # of the signal that this rank received
        self._since = None  # time.monotonic() of the first signal that is no announcement
        self._phase, self._owner = _SETTING_UP, os.getpid()
        if threading.current_thread() is not threading.main_thread():  # only it can set handlers
            return
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            if handler == signal.SIG_IGN:  # as nohup does with SIGHUP
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
            if time.monotonic() - self._since > 1:  # within a second it is the same one, forwarded by the launcher
                self.restore_signals()
                os.kill(self._owner, number)
            return
        self._number, self._since = number, None if number in _ANNOUNCEMENTS else time.monotonic()
        logger.warning(f"{signal.Signals(number).name}: {_WHAT_FOLLOWS[self._phase]}")
        self.exit_if_early()

    def exit_if_early(self) -> None:
        """Exit if a signal came during set-up. Called again in case a library swallowed the SystemExit."""
        if self._number and self._phase == _SETTING_UP:
            raise SystemExit(128 + self._number) from None

    @contextlib.contextmanager
    def after_step(self):
        """Context in which a signal takes effect only at the end of the current update, which the loop then saves."""
        self.exit_if_early()
        self._phase = _IN_LOOP
        try:
            yield
        except BaseException:
            self.restore_signals()  # there is no update left to finish
            raise
        self._phase = _DONE

    def fail_after_step(self, message: str) -> None:
        """End the run with this line once all ranks have saved the current update. Callable from any thread."""
        self.failure = RunError(message)

    @property
    def pending(self) -> bool:
        """Whether this rank has been asked to stop during the loop. Other ranks may not know yet."""
        return bool(self._number or self.failure) and self._phase == _IN_LOOP

    def agree(self, accelerator) -> int:
        """Call on all ranks after each update. Returns the signal number if any rank has been asked to stop, else 0."""
        from . import distributed  # imports torch

        self.agreed = distributed.all_reduce_max(accelerator, FAILED if self.failure else self._number)
        return self.agreed

    def restore_signals(self) -> None:
        """Restore Python's default handlers."""
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
    """Exit if a signal came during set-up and a library turned the SystemExit into an error of its own.

    For code that has no StopRequest at hand: it is found as the owner of the installed signal handler.
    """
    for number in STOP_SIGNALS:
        if _is_ours(handler := signal.getsignal(number)):
            handler.__self__.exit_if_early()
