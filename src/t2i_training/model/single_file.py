"""A whole Stable Diffusion 1.x or 2.x in one safetensors file, with the tensors' original names (github.com/CompVis):
what A1111, ComfyUI and model sites take. diffusers reads such files and writes none.

    python -m t2i_training.model.single_file my_model                          # a finished run's output folder
    python -m t2i_training.model.single_file my_model/checkpoint-500 --base stable-diffusion-v1-5/stable-diffusion-v1-5

writes single_file.safetensors into the folder that is given.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import sanitize
from ..cli import flags
from ..errors import Unfit
from ..files import atomic_write
from ..library_errors import readable_errors
from ..log import logger
from ..sources import clip_vocabulary, families
from ..sources.original_files import CONFIGURATIONS
from . import base, tensor_file
from .tensor_file import Lazy

NAME = "single_file.safetensors"
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}

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


def unet_name(name: str, layers: int) -> str:
    """The original name of a UNet's tensor. `layers` is the config's layers_per_block.

    The original counts all blocks from input to output, each ResNet, with its attention, and each resampling as one.
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
    if kind == "downsamplers":  # follows the level's ResNets
        return f"input_blocks.{row + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if where == "down_blocks":  # input_blocks.0 is conv_in
        return f"input_blocks.{row + 1}.{column}.{rest}"
    return f"output_blocks.{row}.{column}.{rest}"


def _unet(tensors: dict[str, Lazy], config: dict) -> Iterator[tuple[str, Lazy]]:
    layers = config["layers_per_block"]
    for name, tensor in tensors.items():
        if "upsamplers" in name:  # follows ResNet and attention within the level's last block
            level, rest = re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", name).groups()
            column = 1 + any(other.startswith(f"up_blocks.{level}.attentions.") for other in tensors)
            yield f"output_blocks.{int(level) * (layers + 1) + layers}.{column}.{rest}", tensor
        else:
            yield unet_name(name, layers), tensor


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
                names = [f"{_OPEN_CLIP_LAYER[part]}.{leaf}"]
            elif part == "self_attn.q_proj":
                names = [f"attn.in_proj_{leaf}"]
                tensor = _joined([tensors[name.replace("q_proj", f"{each}_proj")] for each in "qkv"])
            else:  # k_proj and v_proj are joined with q_proj
                continue
            # Published files have a 24th layer, which nothing reads: programs that load strictly look for its names.
            rows = [int(layer), layers] if layers == 23 and int(layer) == layers - 1 else [int(layer)]
            yield from ((f"model.transformer.resblocks.{row}.{names[0]}", tensor) for row in rows)
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


def write(folder: Path, args) -> None:
    """Write a pipeline's folder, as a run has exported it, into one file in it, with --save_precision and --metadata_*.

    Reads one tensor at a time. A failure, e.g. a full disk, leaves the folder as it is, and a warning says so.
    """
    try:
        tensors, configurations = read_folder(folder)
        texts = modelspec(configurations, args, args.output_dir, args.resolution)
        write_tensors(folder / NAME, tensors, configurations, args.save_precision, texts)
    except OSError as error:
        (folder / NAME).unlink(missing_ok=True)
        logger.warning(
            f"{NAME} cannot be written ({error.strerror}): the model's folder is complete; make the file from it "
            f"with: python -m t2i_training.model.single_file {args.output_dir}"
        )


def write_tensors(file: Path, tensors: dict[str, Lazy], configurations: dict, precision: str, texts: dict) -> None:
    """Write them with a header that says what the model is, and from which the scripts build it again."""
    texts = {"format": "pt", **texts, CONFIGURATIONS: json.dumps(configurations, sort_keys=True)}
    tensor_file.write(file, tensors, precision, lambda sha256: texts | {"modelspec.hash_sha256": f"0x{sha256}"})


def modelspec(configurations: dict, args, output_dir: str, resolution: int, suffix: str = "") -> dict[str, str]:
    """What model managers show of a file (github.com/Stability-AI/ModelSpec, 1.0.1). No date: equal runs, equal files.

    `suffix` is "/lora" for adapters of the architecture; `args` has --metadata_*.
    """
    is_v = configurations["scheduler/scheduler_config.json"].get("prediction_type") == "v_prediction"
    architecture = "stable-diffusion-v1"
    if configurations["text_encoder/config.json"].get("hidden_act") == "gelu":
        architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    found = {
        "sai_model_spec": "1.0.1", "architecture": architecture + suffix,
        "title": args.metadata_title or Path(output_dir).resolve().name,
        "implementation": "diffusers" if suffix else "https://github.com/Stability-AI/generative-models",
        "resolution": f"{resolution}x{resolution}", "prediction_type": "v" if is_v else "epsilon",
        "license": args.metadata_license, "trigger_phrase": args.metadata_trigger_phrase,
    }  # fmt: skip
    return {f"modelspec.{name}": sanitize.printable(value) for name, value in found.items() if value}


