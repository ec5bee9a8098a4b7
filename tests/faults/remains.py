"""What runs leave in an output folder: whether it can be read, what should not be there, and all that must be equal."""

import hashlib
import json
from pathlib import Path

import runs
import yaml
from PIL import Image
from safetensors import safe_open
from scripts import SCRIPTS

from t2i_training.files import sha256
from t2i_training.run import checkpoint

HIDDEN = {".lock", ".inspected_pictures.json"}  # that a finished run leaves


def unreadable(folder: Path, had_checkpoint: bool) -> list[str]:
    """What in an output folder cannot be read, at whatever moment its run died."""
    faults = []
    numbered = checkpoint._numbered(folder)
    for place in numbered:
        if fault := checkpoint.verify(place):
            faults.append(f"{place.name}: {fault}")
    if had_checkpoint and not numbered and not any(_whole_removed(folder)):
        faults.append("no checkpoint is left")
    for path, read in _readers(folder):
        try:
            read(path)
        except Exception as error:  # of whatever kind
            faults.append(f"{path.relative_to(folder)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return faults


def _whole_removed(folder: Path):
    return (place for place in folder.glob(".checkpoint-*.removed") if checkpoint.verify(place) is None)


def _readers(folder: Path):
    """(path, function that raises if it is not whole) of what is there."""
    kinds = {
        "metrics.jsonl": _read_rows, "run_config.yaml": _read_config, "README.md": _read_card,
        "training_curves.png": _read_picture, "validation/*.png": _read_picture, "validation/*/*.png": _read_picture,
        ".inspected_pictures.json": _read_json, "model_index.json": _read_pipeline, "*.safetensors": _read_weights,
        "encodings/*/[!.]*.safetensors": _read_encodings,
    }  # fmt: skip
    return [(path, read) for pattern, read in kinds.items() for path in sorted(folder.glob(pattern))]


def _read_rows(path: Path) -> None:
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last one may be cut short
    steps = [json.loads(line)["step"] for line in lines]
    if steps != sorted(set(steps)):
        raise ValueError(f"rows of the steps {steps}")


def _read_config(path: Path) -> None:
    if not yaml.safe_load(path.read_text(encoding="utf-8"))["output_dir"]:
        raise ValueError("no configuration")


def _read_card(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not text.startswith("---\n") or "| seed |" not in text:
        raise ValueError("no model card")


def _read_picture(path: Path) -> None:
    Image.open(path).load()


def _read_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _read_pipeline(path: Path) -> None:
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(path.parent)


def _read_weights(path: Path) -> None:
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def _read_encodings(path: Path) -> None:
    _read_weights(path)
    if path.stem != sha256(path)[:32]:
        raise ValueError("its content is not what its name says")


def leftovers(folder: Path, kept: int) -> list[str]:
    """What should not be there after the end: temporary files, and checkpoints beyond the limit."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    found = [name for name in names if Path(name).name.startswith(".") and Path(name).name not in HIDDEN]
    found += [name for name in names if name.endswith((".partial", ".removed", ".tmp", ".bak"))]
    numbered = checkpoint._numbered(folder)
    return sorted(set(found)) + [place.name for place in numbered[: len(numbered) - kept]]


def left(folder: Path, step: int, script: str) -> dict:
    """All that must not depend on how often a run was killed: `runs.outcome`, and what else a user finds."""
    return runs.outcome(folder, step, SCRIPTS[script].trained, 15) | {
        "pictures": {str(path.relative_to(folder)): _pixels(path) for path in sorted(folder.glob("**/*.png"))},
        "card": (folder / "README.md").read_text(encoding="utf-8"),
        "encodings": _encodings(folder),
    }


def _pixels(path: Path) -> str:
    return hashlib.sha256(Image.open(path).convert("RGB").tobytes()).hexdigest()


def _encodings(folder: Path) -> list[tuple[str, str]]:
    """(store, key) of each encoding, as often as it is there."""
    found = []
    for path in folder.glob("encodings/*/*.safetensors"):
        with safe_open(path, "np") as file:
            found += [(path.parent.name, key.tobytes().hex()) for key in file.get_tensor("keys")]
    return sorted(found)


def difference(result: dict, wanted: dict) -> list[str]:
    """The parts in which two of `left` differ."""
    return [part for part in wanted if result.get(part) != wanted[part]]
