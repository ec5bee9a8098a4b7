"""Where messages go: to stderr, above the progress bars, and into --log_file. Secrets and control characters do not."""

import contextlib
import logging
import sys
import traceback
from pathlib import Path

from . import sanitize
from .errors import RunError

logger = logging.getLogger("t2i_training")  # `run.lifecycle.start` has all processes but the main one say errors alone
logger.addFilter(lambda record: _make_printable(record))
_steps = logging.getLogger("t2i_training.steps")  # the lines of logging intervals, for which a terminal has a bar
_log_file = None  # the handler that writes --log_file
_LINES = {"format": "%(asctime)s %(levelname)s %(message)s", "datefmt": "%Y-%m-%d %H:%M:%S"}


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = sanitize.printable(record.getMessage()), ()
    return True


def to_stderr() -> None:
    """Log lines stand above the progress bars. Nothing is changed if the caller has set up logging."""
    from tqdm.auto import tqdm  # a tenth of a second, which --help does without

    class Handler(logging.StreamHandler):
        def emit(self, record):
            if record.name != _steps.name or not sys.stderr.isatty():
                tqdm.write(self.format(record), file=sys.stderr)

    logging.basicConfig(handlers=[Handler()], level=logging.WARNING, **_LINES)


class _LogFile(logging.FileHandler):
    """What is logged, and the error that ends the run, without tokens. If the disk is full the run goes on without."""

    def __init__(self, path: Path, token: str | None):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter(_LINES["format"], _LINES["datefmt"]))
        self._token = token

    def format(self, record):
        return sanitize.redact(super().format(record), self._token)

    def handleError(self, record):
        _close_log_file()
        logger.warning(f"--log_file {self.baseFilename} cannot be written any longer: {sys.exc_info()[1]}")


def open_file(path: str | None, token: str | None) -> None:
    """Append what is logged from now on to --log_file, if there is one; `token` is kept out of it."""
    global _log_file
    _close_log_file()  # an earlier run's, in the same process
    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _log_file = _LogFile(Path(path), token)
    except OSError as error:
        raise RunError(f"--log_file {path} cannot be written: {error.strerror}") from None
    logging.getLogger().addHandler(_log_file)


def _close_log_file() -> None:
    global _log_file
    if _log_file is not None:
        logging.getLogger().removeHandler(_log_file)
        with contextlib.suppress(OSError):  # what is still to be written does not fit
            _log_file.close()
    _log_file = None


def error_into_file(error: BaseException) -> None:
    """Write into --log_file, if there is one, what Python is about to print to stderr."""
    said = error.code if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
    if _log_file is not None and isinstance(said, str):
        _log_file.handle(logging.makeLogRecord({"msg": said, "levelno": logging.ERROR, "levelname": "ERROR"}))


def step(line: str) -> None:
    """Log the line of a logging interval: not to a terminal, which has the bar. Main process only."""
    _steps.info(line)
