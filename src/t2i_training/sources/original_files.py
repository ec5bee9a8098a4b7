"""A Stable Diffusion in a single file (.safetensors, .ckpt) with the original names: which one it is. Imports no torch.

Told from the names and shapes of its tensors and from the texts in its header.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import Unfit
from . import families, weight_files

SUFFIXES = (".safetensors", ".ckpt")
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
UNET, VAE = PREFIXES["unet"], PREFIXES["vae"]
TEXT_ENCODERS = ("cond_stage_model.transformer.text_model.", "cond_stage_model.model.")  # CLIP's, OpenCLIP's
CONFIGURATIONS = "t2i_training.configurations"  # in the header of files of these scripts: *.json by name, as JSON
_EMA = "model_ema."
_OTHERS = (  # pattern of a tensor's name, what the file is
    (r"conditioner\.embedders\.", "a Stable Diffusion XL"),
    (r"lora_unet_|lora_te|.*\.lora_(down|up|A|B)\.|.*\.lora\.(down|up)\.|.*\.(hada|lokr)_w", "a LoRA"),
    (r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks|double_layers)\.", "a newer architecture"),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.", "a VAE"),
    (r"(down_blocks|conv_in|time_embedding)\.", "the UNet of a folder of diffusers"),
    (r"(text_model\.)?(embeddings|encoder\.layers)\.", "the text encoder of a folder of diffusers"),
    (r"control_model\.|controlnet_", "a ControlNet"),
    (r"string_to_param|emb_params|\*", "an embedding (textual inversion)"),
)
_INSTEAD = {
    "a VAE": "give it as --pretrained_vae_model_name_or_path, beside a whole model",
    "a LoRA": "give the model that it was trained on",
    "the UNet of a folder of diffusers": "give the folder that has model_index.json",
    "the text encoder of a folder of diffusers": "give the folder that has model_index.json",
}
_INPUTS = {9: "for inpainting", 5: "with depth", 8: "for editing", 7: "for upscaling"}  # channels of the UNet
NEEDED = "a whole Stable Diffusion 1.x or 2.x is needed"


@dataclass(frozen=True)
class Original:
    """What a single file holds."""

    description: str  # for a line of the log
    configurations: dict  # for `families.write`


def identify(
    file: Path, tensors: dict[str, tuple], texts: dict[str, str], needs_vae: bool, prediction_type: str | None
) -> Original:
    """The `Original` in a file. Raises Unfit, with what it is instead, where it is none that the scripts train.

    `tensors` has the shapes by name, `texts` the metadata of a .safetensors. `prediction_type` is the flag's value.
    """
    inputs = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if inputs is None:
        raise Unfit(_what_instead(tensors))
    if inputs[1] != 4:
        raise Unfit(f"is a model {_INPUTS.get(inputs[1], f'of {inputs[1]} input channels')}; {NEEDED}")
    if any(name.startswith("conditioner.embedders.") for name in tensors):
        raise Unfit(f"is a Stable Diffusion XL; {NEEDED}")
    if not any(name.startswith(TEXT_ENCODERS) for name in tensors):
        raise Unfit(f"has a UNet and no text encoder that is read here; {NEEDED}")
    if needs_vae and not any(name.startswith(VAE) for name in tensors):
        raise Unfit("has no VAE: add one with --pretrained_vae_model_name_or_path")
    family, configurations, stated = _family(tensors, texts)
    predicts, reason = _prediction(file, tensors, texts, family, stated, prediction_type)
    if configurations is None:
        configurations = {"1": families.SD1, "epsilon": families.SD2, "v_prediction": families.SD2_V}[
            family if family == "1" else predicts
        ]
    scheduler = configurations["scheduler/scheduler_config.json"] | {"prediction_type": predicts}
    description = f"Stable Diffusion {family}.x that predicts {'epsilon' if predicts == 'epsilon' else 'v'} ({reason})"
    if any(name.startswith(_EMA) for name in tensors):
        description += "; of its two sets of UNet weights the trained one is used, not the average (EMA)"
    return Original(description, configurations | {"scheduler/scheduler_config.json": scheduler})


def _what_instead(tensors) -> str:
    for pattern, what in _OTHERS:
        if any(re.match(pattern, name) for name in tensors):
            return f"is {what}: {_INSTEAD.get(what, NEEDED)}"
    return f"holds no UNet of a Stable Diffusion ({len(tensors)} other tensors); {NEEDED}"


def _family(tensors, texts) -> tuple[str, dict | None, str | None]:
    """(1 or 2, the configurations that the file states, the prediction type that they state)."""
    if found := stated_configurations(texts):
        stated = found["scheduler/scheduler_config.json"].get("prediction_type", "epsilon")
        return "2" if found["text_encoder/config.json"].get("hidden_act") == "gelu" else "1", found, stated
    width = next((shape[1] for name, shape in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    if width not in (768, 1024):
        raise Unfit(f"has a UNet that reads text states of {width} numbers, not of 768 or 1024; {NEEDED}")
    return "1" if width == 768 else "2", None, None


def stated_configurations(texts: dict[str, str]) -> dict | None:
    """The configurations in the header of a file that these scripts wrote. Raises Unfit if they are damaged."""
    if CONFIGURATIONS not in texts:
        return None
    try:
        found = json.loads(texts[CONFIGURATIONS])
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in families.SD1):
        raise Unfit("has configurations in its header that cannot be read")
    return {name: found[name] for name in [*families.SD1, *families.VOCABULARY] if name in found}


def _prediction(file, tensors, texts, family, stated, flag) -> tuple[str, str]:
    """(epsilon or v_prediction, how that is known)."""
    if flag is not None:
        return flag, "by --prediction_type"
    if stated is not None:
        return stated, "by its header"
    if texts.get("modelspec.prediction_type") in ("epsilon", "v"):
        return {"epsilon": "epsilon", "v": "v_prediction"}[texts["modelspec.prediction_type"]], "by its header"
    if "v_pred" in tensors:
        return "v_prediction", "by its tensor v_pred"
    sidecar = file.with_suffix(".yaml")  # A1111's convention for models that need a configuration
    if sidecar.is_file():
        is_v = re.search(r"parameterization:\s*[\"']?v\b", sidecar.read_text(encoding="utf-8", errors="replace"))
        return "v_prediction" if is_v else "epsilon", f"by {sidecar.name}"
    if family == "1":
        return "epsilon", "as all of 1.x do that do not say otherwise"
    raise Unfit(
        "is a Stable Diffusion 2.x, whose weights do not tell what it predicts: add --prediction_type=v_prediction "
        "(most models for 768 pixels) or --prediction_type=epsilon (2-base and 2-1-base, for 512)"
    )


def check(file: Path, needs_vae: bool, prediction_type: str | None) -> None:
    """Raise Unfit unless a file can be trained, judging by its header. A .ckpt's names are only read with torch."""
    if file.suffix.lower() not in SUFFIXES:
        raise Unfit(f"is a file, and of files only {' and '.join(SUFFIXES)} are read")
    if fault := weight_files.damage(file):
        raise Unfit(f"cannot be read: it {fault}")
    if file.suffix.lower() == ".safetensors":
        identify(file, *read(file), needs_vae, prediction_type)


def read(file: Path) -> tuple[dict[str, tuple], dict[str, str]]:
    """Of a .safetensors: the tensors' shapes by name, and the texts in its header."""
    header, _ = weight_files.read_header(file)
    texts = header.pop("__metadata__", {})
    return {name: tuple(entry["shape"]) for name, entry in header.items()}, texts
