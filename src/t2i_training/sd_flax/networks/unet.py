"""The denoiser of Stable Diffusion 1.x and 2.x (arXiv:2112.10752)."""

import jax
import jax.numpy as jnp
from flax import nnx

from .config import Config, check_blocks, complete
from .layers import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    conv,
    group_norm,
    recomputed,
    sinusoidal_embedding,
)
from .weights import Network

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
DEFAULTS = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "cross_attention_dim": 1280, "attention_head_dim": 8,
    "norm_num_groups": 32, "norm_eps": 1e-5, "use_linear_projection": False, "flip_sin_to_cos": True, "freq_shift": 0,
}  # fmt: skip
ONLY = {
    "_class_name": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "act_fn": ("silu",), "addition_embed_type_num_heads": (64,), "attention_type": ("default",),
    "center_input_sample": (False,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "downsample_padding": (1,),
    "dropout": (0,), "dual_cross_attention": (False,), "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "num_attention_heads": (None,),
    "only_cross_attention": (None, False), "resnet_out_scale_factor": (1,), "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",), "transformer_layers_per_block": (1,),
    "upcast_attention": (None, False, True),  # always as if True
}  # fmt: skip


def check_config(config: dict) -> Config:
    """`config` with defaults. Raises ValueError for unsupported options."""
    config = complete(config, DEFAULTS, ONLY)
    check_blocks(config, "down_block_types", DOWN_BLOCKS)
    check_blocks(config, "up_block_types", UP_BLOCKS)
    for key in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
        if not isinstance(config[key], int):
            raise ValueError(f"config.json: {key}={config[key]!r} is not supported by the Flax networks, only a number")
    heads, widths = config["attention_head_dim"], config["block_out_channels"]
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    if len(heads) != len(widths) or any(width % count for width, count in zip(widths, heads)):
        raise ValueError(f"config.json: attention_head_dim={heads!r}, the numbers of heads, do not divide {widths!r}")
    return config


def plain(module, *args):
    return module(*args)


class UNet2DConditionModel(Network):
    """Predicts noise or velocity from noisy latents, timesteps and text states.

    `config` is that of diffusers' class of the same name. With `gradient_checkpointing` the backward pass
    recomputes every ResNet and transformer: a third more arithmetic, far less memory.
    """

    weights_stem = "diffusion_pytorch_model"

    def __init__(self, config: dict, *, dtype=jnp.float32, gradient_checkpointing: bool = False):
        self.config = config = check_config(config)
        self.dtype, self.gradient_checkpointing = dtype, gradient_checkpointing
        widths = config["block_out_channels"]
        heads = config["attention_head_dim"]  # in diffusers' UNet this is the number of heads, despite the name
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        shared = {"groups": groups, "eps": eps, "time_dim": 4 * widths[0], "dtype": dtype}
        self.conv_in = conv(config["in_channels"], widths[0], dtype=dtype)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], dtype=dtype)
        self.down_blocks = nnx.List(
            DownBlock(config, i, heads[i] if "CrossAttn" in block_type else None, **shared)
            for i, block_type in enumerate(config["down_block_types"])
        )
        self.mid_block = MidBlock(config, heads[-1], **shared)
        self.up_blocks = nnx.List(
            UpBlock(config, i, heads[-1 - i] if "CrossAttn" in block_type else None, **shared)
            for i, block_type in enumerate(config["up_block_types"])
        )
        self.conv_norm_out = group_norm(widths[0], groups, eps, dtype=dtype)
        self.conv_out = conv(widths[0], config["out_channels"], dtype=dtype)

    def __call__(self, noisy_latents, timesteps, text_states):
        """(B, h, w, C), (B,) whole numbers and (B, T, D) to (B, h, w, C) in the network's dtype; any h and w."""
        config, run = self.config, recomputed(plain) if self.gradient_checkpointing else plain
        waves = sinusoidal_embedding(
            timesteps, config["block_out_channels"][0], config["flip_sin_to_cos"], config["freq_shift"]
        )
        time = self.time_embedding(waves)  # (B, 4 C_0)
        text_states = text_states.astype(self.dtype)
        x = self.conv_in(noisy_latents)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, text_states, skips, run)
        x = self.mid_block(x, time, text_states, run)
        for block in self.up_blocks:
            x = block(x, time, text_states, skips, run)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def transformers(config: dict, count: int, channels: int, heads: int | None, groups: int, *, dtype) -> nnx.List | None:
    if heads is None:
        return None
    text_dim, linear_projection = config["cross_attention_dim"], config["use_linear_projection"]
    return nnx.List(
        Transformer2DModel(channels, text_dim, heads, groups, linear_projection, dtype=dtype) for _ in range(count)
    )


class DownBlock(nnx.Module):
    """Down block `i`; appends its outputs to `skips`."""

    def __init__(self, config: dict, i: int, heads: int | None, *, groups, eps, time_dim, dtype):
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        in_channels, channels = widths[max(i - 1, 0)], widths[i]
        self.resnets = nnx.List(
            ResnetBlock2D(in_channels if j == 0 else channels, channels, groups, eps, time_dim, dtype=dtype)
            for j in range(layers)
        )
        self.attentions = transformers(config, layers, channels, heads, groups, dtype=dtype)
        self.downsamplers = nnx.List([Downsample2D(channels, dtype=dtype)]) if i < len(widths) - 1 else None

    def __call__(self, x, time, text_states, skips: list, run):
        for j, resnet in enumerate(self.resnets):
            x = run(resnet, x, time)
            if self.attentions:
                x = run(self.attentions[j], x, text_states)
            skips.append(x)
        if self.downsamplers:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class MidBlock(nnx.Module):
    def __init__(self, config: dict, heads: int, *, groups, eps, time_dim, dtype):
        channels = config["block_out_channels"][-1]
        self.resnets = nnx.List(ResnetBlock2D(channels, channels, groups, eps, time_dim, dtype=dtype) for _ in range(2))
        self.attentions = transformers(config, 1, channels, heads, groups, dtype=dtype)

    def __call__(self, x, time, text_states, run):
        x = run(self.resnets[0], x, time)
        x = run(self.attentions[0], x, text_states)
        return run(self.resnets[1], x, time)


class UpBlock(nnx.Module):
    """Up block `i`; pops the outputs of the down blocks from `skips`."""

    def __init__(self, config: dict, i: int, heads: int | None, *, groups, eps, time_dim, dtype):
        widths, layers = config["block_out_channels"][::-1], config["layers_per_block"] + 1
        before, channels, below = widths[max(i - 1, 0)], widths[i], widths[min(i + 1, len(widths) - 1)]
        incoming = [before] + [channels] * (layers - 1)
        skipped = [channels] * (layers - 1) + [below]  # the last one is the input of this level's down block
        self.resnets = nnx.List(
            ResnetBlock2D(a + b, channels, groups, eps, time_dim, dtype=dtype) for a, b in zip(incoming, skipped)
        )
        self.attentions = transformers(config, layers, channels, heads, groups, dtype=dtype)
        self.upsamplers = nnx.List([Upsample2D(channels, dtype=dtype)]) if i < len(widths) - 1 else None

    def __call__(self, x, time, text_states, skips: list, run):
        for j, resnet in enumerate(self.resnets):
            x = run(resnet, jnp.concatenate([x, skips.pop()], axis=-1), time)
            if self.attentions:
                x = run(self.attentions[j], x, text_states)
        return self.upsamplers[0](x, skips[-1].shape[1:3]) if self.upsamplers else x
