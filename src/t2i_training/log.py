"""Logs to stderr, above the progress bars, and to --log_file, without secrets and control characters."""

import contextlib
import logging
import sys
import traceback
from pathlib import Path

from . import sanitize
from .errors import RunError

logger = logging.getLogger("t2i_training")  # `run.lifecycle.start` sets the level: ranks other than 0 log errors only
logger.addFilter(lambda record: _make_printable(record))
_steps = logging.getLogger("t2i_training.steps")  # one line per logging interval; a terminal shows a bar instead
_LINES = {"format": "%(asctime)s %(levelname)s %(message)s", "datefmt": "%Y-%m-%d %H:%M:%S"}


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = sanitize.printable(record.getMessage()), ()
    return True


def to_stderr() -> None:
    """Log lines stand above the progress bars. Nothing is changed if the caller has set up logging."""
    from tqdm.auto import tqdm  # takes 0.1 s, which --help does not need

    class Handler(logging.StreamHandler):
        def emit(self, record):
            if record.name != _steps.name or not sys.stderr.isatty():
                tqdm.write(self.format(record), file=sys.stderr)

    logging.basicConfig(handlers=[Handler()], level=logging.WARNING, **_LINES)


class _LogFile(logging.FileHandler):
    """Handler for --log_file. Removes tokens. When the disk is full, it warns once and the run goes on without it."""

    def __init__(self, path: Path, token: str | None):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter(_LINES["format"], _LINES["datefmt"]))
        self._token = token

    def format(self, record):
        return sanitize.redact(super().format(record), self._token)

    def handleError(self, record):
        self.end()
        logger.warning(f"--log_file {self.baseFilename} cannot be written any longer: {sys.exc_info()[1]}")

    def end(self) -> None:
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError):  # its buffer does not fit on the disk
            self.close()


def open_file(path: str | None, token: str | None) -> None:
    """Append what is logged from now on to --log_file, if there is one; `token` is kept out of it."""
    for earlier in _log_files():  # of an earlier run in the same process
        earlier.end()
    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        logging.getLogger().addHandler(_LogFile(Path(path), token))
    except OSError as error:
        raise RunError(f"--log_file {path} cannot be written: {error.strerror}") from None


def _log_files() -> list[_LogFile]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _LogFile)]


def error_into_file(error: BaseException) -> None:
    """Write the error that ends the run into --log_file, if there is one, as Python prints it to stderr."""
    said = error.code if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
    for file in _log_files() if isinstance(said, str) else []:
        file.handle(logging.makeLogRecord({"msg": said, "levelno": logging.ERROR, "levelname": "ERROR"}))


def step(line: str) -> None:
    """Log the line of a logging interval: not to a terminal, which has the bar. Main process only."""
    _steps.info(line)
