"""Turns exceptions of libraries into one line that says what failed and what to do. Imports no torch."""

import contextlib
import errno

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
