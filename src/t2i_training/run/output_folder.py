"""The output folder of a run: its lock, run_config.yaml, and how results of an earlier run make way."""

import contextlib
import errno
import fcntl
import json
import re
import shutil
from pathlib import Path

import yaml
from accelerate.state import PartialState

from .. import distributed
from ..errors import RunError
from ..files import free_name, write_text
from ..log import logger

METRICS = "metrics.jsonl"
# Open lock files by output folder. The kernel keeps one lock for a process, and lets go when any of its handles is
# closed: so a second run in this process must find the first one's.
_locks = {}


def lock(output_dir: Path) -> None:
    """Lock the folder for this process. The kernel releases the lock when the process ends, even after SIGKILL.

    A POSIX record lock, not flock: forked loader workers would inherit a flock and keep it after a SIGKILL.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = _locks.pop(output_dir.resolve(), None) or open(output_dir / ".lock", "a")  # noqa: SIM115
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = distributed.never_joined() if PartialState().num_processes == 1 else None
        reason = f"in use by another run{f': {alone}' if alone else ''}"
        raise RunError(f"--output_dir {output_dir} is {reason}") from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some cluster file systems
            return logger.warning(f"{output_dir} cannot be locked: do not start a second run on it")
        raise RunError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from None
    _locks[output_dir.resolve()] = handle


def unlock() -> None:
    """Release all locks of this process."""
    while _locks:
        _locks.popitem()[1].close()


def write_config(config: dict, resumed: bool) -> bool:
    """Write run_config.yaml for --config. Returns whether a resumed run's flags have changed; a warning lists them."""
    changed, file = [], Path(config["output_dir"]) / "run_config.yaml"
    if resumed:
        # If there is no such file, or not one of ours, nothing has changed.
        with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            names = before.keys() & config.keys() - {"output_dir", "resume_from_checkpoint"}
            changed = [f"--{n} {before[n]} -> {config[n]}" for n in sorted(names) if before[n] != config[n]]
            if changed:
                logger.warning(f"flags that have changed since the run before: {', '.join(changed)}")
    write_text(file, yaml.safe_dump(config, allow_unicode=True))
    return bool(changed)


# Results of an earlier run


def take_over(config: dict, accelerator, step: int) -> None:
    """Write run_config.yaml, and make room for the results of a run that goes on from update `step`, or begins at 0.

    `config` holds the run's flags with the resolved seed and precision (`report.progress.Progress.config`).
    Call it right before the first update, so that a run that fails during set-up leaves an earlier run's results alone.
    """
    if not accelerator.is_main_process:
        return
    changed, metrics = write_config(config, resumed=step > 0), Path(config["output_dir"]) / METRICS
    if step > 0:
        _keep_own_course(config["resume_from_checkpoint"], metrics, step, changed)
        return
    if metrics.exists():
        logger.warning(f"{metrics.parent} holds the result of an earlier run: this one will replace it")
    _keep_metrics_until(metrics, 0)
    _remove_validation(metrics.parent)


def _keep_own_course(wanted: str, metrics: Path, step: int, flags_changed: bool) -> None:
    """Drop the rows after the checkpoint that the run resumes from: the run writes them again.

    If the run goes back to an older checkpoint or has other flags, its results may differ from those that are there.
    Then rows and grids after the checkpoint are first copied or moved to other names.
    """
    folder, kept = metrics.parent.resolve(), step
    source = (folder / wanted if (folder / wanted).is_dir() else Path(wanted)).resolve()
    if wanted != "latest" and source != folder / f"checkpoint-{kept}":
        # With a renamed checkpoint of this folder step 0 still counts; with another run's, nothing here does.
        kept = 0 if source.parent == folder else -1
    if flags_changed or wanted != "latest":
        _set_metrics_aside(metrics, kept)
        _set_validation_aside(metrics.parent, kept)
    _keep_metrics_until(metrics, kept)


def _keep_metrics_until(file: Path, step: int) -> None:
    """Drop the rows after `step`, and a last line that was cut short by a crash."""
    rows = []
    if file.exists() and step > 0:
        rows = [row for row in read_metrics(file.parent) if row["step"] <= step]
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def _set_metrics_aside(file: Path, step: int) -> None:
    """Keep a copy under another name if there are rows after `step`."""
    if file.exists() and any(row["step"] > step for row in read_metrics(file.parent)):
        copy = shutil.copy2(file, free_name(file))
        logger.warning(f"{file} has rows after the checkpoint resumed from; a copy of it as it was is kept in {copy}")


def _remove_validation(output_dir) -> None:
    """Remove the validation images of an earlier run: they would get into this run's grids and card."""
    for path in (Path(output_dir) / "validation").glob("step-*"):
        if re.fullmatch(r"step-\d{6,}(\.png)?", path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _set_validation_aside(output_dir, step: int) -> None:
    """Move grids and images of later steps to a sibling folder, validation.1 or the next unused name."""
    folder = Path(output_dir) / "validation"
    names = [path.name for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}(\.png)?", path.name)]
    later = sorted(name for name in names if int(name[5:].removesuffix(".png")) > step)
    if later:
        aside = free_name(folder)
        aside.mkdir()
        for name in later:
            (folder / name).rename(aside / name)
        grids = ", ".join(name for name in later if name.endswith(".png"))
        logger.warning(f"{folder}: {grids} are later than the checkpoint resumed from; moved to {aside}")


def read_metrics(output_dir) -> list[dict]:
    """The rows of metrics.jsonl, in order. Damaged lines are left out with a warning."""
    rows = []
    for line in (Path(output_dir) / METRICS).read_bytes().splitlines():
        try:
            row = json.loads(line)
            norm = row["grad_norm"]
            if type(row["step"]) is not int or not all(map(_is_number, (row["loss"], row["lr"], norm or 0.0))):
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.warning(f"{METRICS}: left out a damaged line")
    return rows


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # and not nan
