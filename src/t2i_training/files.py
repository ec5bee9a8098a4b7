"""Putting files and folders in place so that a crash leaves the old or the new, and exporting the trained model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .hub import is_hub_name


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Rename folder or file `new` to `target`; what stood there is removed afterwards."""
    old = target.with_name(f".{target.name}.removed")
    remove_folder(old)
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Delete a folder (or file) so that a crash half-way never leaves a part of it under its own name."""
    if folder.is_file():
        folder.unlink()
    elif folder.is_dir():
        doomed = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.removed")
        if doomed != folder:
            folder.rename(doomed)
        shutil.rmtree(doomed)


def forget_local_paths(folder: Path) -> None:
    """Take out of each config.json where a network was loaded from, when that is a folder: it is nobody's business."""
    for file in [*folder.rglob("config.json"), *folder.rglob("*_config.json"), *folder.glob("model_index.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not is_hub_name(config.get("_name_or_path", "x")):
            del config["_name_or_path"]
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_readable(folder: Path) -> None:
    """Give files the modes that the umask asks for: safetensors writes its own for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def publish(output_dir, write: Callable[[Path], None], accelerator) -> list[str]:
    """On the main process let `write(folder)` fill a hidden folder, then move its entries into `output_dir`.

    Earlier ones of the same name are replaced. Returns the names. A crash while the files are being written leaves an
    earlier export as it was.
    """
    if not accelerator.is_main_process:
        return []
    partial = Path(output_dir) / ".export.partial"
    remove_folder(partial)
    partial.mkdir()
    write(partial)
    forget_local_paths(partial)
    make_readable(partial)
    for path in partial.rglob("*"):
        sync(path)
    # Folders before files, so that model_index.json never points at what is not there yet.
    names = [entry.name for entry in sorted(partial.iterdir(), key=lambda entry: (entry.is_file(), entry.name))]
    for name in names:
        replace_folder(partial / name, Path(output_dir) / name)
    partial.rmdir()
    return names
