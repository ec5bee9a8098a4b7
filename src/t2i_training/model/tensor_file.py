"""safetensors files, read and written one tensor at a time: a file of gigabytes takes the memory of one tensor."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import sanitize
from ..log import logger
from ..sources.weight_files import read_header

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLANK = "0" * 64  # of a SHA-256 in hexadecimal that is not known yet


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made by `read()`, each time anew."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def of(tensor: torch.Tensor) -> Lazy:
    """A tensor in memory as a `Lazy` one; nothing is copied."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu())


def tensors(file: Path) -> dict[str, Lazy]:
    """The tensors of a safetensors file, by name. ValueError if it is none; OSError if it cannot be read."""
    header, begin = read_header(file)

    def lazy(entry) -> Lazy:
        (start, end), dtype, shape = entry["data_offsets"], _DTYPES[entry["dtype"]], entry["shape"]

        def read() -> torch.Tensor:  # not mapped into memory, where pages that were read would count as used
            data = bytearray(end - start)
            with open(file, "rb") as opened:
                opened.seek(begin + start)
                if opened.readinto(data) != len(data):
                    raise ValueError(f"{file} is shorter than its header promises")
            return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

        return Lazy(tuple(shape), dtype, read)

    return {name: lazy(entry) for name, entry in header.items() if name != "__metadata__"}


def modelspec(args, resolution: int, is_v2: bool, is_v: bool, suffix: str = "") -> dict[str, str]:
    """What model managers show of a file (github.com/Stability-AI/ModelSpec, 1.0.1).

    Without date and output folder: equal runs write equal files. `is_v2`: of Stable Diffusion 2.x; `is_v`: it predicts
    v; `suffix` is "/lora" for adapters.
    """
    base = Path(args.pretrained_model_name_or_path or "Stable Diffusion")
    architecture = "stable-diffusion-v1"
    if is_v2:
        architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    found = {
        "sai_model_spec": "1.0.1", "architecture": architecture + suffix,
        "title": args.metadata_title or f"{base.stem if base.is_file() else base.name}, fine-tuned",
        "implementation": "diffusers" if suffix else "https://github.com/Stability-AI/generative-models",
        "resolution": f"{resolution}x{resolution}", "prediction_type": "v" if is_v else "epsilon",
        "license": args.metadata_license, "trigger_phrase": args.metadata_trigger_phrase,
    }  # fmt: skip
    return {f"modelspec.{name}": sanitize.printable(value) for name, value in found.items() if value}


def write(file: Path, tensors: dict[str, Lazy], precision: str, metadata: Callable[[str], dict[str, str]]) -> None:
    """Write the tensors, those of floating-point numbers in a `precision` of PRECISIONS; memory for one at a time.

    `metadata(sha256)` makes the header's texts; `sha256` is that of all tensors' bytes, as modelspec.hash_sha256 has
    it. Its length must not depend on the digest. What fp16 cannot hold (beyond 65504) is written as fp32, with a
    warning: an infinite weight makes every image black.
    """
    # For fp16 each tensor is read twice: its type decides where all that follow lie.
    dtypes = {name: _dtype(name, tensor, PRECISIONS[precision]) for name, tensor in tensors.items()}
    # Wide types first, as safetensors itself orders them: every tensor is then aligned.
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header, position = {}, 0
    for name in names:
        size = math.prod(tensors[name].shape) * dtypes[name].itemsize
        offsets = [position, position + size]
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(tensors[name].shape), "data_offsets": offsets}
        position += size
    digest = hashlib.sha256()
    with open(file, "wb") as opened:
        opened.write(_header(header, metadata(_BLANK)))
        for name in names:
            data = _bytes(tensors[name].read().to(dtypes[name]))
            digest.update(data)
            opened.write(data)
        opened.seek(0)
        opened.write(_header(header, metadata(digest.hexdigest())))
        opened.flush()
        os.fsync(opened.fileno())


def _dtype(name: str, tensor: Lazy, wanted: torch.dtype) -> torch.dtype:
    if not tensor.dtype.is_floating_point:
        return tensor.dtype
    if wanted == torch.float16 and tensor.dtype != torch.float16 and tensor.shape:
        largest = tensor.read().abs().max() if math.prod(tensor.shape) else torch.zeros(())
        if largest > torch.finfo(torch.float16).max:
            logger.warning(f"{name} holds numbers too large for fp16: it is written as fp32")
            return torch.float32
    return wanted


def _header(tensors: dict, texts: dict[str, str]) -> bytes:
    text = json.dumps({"__metadata__": texts} | tensors, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's numbers, row by row, without a copy if it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
