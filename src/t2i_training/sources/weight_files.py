"""The files with a network's weights: which of them a run reads, and whether they are complete. Imports no torch."""

import json
import re
import zipfile
from pathlib import Path

from ..errors import Unfit
from . import stand_ins

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model|diffusion_flax_model|flax_model)"
    r"(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?\.(?P<type>safetensors|bin|msgpack)"
)
_INDEX = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)\.(?:safetensors|bin)\.index(?:\.\w+)?\.json")
_UNFINISHED = (".crdownload", ".part", ".partial", ".incomplete", ".download", ".tmp", ".aria2", ".!qb")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors rejects longer headers


def check(parts, files, folder: Path | None, kinds: tuple, variant: str | None, choose: bool) -> None:
    """Raise Unfit unless each network of `parts` has weights of one of `kinds`, of the `variant` if any part has it.

    `files` are relative to `folder`, where they are checked; `folder` is None for a hub repository. With `choose` the
    user chooses by --variant, otherwise any variant will do.
    """
    found = {part: variants(files, part, kinds) for part in parts}
    for part, there in found.items():
        if not there:
            raise Unfit(f"has no weights in {part}/{_other_files(files, part)}")
    if choose:
        everywhere = sorted({name for there in found.values() for name in there if name})
        if variant and variant not in everywhere:
            there = f"there are: {', '.join(everywhere)}" if everywhere else "leave the flag out"
            raise Unfit(f"has no weights of --variant={variant}; {there}")
        for part, there in found.items():
            if "" not in there and variant not in there:
                raise Unfit(f"has weights in {part}/ only of a variant: try --variant={sorted(there)[0]}")
    for part, there in found.items() if folder else ():
        _check_whole(folder, files, part, variant if variant in there else min(there), kinds)


def variants(files, part: str, kinds=("safetensors", "bin")) -> set[str]:
    """The variants ("" for the plain one) of which a network has weights."""
    return {match["variant"] or "" for _, match in _matches(files, part) if match["type"] in kinds}


def _matches(files, part: str) -> list[tuple[str, re.Match]]:
    found = ((file, _WEIGHTS.fullmatch(file.removeprefix(f"{part}/"))) for file in files if file.startswith(f"{part}/"))
    return [(file, match) for file, match in found if match]


def _other_files(files, part: str) -> str:
    there = sorted(file for file in files if file.startswith(f"{part}/"))
    if any(file.endswith(".msgpack") for file in there):
        return ", only Flax's, which train_text_to_image_flax.py reads"
    other = [file for file in there if not file.endswith((".json", ".txt", ".md"))]
    if not other:
        return ""
    if unfinished := [file for file in other if file.lower().endswith(_UNFINISHED)]:
        return f", only {unfinished[0]}, an unfinished download"
    named = [file for file in other if file.endswith((".safetensors", ".bin")) and not re.search("lora|adapter", file)]
    if len(named) == 1:
        kind = named[0].rpartition(".")[2]
        stems = {"safetensors": "model", "bin": "pytorch_model"}  # transformers'
        stem = stems[kind] if "encoder" in part else "diffusion_pytorch_model"
        return f", only {named[0]}, whose name must be {part}/{stem}.{kind}"
    return f", only {', '.join(other)[:200]}, which is read by no diffusers pipeline"


def _check_whole(folder: Path, files, part: str, variant: str, kinds) -> None:
    """Raise Unfit unless all files of one variant, of the preferred kind, exist and are intact."""
    matches = [(file, match) for file, match in _matches(files, part) if (match["variant"] or "") == variant]
    kind = next(kind for kind in kinds if any(match["type"] == kind for _, match in matches))
    used = [file for file, match in matches if match["type"] == kind]
    for index in [file for file in files if file.startswith(f"{part}/") and _INDEX.fullmatch(file.partition("/")[2])]:
        listed = {f"{part}/{name}" for name in _listed(folder / index)}
        if listed & {*used} and (lost := sorted(listed - {*files})):
            raise Unfit(f"has no {lost[0]}, which holds a part of its weights: it was not copied completely")
    for file in used:
        if fault := damage(folder / file):
            raise Unfit(f"cannot be read: {file} {fault}")


def _listed(index: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unfit(f"holds a {'/'.join(index.parts[-2:])} that cannot be read ({type(error).__name__})") from None


def damage(file: Path) -> str | None:
    """What is wrong with a weight file, judging by size, header and first bytes; None if nothing."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            start = opened.read(1000)
    except OSError as error:
        return f"is {stand_ins.link_to_nothing(file) or f'not to be opened: {error.strerror}'}"
    if not size:
        return "is empty: fetch it again"
    if instead := stand_ins.of_content(start):
        return f"is {instead}"
    if file.suffix == ".safetensors":
        return _damaged_tensors(file, size)
    if file.suffix == ".bin" and start.startswith(b"PK") and not zipfile.is_zipfile(file):
        return "is damaged or incomplete: fetch it again"
    return None


def _damaged_tensors(file: Path, size: int) -> str | None:
    try:
        header, begin = read_header(file)
    except (ValueError, RecursionError):
        return f"is damaged or incomplete: it has {size} bytes, and no whole header: fetch it again"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    promised = begin + max(ends, default=0)
    if promised == size:
        return None
    return f"is damaged or incomplete: it has {size} bytes, and its header promises {promised}: fetch it again"


def lora_rank(file: Path) -> int:
    """The rank that most adapters of a LoRA file have. Raises Unfit if it is none."""
    if file.suffix.lower() != ".safetensors":
        raise Unfit("is no .safetensors, the only files that LoRA weights are read from")
    if fault := damage(file):
        raise Unfit(f"cannot be read: it {fault}")
    downs = re.compile(r".*[._](lora_down|lora_A(\.default)?|lora(_linear_layer)?\.down)\.weight")
    ranks = [entry["shape"][0] for name, entry in read_header(file)[0].items() if downs.fullmatch(name)]
    if not ranks:
        raise Unfit("holds no LoRA adapters")
    return max(sorted(set(ranks)), key=ranks.count)


def read_header(file: Path) -> tuple[dict, int]:
    """Of a safetensors file: name -> type, shape and place of each tensor; and where the tensors' bytes begin.

    ValueError if there is none.
    """
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _LONGEST_HEADER:
            raise ValueError(f"{file} has no header of safetensors")
        header = json.loads(opened.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"{file} has no header of safetensors")
    return header, 8 + size


def absent(network) -> list[str]:
    """Names of a loaded network's tensors for which its folder has none: transformers fills them with random numbers.

    By the ends of names: transformers and older files put different prefixes before them.
    """
    there = set()
    for file in [path for path in Path(network.name_or_path).glob("*") if _WEIGHTS.fullmatch(path.name)]:
        for name in _tensor_names(file):
            parts = name.split(".")
            there.update(".".join(parts[i:]) for i in range(len(parts)))
    names = network.state_dict() if there else ()
    return [name for name in names if not {name, re.sub(r"^(text|vision)_model\.", "", name)} & there]


def _tensor_names(file: Path):
    if file.suffix == ".safetensors":
        return read_header(file)[0]
    if file.suffix == ".bin" and zipfile.is_zipfile(file):  # torch wrote it otherwise before 1.6
        import torch

        return torch.load(file, map_location="meta", mmap=True, weights_only=True)
    return ()
