"""LoRA adapters (arXiv:2106.09685) by peft: adds, saves and restores them, and exports them for other tools."""

from pathlib import Path

import safetensors.torch
import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

from .. import sanitize
from ..errors import RunError
from .networks import inference_dtype

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Kandinsky's decoder attends to image and condition at once; the condition enters through projections of its own.
# Without adapters there, the network could not learn to read an embedding differently, only to look differently.
ADDED_KV_ATTENTION = (*ATTENTION, "add_k_proj", "add_v_proj")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "kohya_lora_weights.safetensors"


def add_adapters(model, args, seed: int, accelerator, targets: tuple[str, ...] = ATTENTION):
    """Freeze `model`, put it on the device in the inference type, and give its `targets` adapters to train, in fp32.

    The base is cast before adapters are added: otherwise adapters and optimizer state would be in half precision, which
    fp16's loss scaler refuses and bf16 trains badly. Initialised as in the paper: A Gaussian, from the run's seed, so
    that all processes agree; B = 0. alpha = rank, so the scale is 1.
    """
    model.requires_grad_(False).to(accelerator.device, inference_dtype(accelerator))
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    # In peft it is a set, whose order differs between processes.
    model.peft_config["default"].target_modules = sorted(targets)
    cast_training_params(model, torch.float32)
    return model


def save_networks(model, folder: Path) -> None:
    """The adapters, for `network.load_lora_adapter(folder, prefix=None, weight_name=...)`; with their configuration."""
    model.save_lora_adapter(folder)


def load_networks(model, folder: Path) -> None:
    """Read in place what `save_networks` or `save_stable_diffusion` wrote. Exits with one line if it does not fit.

    Older checkpoints of Stable Diffusion have the names of `save_networks`; they can be read as well.
    """
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS_NAME)
        weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
        weights = convert_unet_state_dict_to_peft(weights)  # does not change peft's own names
        expected = get_peft_model_state_dict(model, adapter_name="default")
        if {name: tensor.shape for name, tensor in weights.items()} != {n: t.shape for n, t in expected.items()}:
            raise ValueError("its adapters have other names, or another --rank")
        set_peft_model_state_dict(model, weights, adapter_name="default")
    except FileNotFoundError:
        raise RunError(f"{folder} was not saved by this script: it holds no adapters") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder} does not fit this model: {sanitize.reason(error)[:300]}") from error


def adapter_weights(model) -> dict[str, torch.Tensor]:
    """The adapters as diffusers names them, e.g. "mid_block....to_q.lora.down.weight"; fp32 on the CPU."""
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name="default"))
    return {name: tensor.detach().float().cpu() for name, tensor in weights.items()}


def save_stable_diffusion(pipeline_class, unet, folder: Path) -> None:
    """pytorch_lora_weights.safetensors for `pipe.load_lora_weights(folder)`, with the adapters' configuration in it."""
    metadata = unet.peft_config["default"].to_dict()
    pipeline_class.save_lora_weights(
        folder, unet_lora_layers=adapter_weights(unet), unet_lora_adapter_metadata=metadata
    )


def save_kohya(model, folder: Path, step: int | None = None) -> None:
    """One file of a UNet's adapters with the names that A1111, ComfyUI and kohya's scripts know; fp32, with alphas.

    With a `step` the file's name contains it, as kohya's do, so that those of several checkpoints fit in one folder.
    """
    weights = {
        f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(model, adapter_name="default").items()
    }
    converted = convert_state_dict_to_kohya({name: tensor.detach().float().cpu() for name, tensor in weights.items()})
    rank = str(model.peft_config["default"].r)
    metadata = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    name = KOHYA_NAME if step is None else KOHYA_NAME.replace(".", f"-step{step:08d}.")
    safetensors.torch.save_file(converted, folder / name, metadata=metadata)
