"""Files of LoRA adapters as kohya's scripts, A1111 and ComfyUI write and read them, and as diffusers does."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from peft.utils.other import get_pattern_key

from ..errors import Unfit
from ..sources import original_files
from . import tensor_file

KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_KOHYA = re.compile(r"lora_(?P<part>unet|te1?)_(?P<module>\w+)\.(?P<side>lora_down|lora_up|alpha)(\.weight)?")
_DIFFUSERS = re.compile(  # names of all its versions; "base_model.model." is peft's own
    r"((?P<part>unet|text_encoder)\.)?(base_model\.model\.)?(?P<module>.+?)"
    r"(\.lora|\.lora_linear_layer|_lora)?\.(?P<side>down|up|lora_A|lora_B)(\.default)?\.weight"
)
_SIDES = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up"}
_OTHERS = (("hada_", "a LoHa"), ("lokr_", "a LoKr"), ("dora_scale", "a DoRA"), ("magnitude_vector", "a DoRA"),
           ("lora_mid", "a LoCon with a Tucker core"), ("oft_", "an OFT"), ("lora_te2_", "a LoRA of SDXL"))  # fmt: skip


class Adapter(NamedTuple):
    """W + up @ down in one module (arXiv:2106.09685); a scale of alpha / rank is multiplied into `up`."""

    down: torch.Tensor  # (rank, in) or, of a convolution, (rank, in, h, w); fp32
    up: torch.Tensor  # (out, rank) or (out, rank, 1, 1); fp32


def read(file: Path, networks: dict[str, torch.nn.Module]) -> dict[str, dict[str, Adapter]]:
    """The adapters of "unet" and "text_encoder" in a file, by their modules' names in these networks.

    Raises Unfit where the file holds anything else, or is of another model: nothing in it is passed over.
    """
    try:
        tensors = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise Unfit(f"cannot be read ({error}): download it again") from None
    for mark, what in _OTHERS:
        if any(mark in name for name in tensors):
            raise Unfit(f"is {what}, and LoRA adapters of Stable Diffusion 1.x or 2.x are needed")
    found = {part: defaultdict(dict) for part in networks}
    modules = {part: _modules(network) for part, network in networks.items()}
    for name, tensor in tensors.items():
        part, module, side = _parse(name, modules)
        found[part][module][side] = tensor.float()
    scales = _stated_scales(original_files.read(file)[1])
    return {
        part: {
            module: _adapter(module, sides, scales.get(part), networks[part].get_submodule(module))
            for module, sides in sorted(found[part].items())
        }
        for part in networks
    }


def _modules(network) -> dict[str, str]:
    """Ways to write a module's name -> the name. transformers 5.6 took "text_model." off."""
    names = [name for name, module in network.named_modules() if hasattr(module, "weight")]
    written = {}
    for name in names:
        for known in (name, f"text_model.{name.removeprefix('text_model.')}"):
            written[known] = written[known.replace(".", "_")] = name
    return written


def _parse(name: str, modules: dict[str, dict[str, str]]) -> tuple[str, str, str]:
    """(part, module, down, up or alpha) of a tensor's name."""
    match = _KOHYA.fullmatch(name) or _DIFFUSERS.fullmatch(name)
    if match is None:
        raise Unfit(f"holds {name}, which is no part of a LoRA")
    part = {"unet": "unet", None: "unet"}.get(match["part"], "text_encoder")
    written = re.sub(r"\.processor\.to_", ".to_", match["module"])
    written = re.sub(r"\.to_out$", ".to_out.0", written)
    module = modules[part].get(written)
    if module is None:
        raise Unfit(f"has adapters for {match['module']}, which the model's {part} does not have")
    return part, module, _SIDES.get(match["side"], match["side"])


def _stated_scales(texts: dict[str, str]) -> dict[str, dict]:
    """The configurations that diffusers leaves in the header, of each part: rank and alpha, as peft has them."""
    stated = json.loads(texts.get("lora_adapter_metadata", "{}"))
    parts = defaultdict(dict)
    for name, value in stated.items():
        part, _, key = name.partition(".") if name.startswith(("unet.", "text_encoder.")) else ("unet", "", name)
        parts[part][key] = value
    for config in parts.values():
        for key in ("use_rslora", "use_dora", "lora_bias"):
            if config.get(key):
                raise Unfit(f"has adapters with {key}, which is not read")
    return parts


def _adapter(module: str, sides: dict, config: dict | None, target: torch.nn.Module) -> Adapter:
    if not {"down", "up"} <= sides.keys():
        raise Unfit(f"has no {'down' if 'up' in sides else 'up'} weight for {module}: download it again")
    down, up = sides["down"], sides["up"]
    rank, alpha = down.shape[0], sides.get("alpha")
    if alpha is None and config:
        pattern = config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(pattern.keys(), module), config.get("lora_alpha", rank))
    # A convolution of one pixel may be written as a matrix, and the other way round.
    if target.weight.ndim == 4 and down.ndim == 2:
        down, up = down[..., None, None], up[..., None, None]
    elif target.weight.ndim == 2 and down.ndim == 4:
        down, up = down.flatten(1), up.flatten(1)
    if down.shape[1:] != target.weight.shape[1:] or up.shape[:2] != (target.weight.shape[0], rank):
        raise Unfit(
            f"has adapters of shape {tuple(up.shape)} @ {tuple(down.shape)} for {module}, whose weight is "
            f"{tuple(target.weight.shape)} in this model"
        )
    return Adapter(down, up if alpha is None else up * (float(alpha) / rank))


def write_kohya(file: Path, adapters: dict[str, dict[str, Adapter]], precision: str, texts: dict[str, str]) -> None:
    """One file with the names that kohya's scripts, A1111 and ComfyUI know, alpha = rank beside each pair.

    `texts` are its header's, besides kohya's own: SS_METADATA_MINIMUM_KEYS of its library/train_util.py.
    """
    tensors, ranks = {}, set()
    for part, of_part in adapters.items():
        for module, (down, up) in of_part.items():
            known = f"text_model.{module.removeprefix('text_model.')}" if part == "text_encoder" else module
            stem = KOHYA_PREFIXES[part] + known.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = tensor_file.of(down)
            tensors[f"{stem}.lora_up.weight"] = tensor_file.of(up)
            tensors[f"{stem}.alpha"] = tensor_file.of(torch.tensor(float(down.shape[0])))
            ranks.add(down.shape[0])
    is_v2 = texts["modelspec.architecture"].startswith("stable-diffusion-v2")
    version = "sd_v1"
    if is_v2:
        version = "sd_v2_768_v" if texts["modelspec.prediction_type"] == "v" else "sd_v2"
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # as kohya's own tools write of several
    texts = {
        "format": "pt", "ss_v2": str(is_v2), "ss_base_model_version": version, "ss_network_module": "networks.lora",
        "ss_network_dim": rank, "ss_network_alpha": rank, "ss_network_args": "{}", **texts,
    }  # fmt: skip
    tensor_file.write(
        file, tensors, precision,
        lambda sha256: texts | {"modelspec.hash_sha256": f"0x{sha256}", "sshs_model_hash": sha256},
    )  # fmt: skip
