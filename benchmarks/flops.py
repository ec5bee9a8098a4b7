"""Arithmetic of a training step, counted by torch on tensors without data: nothing is computed, any size takes seconds.

A multiplication with its addition counts as two. Counted are matrix products, convolutions and attention.
"""

import time
from functools import cache

import models
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADDED_TARGETS = ["add_k_proj", "add_v_proj"]  # of the decoder


@cache
def per_image(script: str, size: str) -> tuple[float, float]:
    """(frozen networks' forward pass, trained network's forward and backward pass) of one image, in TFLOP."""
    base, lora = script.removesuffix("_lora"), script.endswith("_lora")
    scale = models.SCALES[size]
    with torch.device("meta"):
        networks = models.BUILDERS[base](scale)
        trained = networks.pop("prior" if base == "prior" else "unet")
        if lora:
            trained.requires_grad_(False)
            trained.add_adapter(
                LoraConfig(r=4, target_modules=LORA_TARGETS + (ADDED_TARGETS if base == "decoder" else []))
            )
        with torch.no_grad():
            frozen = [_count(_encode, network, name, scale) for name, network in networks.items()]
        return sum(frozen), _count(_train, trained, base, scale)


def _count(function, *args) -> float:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / 1e12


def _encode(network, name: str, scale: models.Scale) -> None:
    if name == "text_encoder":
        network(torch.zeros(1, models.TOKENS, dtype=torch.long))
    elif name == "image_encoder":
        side = network.config.image_size
        network(torch.zeros(1, 3, side, side))
    else:
        network.encode(torch.zeros(1, 3, scale.resolution, scale.resolution))


def _train(network, base: str, scale: models.Scale) -> None:
    side, width = scale.resolution // 8, 1280 // scale.width
    latents, step, embedding = torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, width)
    if base == "sd":
        output = network(latents, step, torch.zeros(1, models.TOKENS, 768 // scale.width)).sample
    elif base == "decoder":
        output = network(latents, step, None, added_cond_kwargs={"image_embeds": embedding}).sample
    else:
        states = torch.zeros(1, models.TOKENS, width)
        output = network(embedding, step, embedding, states).predicted_image_embedding
    output.sum().backward()


def matrix_rate(device: str, dtype: torch.dtype, size: str) -> float:
    """What a large matrix product reaches on this device, in TFLOP/s: the practical ceiling of a training step."""
    side = {"tiny": 256, "medium": 2048, "full": 8192 if device == "cuda" else 2048}[size]
    a = torch.randn(side, side, device=device, dtype=dtype)  # a GPU is faster at numbers that are all alike
    return 2 * side**3 / 1e12 / min(_seconds(lambda: a @ a, device) for _ in range(10))


def _seconds(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
