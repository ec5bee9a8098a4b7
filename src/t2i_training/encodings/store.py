"""A folder of tensors by key, in shards that are complete or absent.

A shard is a safetensors file of some hundred encodings. It is named by the hash of its content, and put in place by one
rename. So a damaged shard does not match its name, and any number of processes and runs may write to a folder at once.
"""

import concurrent.futures
import contextlib
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from .. import files
from ..library_errors import readable_errors
from ..log import logger


class Store:
    """Encodings of one kind by their keys, in the shards of `folder`. Reading copies one encoding from a mapped file.

    Forked loader workers share it as it is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.scan()

    def scan(self) -> None:
        """List the shards in the folder. A file that is not a shard is damaged and removed.

        If a key occurs twice the older shard wins, so that results never change under a run.
        """
        self._places, self._files = {}, {}
        paths = [path for path in self.folder.glob("*.safetensors") if path.is_file()]
        # In the order in which they were renamed into place.
        for path in sorted(paths, key=lambda path: (path.stat().st_ctime_ns, path.name)):
            try:
                keys = self._keys(path.name)
            except (safetensors.SafetensorError, ValueError) as error:  # an OSError is not the file's fault
                self._discard(path.name, error)
                continue
            for i, key in enumerate(keys):
                self._places.setdefault(key.tobytes(), (path.name, i))

    def _open(self, name: str):
        if name not in self._files:
            self._files[name] = safetensors.safe_open(self.folder / name, framework="pt")
        return self._files[name]

    def _keys(self, name: str) -> np.ndarray:
        """(N, bytes of a key) uint8. Raises ValueError unless each tensor of the shard has N rows."""
        shard = self._open(name)
        shapes = {tensor: shard.get_slice(tensor).get_shape() for tensor in shard.keys()}  # noqa: SIM118
        rows, width = shapes["keys"] if len(shapes.get("keys", [])) == 2 else (None, 0)
        if not width or shard.get_slice("keys").get_dtype() != "U8" or any(s[:1] != [rows] for s in shapes.values()):
            raise ValueError("not a shard of encodings")
        return shard.get_tensor("keys").numpy()

    def __getstate__(self):
        return vars(self) | {"_files": {}}  # a spawned worker opens the files again

    def _discard(self, name: str, reason) -> None:
        logger.warning(f"{self.folder / name} is damaged ({reason}): its encodings are made again")
        self._files.pop(name, None)
        (self.folder / name).unlink(missing_ok=True)

    def verify(self, keys: Iterable[bytes]) -> None:
        """Hash the shards that hold any of `keys`, in parallel, and discard damaged ones.

        Takes half a second per gigabyte and core if the files are in the page cache.
        """
        names = {self._places[key][0] for key in keys if key in self._places}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            hashes = dict(zip(names, threads.map(lambda name: _hash(self.folder / name), names), strict=True))
        damaged = {name for name, digest in hashes.items() if name != f"{digest}.safetensors"}
        for name in damaged:
            self._discard(name, "its content has changed")
        self._places = {key: place for key, place in self._places.items() if place[0] not in damaged}

    def missing(self, keys: Iterable[bytes]) -> list[int]:
        """Indices of the `keys` that no shard holds."""
        return [i for i, key in enumerate(keys) if key not in self._places]

    def add(self, keys: list[bytes], encodings: dict[str, torch.Tensor]) -> None:
        """Write one shard: tensors (N, ...) by name, for N keys. They are on the disk when this returns."""
        tensors = {name: tensor.contiguous() for name, tensor in encodings.items()}
        tensors["keys"] = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1).copy())
        temporary = self.folder / f".{secrets.token_hex(8)}.partial"
        with readable_errors("--encodings_dir", str(self.folder)):
            try:
                safetensors.torch.save_file(tensors, temporary)
                files.apply_umask(temporary)
                files.sync(temporary)
                temporary.rename(self.folder / f"{_hash(temporary)}.safetensors")
            finally:
                temporary.unlink(missing_ok=True)
            files.sync(self.folder)

    def remove_stale(self, seconds: float) -> None:
        """Remove temporary files older than that, left by processes that were killed."""
        for path in self.folder.glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= seconds:
                    path.unlink()

    def read(self, key: bytes) -> dict[str, torch.Tensor]:
        """One encoding: tensors (...) by name."""
        name, i = self._places[key]
        shard = self._open(name)
        return {tensor: shard.get_slice(tensor)[i] for tensor in shard.keys() if tensor != "keys"}  # noqa: SIM118


def _hash(file: Path) -> str:
    return files.sha256(file)[:32]