def read_folder(folder: Path) -> tuple[dict[str, Lazy], dict]:
    """(tensors under their original names, configurations) of a pipeline's folder."""
    configurations = read_configurations(folder)
    return original_layout({part: _tensors(folder / part) for part in PREFIXES}, configurations), configurations


def read_configurations(folder: Path) -> dict:
    """A pipeline's *.json by name, without local paths; of the tokenizer all files, if its vocabulary is not CLIP's."""
    found = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in families.SD1}
    for config in found.values():
        config.pop("_name_or_path", None)
    return found | _vocabulary(folder / "tokenizer")


def _vocabulary(tokenizer: Path) -> dict[str, str]:
    """The files that hold a tokenizer's vocabulary, unless it is CLIP's."""
    if (tokenizer / "tokenizer.json").is_file():
        content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary, files = content["model"]["vocab"], ["tokenizer.json"]
    else:
        vocabulary, files = (
            json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")),
            ["vocab.json", "merges.txt"],
        )
    if vocabulary == clip_vocabulary.vocabulary():
        return {}
    return {f"tokenizer/{name}": (tokenizer / name).read_text(encoding="utf-8") for name in files}


def convert(args) -> Path:
    """Write the single file of an exported folder, or of a checkpoint with the rest of its base. Returns its path."""
    folder, output_dir = Path(args.folder), Path(args.folder)
    if (folder / "model_index.json").is_file():
        if args.pretrained_model_name_or_path is not None:
            raise Unfit("is a whole pipeline: leave --base out")
        tensors, configurations = read_folder(folder)
    elif (folder / "unet" / "config.json").is_file():
        if args.pretrained_model_name_or_path is None:
            raise Unfit("is a checkpoint, which has no VAE and no text encoder: add --base, the model it began with")
        trained = folder / ("unet_ema" if (folder / "unet_ema").is_dir() else "unet")
        output_dir = folder.resolve().parent
        configurations, parts = _rest_of(args)
        configurations["unet/config.json"] = json.loads((trained / "config.json").read_text(encoding="utf-8"))
        tensors = original_layout({"unet": _tensors(trained), **parts}, configurations)
        logger.info(f"the UNet is that of {trained}")
    else:
        raise Unfit("holds neither a pipeline nor a checkpoint with a UNet; LoRA adapters are a file of their own")
    side = configurations["vae/config.json"].get("sample_size", 512)
    with atomic_write(folder / NAME) as partial:
        texts = modelspec(configurations, args, output_dir, side)
        write_tensors(partial, tensors, configurations, args.save_precision, texts)
    return folder / NAME


def _tensors(part: Path) -> dict[str, Lazy]:
    files = list(part.glob("*model.safetensors"))
    if len(files) != 1:
        raise Unfit(f"has no {part.name}/ with its weights in one .safetensors")
    return tensor_file.tensors(files[0])


def _rest_of(args) -> tuple[dict, dict[str, dict[str, Lazy]]]:
    """(configurations, tensors of VAE and text encoder) of the base."""
    pipeline = base.load_pipeline(args, unet=None)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_config(folder)
        pipeline.vae.save_config(Path(folder, "vae"))
        pipeline.text_encoder.config.save_pretrained(Path(folder, "text_encoder"))
        pipeline.scheduler.save_pretrained(Path(folder, "scheduler"))
        pipeline.tokenizer.save_pretrained(Path(folder, "tokenizer"))
        Path(folder, "unet").mkdir()
        Path(folder, "unet", "config.json").write_text("{}")
        configurations = read_configurations(Path(folder))
    if args.prediction_type is not None:
        configurations["scheduler/scheduler_config.json"]["prediction_type"] = args.prediction_type
    parts = {part: getattr(pipeline, part).state_dict() for part in ("vae", "text_encoder")}
    return configurations, {
        part: {name: tensor_file.of(tensor) for name, tensor in tensors.items()} for part, tensors in parts.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m t2i_training.model.single_file", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="Output folder of a finished run, or one of its checkpoints.")
    text = "For a checkpoint: the model that the run began with (folder, hub name or single file)."
    parser.add_argument("--base", dest="pretrained_model_name_or_path", metavar="MODEL", help=text)
    parser.add_argument("--revision", help="Its branch, tag or commit on the hub.")
    parser.add_argument("--variant", help="Variant of its weight files, e.g. fp16.")
    parser.add_argument("--cache_dir", help="Folder where downloaded models are kept.")
    parser.add_argument(
        "--pretrained_vae_model_name_or_path", metavar="VAE", help="For a checkpoint: the VAE that the run was given."
    )
    text = "For a checkpoint: what the run was told to predict."
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], help=text)
    flags.add_tool_file_args(parser)
    args = parser.parse_args(argv)
    with readable_errors("folder", args.folder):
        file = convert(args)
    print(f"{file} ({file.stat().st_size / 2**30:.2f} GiB, {args.save_precision})")


if __name__ == "__main__":
    main()
