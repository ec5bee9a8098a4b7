"""Atomic replacement of files and folders: a crash leaves either the old one or the new one."""

import contextlib
import ctypes
import hashlib
import itertools
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from .errors import RunError


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(new: Path, target: Path) -> None:
    """Rename folder or file `new` to `target`, then remove what was at `target` before."""
    old = target.with_name(f".{target.name}.removed")
    remove_folder(old)
    if target.is_dir() and _exchange(new, target):
        new.rename(old)
    elif target.is_file() and new.is_file():
        new.replace(target)
    else:
        if os.path.lexists(target):
            target.rename(old)
        new.rename(target)
    sync(target.parent)
    remove_folder(old)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically. Returns False on systems that cannot."""
    with contextlib.suppress(OSError, AttributeError):
        here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        rename = ctypes.CDLL(None).renameat2  # Linux only; elsewhere the caller makes two renames
        return rename(here, os.fsencode(first), here, os.fsencode(second), both) == 0
    return False


def free_name(path: Path) -> Path:
    """`path` with the first number appended that gives an unused name."""
    names = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(name for name in names if not name.exists())


def move_aside(folder: Path) -> Path:
    """Rename `path` to an unused name, which is returned."""
    return folder.rename(free_name(folder))


def remove_folder(folder: Path) -> None:
    """Delete a folder (or file) so that a crash half-way never leaves a part of it under its own name.

    Of a symbolic link only the link is removed.
    """
    if folder.is_file() or folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        doomed = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.removed")
        if doomed != folder:
            folder.rename(doomed)
        shutil.rmtree(doomed)


def apply_umask(folder: Path) -> None:
    """Set the mode of a file, or of all in a folder, by the umask: safetensors creates files for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        if path.is_file():
            path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def saving(what: str, partial: Path):
    """End the run with one line if writing within fails, e.g. on a full disk. Removes `partial`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        raise RunError(cannot_be_saved(what, partial, error)) from error


def cannot_be_saved(what: str, partial: Path, error: Exception) -> str:
    """The message for it. Removes `partial`."""
    with contextlib.suppress(OSError):
        remove_folder(partial)
    free = shutil.disk_usage(partial.parent).free / 2**20
    reason = " ".join(str(error).split())[:300]
    return f"{what} cannot be saved in {partial.parent}, where {free:.0f} MiB are free: {reason}"


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yields a temporary path that takes the place of `path`: a crash leaves the earlier file or the whole new one."""
    temporary = path.with_name(f".{path.name.removeprefix('.')}.partial")
    with saving(path.name, temporary):
        yield temporary
        sync(temporary)
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the earlier one or the whole new one."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
