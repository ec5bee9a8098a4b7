"""The names that the tensors of Stable Diffusion have in its original files (github.com/CompVis/stable-diffusion and
github.com/Stability-AI/stablediffusion), as functions of those in diffusers and transformers.
"""

import re
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ..sources.original_files import PREFIXES
from . import tensor_file
from .tensor_file import Lazy

# Names within a block, diffusers' -> the original's.
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE_ATTENTION = {  # diffusers' names of today and of before 0.15
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def _unet_name(name: str, layers: int, attentive: set[str]) -> str:
    """The original name of a UNet's tensor. `layers` is the config's layers_per_block.

    The original counts all blocks from input to output: each ResNet, with its attention, and each downsampling as one.
    An upsampling belongs to the level's last block; `attentive` holds the levels on the way up that have attention.
    """
    part, leaf = name.rsplit(".", 1)
    if part in _ENDS:
        return f"{_ENDS[part]}.{leaf}"
    where, i, kind, j, rest = re.fullmatch(
        r"(down_blocks|mid_block|up_blocks)\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    ).groups()
    if kind == "resnets":
        inner, leaf = rest.split(".")
        rest = f"{_RESNET[inner]}.{leaf}"
    column = int(kind == "attentions")
    if where == "mid_block":
        return f"middle_block.{1 if column else 2 * int(j)}.{rest}"
    row = int(i) * (layers + 1) + int(j)
    if kind == "upsamplers":
        return f"output_blocks.{row + layers}.{2 if i in attentive else 1}.{rest}"
    if kind == "downsamplers":  # follows the level's ResNets
        return f"input_blocks.{row + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if where == "down_blocks":  # input_blocks.0 is conv_in
        return f"input_blocks.{row + 1}.{column}.{rest}"
    return f"output_blocks.{row}.{column}.{rest}"


def _unet(tensors: dict[str, Lazy], config: dict) -> Iterator[tuple[str, Lazy]]:
    attentive = {name.split(".")[1] for name in tensors if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return ((_unet_name(name, config["layers_per_block"], attentive), tensor) for name, tensor in tensors.items())


def _vae(tensors: dict[str, Lazy], config: dict) -> Iterator[tuple[str, Lazy]]:
    levels = len(config["block_out_channels"])
    for name, tensor in tensors.items():
        part, leaf = name.rsplit(".", 1)
        part = part.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        part = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", part)
        part = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", part)
        part = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", part)
        part = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", part
        )
        part = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", part)
        if attention := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", part):
            part = f"{attention[1]}.mid.attn_1.{_VAE_ATTENTION[attention[2]]}"
            if len(tensor.shape) == 2:  # a convolution of one pixel in the original
                tensor = _reshaped(tensor, (*tensor.shape, 1, 1))
        yield f"{part}.{leaf}", tensor


def _reshaped(tensor: Lazy, shape: tuple[int, ...]) -> Lazy:
    return Lazy(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


def _text_encoder(tensors: dict[str, Lazy], config: dict) -> Iterator[tuple[str, Lazy]]:
    """OpenAI's CLIP (1.x) keeps transformers' names; OpenCLIP's (2.x) has its own."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if config["hidden_act"] != "gelu":
        positions = torch.arange(config["max_position_embeddings"])[None]
        tensors["embeddings.position_ids"] = tensor_file.of(positions)
        yield from ((f"transformer.text_model.{name}", tensor) for name, tensor in tensors.items())
        return
    layers = config["num_hidden_layers"]
    for name, tensor in tensors.items():
        if name in _OPEN_CLIP:
            yield f"model.{_OPEN_CLIP[name]}", tensor
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, part, leaf = found.groups()
            if part in _OPEN_CLIP_LAYER:
                new = f"{_OPEN_CLIP_LAYER[part]}.{leaf}"
            elif part == "self_attn.q_proj":
                new = f"attn.in_proj_{leaf}"
                tensor = _joined([tensors[name.replace("q_proj", f"{each}_proj")] for each in "qkv"])
            else:  # k_proj and v_proj are joined with q_proj
                continue
            # Published files have a 24th layer, which nothing reads: programs that load strictly look for its names.
            rows = [int(layer), layers] if layers == 23 and int(layer) == layers - 1 else [int(layer)]
            yield from ((f"model.transformer.resblocks.{row}.{new}", tensor) for row in rows)
    if layers == 23:  # the same holds for these two
        yield "model.text_projection", tensor_file.of(torch.eye(config["hidden_size"]))
        yield "model.logit_scale", tensor_file.of(torch.tensor(100.0).log())


def _joined(tensors: list[Lazy]) -> Lazy:
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return Lazy(shape, tensors[0].dtype, lambda: torch.cat([tensor.read() for tensor in tensors]))


_LAYOUTS = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}


def original_layout(parts: dict[str, dict[str, Lazy]], configurations: dict[str, dict]) -> dict[str, Lazy]:
    """The tensors of a pipeline's networks under their original names.

    `parts` has the tensors of "unet", "vae" and "text_encoder", named as diffusers and transformers do.
    """
    found = {}
    for part, tensors in parts.items():
        named = _LAYOUTS[part](tensors, configurations[f"{part}/config.json"])
        found |= {PREFIXES[part] + name: tensor for name, tensor in named}
    return found


def lacking(names, configurations: dict[str, dict], parts=tuple(PREFIXES)) -> list[str]:
    """Which tensors of the networks that `configurations` describe are not among a file's `names`."""
    with torch.device("meta"):
        networks = {
            "unet": lambda config: UNet2DConditionModel.from_config(config),
            "vae": lambda config: AutoencoderKL.from_config(config),
            "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
        }
        made = {part: networks[part](configurations[f"{part}/config.json"]).state_dict() for part in parts}
    tensors = {part: {name: tensor_file.of(tensor) for name, tensor in made[part].items()} for part in parts}
    unread = re.compile(r".*(position_ids|resblocks\.23\..*|text_projection|logit_scale)")
    expected = original_layout(tensors, configurations)
    return [name for name in expected if name not in names and not unread.fullmatch(name)]
