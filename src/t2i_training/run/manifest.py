"""A checkpoint's manifest: position, seed, versions, size and SHA-256 of each file. Writes and verifies it."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from .. import sanitize
from ..files import sha256, sync

MANIFEST = "manifest.json"
FORMAT = 1
_COUNTS = ("samples_seen", "seed", "effective_batch", "dataset_size", "total")


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file has the size and the hash that its manifest states."""
    try:
        manifest = read_manifest(folder)
        number = re.fullmatch(r"\.?checkpoint-(\d+)(\..+)?", folder.name)  # or it was given another name
        if not _is_ours(manifest) or (number and int(number[1]) != manifest["step"]):
            return f"{MANIFEST} is of another format"
        if "digest" in manifest and manifest["digest"] != _digest(manifest):
            return f"{MANIFEST} is damaged"
        for name, (size, digest) in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{sanitize.printable(name)} is missing"
            if path.stat().st_size != size or sha256(path) != digest:
                return f"{sanitize.printable(name)} is damaged"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written by these scripts or not completely"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _is_ours(manifest: dict) -> bool:
    """Whether the manifest is plausible: non-negative integers, and files inside the checkpoint's folder."""
    counts = [manifest[name] for name in ("step", *_COUNTS) if name == "step" or name in manifest]
    pairs = [pair for pair in manifest.get("unreported", []) if len(pair) != 2 or {*map(type, pair)} - {int, float}]
    paths = [PurePosixPath(name) for name in manifest["files"]]
    inside = paths and all(path.parts and not path.is_absolute() and ".." not in path.parts for path in paths)
    sound = all(type(n) is int and n >= 0 for n in counts) and not pairs and inside
    return manifest["format"] == FORMAT and bool(sound)


def _digest(manifest: dict) -> str:
    """The hash of a manifest without its own hash entry."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, position: dict) -> None:
    """Flush every file to the disk, then the manifest that describes them.

    Each file has a thread, which hashes it from the page cache while the disk writes.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(2 * len(paths)) as pool:
        synced, digests = pool.map(sync, paths), pool.map(sha256, paths)
        files = {
            path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
            for path, digest, _ in zip(paths, digests, synced, strict=True)
        }
    versions = _versions() | position.get("versions", {})
    manifest = {"format": FORMAT, **position, "versions": versions, "files": files}
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    for directory in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(directory)


def _versions() -> dict[str, str]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "accelerate", "numpy")}
