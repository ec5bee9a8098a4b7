"""Exports the trained model: atomically, without local paths, with names that all versions of transformers read."""

import json
from collections.abc import Callable
from pathlib import Path

from ..distributed import barrier
from ..files import apply_umask, move_aside, remove_folder, replace_folder, saving, sync
from ..sanitize import is_hub_name
from .clip_names import keep_old_names


def strip_local_paths(folder: Path) -> None:
    """Remove local paths (`_name_or_path`) from each config.json, since an export may be published."""
    for file in [*folder.rglob("config.json"), *folder.rglob("*_config.json"), *folder.glob("model_index.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not is_hub_name(config.get("_name_or_path", "x")):
            del config["_name_or_path"]
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_atomically(output_dir, write: Callable[[Path], None], accelerator) -> list[str]:
    """On the main process let `write(folder)` fill a hidden folder, then move its entries into `output_dir`.

    Earlier ones of the same name are replaced. Returns the names. A crash while the files are being written leaves an
    earlier export as it was.
    """
    if not accelerator.is_main_process:
        barrier(accelerator)
        return []
    partial = Path(output_dir) / ".export.partial"
    with saving("the trained model", partial):
        remove_folder(partial)
        partial.mkdir()
        write(partial)
        strip_local_paths(partial)
        keep_vocabulary_files(partial)
        keep_old_names(partial)
        apply_umask(partial)
        for path in partial.rglob("*"):
            sync(path)
    # Folders before files, so that model_index.json never names a folder that is not there yet.
    names = [entry.name for entry in sorted(partial.iterdir(), key=lambda entry: (entry.is_file(), entry.name))]
    for name in names:
        new, target = partial / name, Path(output_dir) / name
        if _files(target) - _files(new) or (target.is_file() and new.is_dir()):
            move_aside(target)  # it holds files that this run did not write
        replace_folder(new, target)
    partial.rmdir()
    barrier(accelerator)
    return names


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def keep_vocabulary_files(folder: Path) -> None:
    """Write vocab.json and merges.txt beside each tokenizer.json: older stacks need what transformers 5 leaves out.

    In tokenizer.json itself the padding and truncation of the last call are taken out: they depend on who called.
    """
    for file in folder.rglob("tokenizer.json"):
        tokenizer = json.loads(file.read_text(encoding="utf-8")) | {"padding": None, "truncation": None}
        file.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
        model = tokenizer["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        file.with_name("vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
