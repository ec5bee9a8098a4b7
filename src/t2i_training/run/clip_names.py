"""The names of CLIP's tensors by which transformers before 5.6 finds them, in the files of an export.

Version 5.6 took "text_model." and "vision_model." off the names that it writes. What is older finds no tensor under the
new ones, starts with random weights, and only warns. Newer versions read either.
"""

import json
import os
import shutil
from pathlib import Path

from ..sources.weight_files import read_header


def keep_old_names(folder: Path) -> None:
    """Rename the tensors in each CLIP network's safetensors files below `folder`; their bytes stay as they are."""
    for part in {file.parent for file in folder.rglob("model*.safetensors")}:
        files = list(part.glob("model*.safetensors"))
        names = old_names({name for file in files for name in read_header(file)[0]})
        for file in files if names else []:
            _rename_tensors(file, names)
        for index in part.glob("model*.safetensors.index.json") if names else []:  # of weights in several files
            listed = json.loads(index.read_text(encoding="utf-8"))
            listed["weight_map"] = _renamed(listed["weight_map"], names)
            index.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def old_names(names: set[str]) -> dict[str, str]:
    """New name -> old one, for each tensor of a network that has two names; tensors of other networks have one."""
    names = names - {"__metadata__"}
    if "embeddings.token_embedding.weight" in names:  # CLIPTextModel
        return {name: f"text_model.{name}" for name in names}
    if "embeddings.patch_embedding.weight" in names:  # CLIPVisionModel
        return {name: f"vision_model.{name}" for name in names}
    if {"concept_embeds", "vision_model.embeddings.patch_embedding.weight"} <= names:  # the safety checker, around one
        return {name: f"vision_model.{name}" for name in names if name.startswith("vision_model.")}
    return {}


def _rename_tensors(file: Path, names: dict[str, str]) -> None:
    header, start = read_header(file)
    text = json.dumps(_renamed(header, names), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    partial = file.with_name(f".{file.name}.partial")
    with open(file, "rb") as source, open(partial, "wb") as target:
        source.seek(start)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 2**24)
    os.replace(partial, file)


def _renamed(entries: dict, names: dict[str, str]) -> dict:
    return {names.get(name, name): entry for name, entry in entries.items()}
