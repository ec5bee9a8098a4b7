"""Stable Diffusion's networks in Flax, equivalent to those in diffusers and transformers.

    unet = load_unet("model/unet", dtype=jnp.bfloat16, gradient_checkpointing=True)
    prediction = unet(noisy_latents, timesteps, text_states)  # (B, h, w, C): channels last
    save(unet, "trained/unet")                                # for UNet2DConditionModel.from_pretrained

A network is a pytree whose leaves are its parameters; gradients and updated networks have the same type. A training
loop is faster with the parameters in a dict, which `split` returns.
"""

from pathlib import Path

import jax.numpy as jnp

from .clip import CLIPTextModel, skip_layers
from .unet import UNet2DConditionModel
from .vae import AutoencoderKL
from .weights import from_torch, load, save, shapes_on_disk, split

__all__ = [
    "AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel", "from_torch", "load_text_encoder", "load_unet",
    "load_vae", "save", "shapes_on_disk", "skip_layers", "split",
]  # fmt: skip


def load_unet(
    folder: str | Path, *, dtype=jnp.float32, gradient_checkpointing: bool = False, variant: str | None = None
) -> UNet2DConditionModel:
    """The denoiser in the local `folder`; for files and errors see `weights.load`."""
    return load(
        UNet2DConditionModel, folder, variant=variant, dtype=dtype, gradient_checkpointing=gradient_checkpointing
    )


def load_vae(folder: str | Path, *, dtype=jnp.float32, variant: str | None = None) -> AutoencoderKL:
    """The autoencoder in the local `folder`; for files and errors see `weights.load`."""
    return load(AutoencoderKL, folder, variant=variant, dtype=dtype)


def load_text_encoder(folder: str | Path, *, dtype=jnp.float32, variant: str | None = None) -> CLIPTextModel:
    """The text encoder in the local `folder`; for files and errors see `weights.load`."""
    return load(CLIPTextModel, folder, variant=variant, dtype=dtype)
