"""The output folder of a run: its lock and run_config.yaml."""

import contextlib
import errno
import fcntl
from pathlib import Path

import yaml
from accelerate.state import PartialState

from .. import distributed
from ..cli.config_file import public_config
from ..files import write_text
from ..log import logger

_locks = {}  # open lock files by output folder: closing one would release it


def lock(output_dir: Path) -> None:
    """Claim the folder for this process; the kernel lets go when the process dies, however it dies.

    A POSIX record lock, not flock: loader workers would inherit the latter and hold it on after a SIGKILL.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = _locks.pop(output_dir.resolve(), None) or open(output_dir / ".lock", "a")  # noqa: SIM115
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = distributed.never_joined() if PartialState().num_processes == 1 else None
        reason = f"in use by another run{f': {alone}' if alone else ''}"
        raise SystemExit(f"error: --output_dir {output_dir} is {reason}") from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some cluster file systems
            return logger.warning(f"{output_dir} cannot be locked: do not start a second run on it")
        raise SystemExit(f"error: --output_dir {output_dir} cannot be written: {error.strerror}") from None
    _locks[output_dir.resolve()] = handle


def unlock() -> None:
    """Let go of every folder that this process has locked."""
    while _locks:
        _locks.popitem()[1].close()


def write_config(args, resumed: bool) -> bool:
    """Write run_config.yaml, which --config takes. A resumed run names the flags that are others than they were.

    Returns whether there are any.
    """
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
