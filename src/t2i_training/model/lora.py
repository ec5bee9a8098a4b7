"""LoRA adapters (arXiv:2106.09685) by peft: adds, saves and restores them, and exports them for other tools."""

from pathlib import Path

import safetensors.torch
import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

from .. import sanitize
from ..errors import RunError, Unfit
from ..library_errors import readable_errors
from ..log import logger
from . import lora_files, tensor_file
from .lora_files import Adapter
from .networks import inference_dtype

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Kandinsky's decoder attends to image and condition at once; the condition enters through projections of its own.
# Without adapters there, the network could not learn to read an embedding differently, only to look differently.
ADDED_KV_ATTENTION = (*ATTENTION, "add_k_proj", "add_v_proj")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "kohya_lora_weights.safetensors"


def load_network_weights(args, pipeline) -> dict[str, dict[str, Adapter]]:
    """The adapters of --network_weights by part, "unet" and "text_encoder"; none without the flag.

    Those of the text encoder are not trained: they are merged into the pipeline's, in fp32, and exported as they came.
    """
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    if args.network_weights is None:
        return {part: {} for part in networks}
    with readable_errors("--network_weights", args.network_weights):
        adapters = lora_files.read(Path(args.network_weights), networks)
        if not adapters["unet"]:
            raise Unfit("has no adapters for the UNet, which are trained here")
    for name, (down, up) in adapters["text_encoder"].items():
        pipeline.text_encoder.get_submodule(name).weight.data += up @ down
    if adapters["text_encoder"]:
        logger.info(f"--network_weights: the text encoder's {len(adapters['text_encoder'])} adapters stay as they are")
    return adapters


def add_adapters(model, args, seed: int, accelerator, targets: tuple[str, ...] = ATTENTION, start=None):
    """Freeze `model`, put it on the device in the inference type, and give its `targets` adapters to train, in fp32.

    The base is cast before adapters are added: otherwise adapters and optimizer state would be in half precision, which
    fp16's loss scaler refuses and bf16 trains badly. Initialised as in the paper: A Gaussian, from the run's seed, so
    that all processes agree; B = 0. alpha = rank, so the scale is 1. With `start` (Adapter by module) the targets,
    their ranks and the first weights are those.
    """
    model.requires_grad_(False).to(accelerator.device, inference_dtype(accelerator))
    ranks = {name: len(adapter.down) for name, adapter in (start or {}).items()} or dict.fromkeys(targets, args.rank)
    config = _config(ranks, args.rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    # In peft it is a set, whose order differs between processes.
    model.peft_config["default"].target_modules = sorted(ranks)
    cast_training_params(model, torch.float32)
    if start:
        sides = (("lora_A", "down"), ("lora_B", "up"))
        weights = {f"{name}.{a}.weight": getattr(adapter, b) for name, adapter in start.items() for a, b in sides}
        set_peft_model_state_dict(model, weights, adapter_name="default")
    return model


def _config(ranks: dict[str, int], rank: int) -> LoraConfig:
    """peft's configuration of adapters in the modules of these names, most of them of `rank`; alpha = rank in each."""
    others = {name: each for name, each in ranks.items() if each != rank}
    return LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(ranks),
        rank_pattern=others, alpha_pattern=dict(others),
    )  # fmt: skip


def save_networks(model, folder: Path) -> None:
    """The adapters, for `network.load_lora_adapter(folder, prefix=None, weight_name=...)`; with their configuration."""
    model.save_lora_adapter(folder)


def load_networks(model, folder: Path) -> None:
    """Read in place what `save_networks` or `save_stable_diffusion` wrote. Exits with one line if it does not fit.

    Older checkpoints of Stable Diffusion have the names of `save_networks`; they can be read as well.
    """
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS_NAME)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("text_encoder.")}
        weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
        weights = convert_unet_state_dict_to_peft(weights)  # does not change peft's own names
        expected = get_peft_model_state_dict(model, adapter_name="default")
        if {name: tensor.shape for name, tensor in weights.items()} != {n: t.shape for n, t in expected.items()}:
            raise ValueError("its adapters have other names, or another --rank or --network_weights")
        set_peft_model_state_dict(model, weights, adapter_name="default")
    except FileNotFoundError:
        raise RunError(f"{folder} was not saved by this script: it holds no adapters") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder} does not fit this model: {sanitize.reason(error)[:300]}") from error


def adapter_weights(model) -> dict[str, torch.Tensor]:
    """The adapters as diffusers names them, e.g. "mid_block....to_q.lora.down.weight"; fp32 on the CPU.

    diffusers' own conversion renames those of attention alone. Reading such a mixture it passes over one of the kinds.
    """
    weights = get_peft_model_state_dict(model, adapter_name="default")
    names = {name: name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.") for name in weights}
    return {names[name]: tensor.detach().float().cpu() for name, tensor in weights.items()}


def save_stable_diffusion(pipeline_class, unet, text_adapters: dict[str, Adapter], folder: Path) -> None:
    """pytorch_lora_weights.safetensors for `pipe.load_lora_weights(folder)`, with the adapters' configuration in it."""
    options = {
        "unet_lora_layers": adapter_weights(unet),
        "unet_lora_adapter_metadata": unet.peft_config["default"].to_dict(),
    }
    if text_adapters:
        options["text_encoder_lora_layers"], options["text_encoder_lora_adapter_metadata"] = _text_layers(text_adapters)
    pipeline_class.save_lora_weights(folder, **options)


def _text_layers(adapters: dict[str, Adapter]) -> tuple[dict, dict]:
    """(tensors by the names that all versions of diffusers read, configuration) of a text encoder's adapters."""
    layers, ranks = {}, {}
    for name, (down, up) in adapters.items():
        name = name.removeprefix("text_model.")  # which transformers 5.6 took off
        stem = f"text_model.{name}.lora_linear_layer"
        layers |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        ranks[name] = len(down)  # by the end of a name peft finds the module in either version
    config = _config(ranks, max(ranks.values())).to_dict()
    return layers, config | {"target_modules": sorted(ranks)}


def save_kohya(pipeline, unet, text_adapters: dict[str, Adapter], args, folder: Path, step: int | None = None) -> None:
    """One file of the adapters for A1111, ComfyUI and kohya's scripts, in --save_precision.

    With a `step` the file's name contains it, as kohya's do, so that those of several checkpoints fit in one folder.
    """
    weights = get_peft_model_state_dict(unet, adapter_name="default")
    downs = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    adapters = {name: Adapter(weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) for name in downs}
    is_v2 = pipeline.text_encoder.config.hidden_act == "gelu"
    is_v = pipeline.scheduler.config.prediction_type == "v_prediction"
    texts = tensor_file.modelspec(args, args.resolution, is_v2, is_v, "/lora")
    if args.use_aspect_ratio_buckets:
        texts["ss_enable_bucket"] = "True"
    if args.clip_skip > 1:
        texts["ss_clip_skip"] = str(args.clip_skip)
    if args.max_token_length > 75:
        texts["ss_max_token_length"] = str(args.max_token_length)
    name = KOHYA_NAME if step is None else KOHYA_NAME.replace(".", f"-step{step:08d}.")
    parts = {"unet": adapters, "text_encoder": text_adapters}
    lora_files.write_kohya(folder / name, parts, args.save_precision, texts)
