"""The autoencoder of Stable Diffusion: images to a Gaussian over latents, and back (arXiv:2112.10752, appendix G)."""

import jax
import jax.numpy as jnp
from flax import nnx

from .config import check_blocks, complete
from .layers import Attention, Downsample2D, ResnetBlock2D, Upsample2D, conv, conv_1x1, group_norm
from .weights import Network

EPS = 1e-6  # epsilon of every normalisation; not in the config
DEFAULTS = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [64], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "norm_num_groups": 32,
    "scaling_factor": 0.18215, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
ONLY = {
    "_class_name": ("AutoencoderKL", "FlaxAutoencoderKL"),
    "act_fn": ("silu",), "shift_factor": (None, 0), "latents_mean": (None,), "latents_std": (None,),
    "force_upcast": (True, False),  # a hint about fp16; here the caller chooses the dtype
}  # fmt: skip


class AutoencoderKL(Network):
    """Images to latents, f times smaller, and back. `config` is that of diffusers' class of the same name.

    f is 2 ** (number of blocks - 1), 8 for Stable Diffusion.
    """

    weights_stem = "diffusion_pytorch_model"

    def __init__(self, config: dict, *, dtype=jnp.float32):
        self.config = config = complete(config, DEFAULTS, ONLY)
        self.dtype = dtype
        check_blocks(config, "down_block_types", ("DownEncoderBlock2D",))
        check_blocks(config, "up_block_types", ("UpDecoderBlock2D",))
        latent_channels = config["latent_channels"]
        self.encoder = Encoder(config, dtype=dtype)
        self.decoder = Decoder(config, dtype=dtype)
        both, one = (2 * latent_channels,) * 2, (latent_channels,) * 2
        self.quant_conv = conv_1x1(*both, dtype=dtype) if config["use_quant_conv"] else None
        self.post_quant_conv = conv_1x1(*one, dtype=dtype) if config["use_post_quant_conv"] else None

    def encode(self, pixels):
        """Pixels (B, H, W, 3) in -1..1 to the posterior's (mean, std), each (B, H/f, W/f, C) float32, not scaled."""
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30, 20))  # the clamp that the models were trained with

    def decode(self, latents):
        """Latents (B, h, w, C), not scaled, to pixels (B, f h, f w, 3), about -1..1."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


class Encoder(nnx.Module):
    def __init__(self, config: dict, *, dtype):
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        self.conv_in = conv(config["in_channels"], widths[0], dtype=dtype)
        self.down_blocks = nnx.List(
            DownEncoderBlock2D(
                widths[max(i - 1, 0)], width, config["layers_per_block"], groups, i < len(widths) - 1, dtype=dtype
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock2D(widths[-1], groups, config["mid_block_add_attention"], dtype=dtype)
        self.conv_norm_out = group_norm(widths[-1], groups, EPS, dtype=dtype)
        self.conv_out = conv(widths[-1], 2 * config["latent_channels"], dtype=dtype)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: dict, *, dtype):
        widths, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        self.conv_in = conv(config["latent_channels"], widths[0], dtype=dtype)
        self.mid_block = MidBlock2D(widths[0], groups, config["mid_block_add_attention"], dtype=dtype)
        self.up_blocks = nnx.List(
            UpDecoderBlock2D(
                widths[max(i - 1, 0)], width, config["layers_per_block"] + 1, groups, i < len(widths) - 1, dtype=dtype
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = group_norm(widths[-1], groups, EPS, dtype=dtype)
        self.conv_out = conv(widths[-1], config["out_channels"], dtype=dtype)

    def __call__(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def resnets(in_channels: int, out_channels: int, layers: int, groups: int, *, dtype) -> nnx.List:
    return nnx.List(
        ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, groups, EPS, dtype=dtype)
        for i in range(layers)
    )


class DownEncoderBlock2D(nnx.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool, *, dtype):
        self.resnets = resnets(in_channels, out_channels, layers, groups, dtype=dtype)
        padding = ((0, 1), (0, 1))  # pads only at the bottom and on the right
        self.downsamplers = nnx.List([Downsample2D(out_channels, padding, dtype=dtype)]) if downsample else None

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if self.downsamplers else x


class UpDecoderBlock2D(nnx.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool, *, dtype):
        self.resnets = resnets(in_channels, out_channels, layers, groups, dtype=dtype)
        self.upsamplers = nnx.List([Upsample2D(out_channels, dtype=dtype)]) if upsample else None

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if self.upsamplers else x


class GridAttention(Attention):
    """Self-attention over the positions of a (B, H, W, C) grid, with one head."""

    def __init__(self, channels: int, groups: int, *, dtype):
        super().__init__(channels, channels, heads=1, bias=True, dtype=dtype)
        self.group_norm = group_norm(channels, groups, EPS, dtype=dtype)

    def __call__(self, x):
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])  # (B, H W, C)
        return x + super().__call__(tokens, tokens).reshape(x.shape)


class MidBlock2D(nnx.Module):
    def __init__(self, channels: int, groups: int, attention: bool, *, dtype):
        self.resnets = resnets(channels, channels, 2, groups, dtype=dtype)
        self.attentions = nnx.List([GridAttention(channels, groups, dtype=dtype)]) if attention else None

    def __call__(self, x):
        x = self.resnets[0](x)
        if self.attentions:
            x = self.attentions[0](x)
        return self.resnets[1](x)
