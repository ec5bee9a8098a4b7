"""Parts of a Stable Diffusion that training neither loads nor changes: a full run's export has the base's files.

A safety checker is 304 million weights, which every process would load only for one of them to write them again.
"""

import json
import pickle
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import sanitize
from ..log import logger

PARTS = ("feature_extractor", "safety_checker", "image_encoder")
NOT_LOADED = {**dict.fromkeys(PARTS), "requires_safety_checker": False}  # options of `from_pretrained`
_CLASSES = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # the name of today


def fetch(args, **options) -> Path:
    """The base's folder or file; of a hub's repository the folder in the cache, into which all of it is downloaded.

    A full run calls it before it trains: hours later nothing that it exports is missing.
    """
    name = args.pretrained_model_name_or_path
    if Path(name).exists():
        return Path(name)
    source = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    return Path(StableDiffusionPipeline.download(name, **source, **options))


def save(pipeline: StableDiffusionPipeline, args, folder: Path) -> None:
    """Write a pipeline that was loaded without them, and add them."""
    pipeline.save_pretrained(folder)
    try:
        base = fetch(args, local_files_only=True)
    except (OSError, ValueError):  # the cache has been cleared meanwhile
        base = Path(args.pretrained_model_name_or_path)
    carry_over(base, args.variant, folder)


def carry_over(base: Path, variant: str | None, folder: Path) -> None:
    """Copy the parts of the pipeline `base` into `folder`, an exported one, and name them in its model_index.json.

    One that the base names and does not have, or not whole, is left out, and a line says so. After hours of training
    the base itself may be gone.
    """
    file = folder / "model_index.json"
    try:
        theirs = {} if base.is_file() else json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning(f"{base} cannot be read any more ({error}): a safety checker of it is left out of the export")
        theirs = {}
    index = json.loads(file.read_text(encoding="utf-8")) | {part: [None, None] for part in PARTS}
    for part in PARTS:
        library, name = theirs.get(part) or (None, None)
        if name is None:
            continue
        reason = "its feature_extractor is not there" if _lacks_extractor(part, index) else None
        reason = reason or _copy(base / part, folder / part, variant)
        if reason:
            logger.info(f"the base's {part} is left out of the export: {reason}")
        else:
            name = name.removeprefix("Flax")
            index[part] = [library, _CLASSES.get(name, name)]
    wanted = theirs.get("requires_safety_checker", True)
    index["requires_safety_checker"] = bool(wanted and index["safety_checker"][-1])
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _lacks_extractor(part: str, index: dict) -> bool:
    """diffusers loads no safety checker without one."""
    return part == "safety_checker" and index["feature_extractor"][-1] is None


def _copy(source: Path, target: Path, variant: str | None) -> str | None:
    """Why a part cannot be had, or None when its settings and weights are in the folder `target`."""
    if not source.is_dir():
        return f"{source} is not there"
    try:
        settings = {file.name: file.read_bytes() for file in source.glob("*.json") if ".index." not in file.name}
        weights = _find_weights(source, variant) if "config.json" in settings else None
        tensors = _read(weights) if weights else None
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        return f"{source} cannot be read ({type(error).__name__}: {sanitize.reason(error)[:200]})"
    if "config.json" in settings and weights is None:
        return f"{source} has no weights that are read here"
    if not settings:
        return f"{source} is empty"
    target.mkdir()
    for name, content in settings.items():
        (target / name).write_bytes(content)
    if tensors is not None:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    elif weights:
        shutil.copyfile(weights, target / "model.safetensors")
    return None


def _find_weights(source: Path, variant: str | None) -> Path | None:
    """A network's file: of the variant if there is one, and by safetensors if there is one."""
    for mark in (f".{variant}", "") if variant else ("",):
        for name in (f"model{mark}.safetensors", f"pytorch_model{mark}.bin"):
            if (source / name).is_file():
                return source / name
    return None


def _read(weights: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a .bin file; of safetensors, which are copied as they are, None. An error if it is not whole."""
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt"):
            return None
    tensors = torch.load(weights, map_location="cpu", weights_only=True)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
