"""The networks' layers. Attributes are named as in diffusers, so that a parameter's path is its name on disk.

Images and latents are (B, H, W, C), sequences (B, T, D). Parameters are float32; `dtype` is that of the arithmetic,
except in normalisation and softmax, which use float32. Parameters are zeros until weights are loaded from a file.
"""

import contextlib
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

ZEROS = nnx.initializers.zeros_init()
NO_RNGS = SimpleNamespace(params=lambda: None)  # no random numbers are needed; tracing 700 real keys would take seconds

# In normalisation only the output is rounded to the dtype, not scale and bias. The variance takes two passes, as in
# PyTorch, since E[x^2] - E[x]^2 would lose digits.
IN_FLOAT32 = {"promote_dtype": lambda arrays, dtype: arrays, "use_fast_variance": False}


def conv(in_channels: int, out_channels: int, kernel: int = 3, *, dtype, stride: int = 1, padding=None) -> nnx.Conv:
    """A convolution over (B, H, W, C); `padding` as ((top, bottom), (left, right)), by default half the kernel."""
    padding = padding or ((kernel // 2, kernel // 2),) * 2
    return nnx.Conv(
        in_channels, out_channels, (kernel, kernel), (stride, stride), padding=padding, dtype=dtype, kernel_init=ZEROS,
        rngs=NO_RNGS,
    )  # fmt: skip


def conv_1x1(in_channels: int, out_channels: int, *, dtype) -> nnx.Conv:
    return conv(in_channels, out_channels, 1, dtype=dtype)


def linear(in_features: int, out_features: int, *, dtype, bias: bool = True) -> nnx.Linear:
    return nnx.Linear(in_features, out_features, use_bias=bias, dtype=dtype, kernel_init=ZEROS, rngs=NO_RNGS)


def group_norm(channels: int, groups: int, eps: float, *, dtype) -> nnx.GroupNorm:
    return nnx.GroupNorm(channels, groups, epsilon=eps, dtype=dtype, rngs=NO_RNGS, **IN_FLOAT32)


def embed(count: int, features: int, *, dtype) -> nnx.Embed:
    return nnx.Embed(count, features, dtype=dtype, embedding_init=ZEROS, rngs=NO_RNGS)


def layer_norm(features: int, eps: float = 1e-5, *, dtype) -> nnx.LayerNorm:
    return nnx.LayerNorm(features, epsilon=eps, dtype=dtype, rngs=NO_RNGS, **IN_FLOAT32)


_as_written = False  # JAX passes only arrays to a function that it traces: no argument could carry this


@contextlib.contextmanager
def as_written():
    """Context in which functions are traced without fused attention and rematerialisation (for counting FLOPs)."""
    global _as_written
    _as_written = True
    try:
        yield
    finally:
        _as_written = False


def recomputed(function):
    """`function` with rematerialisation: the backward pass keeps only its inputs, and computes the rest again."""
    return function if _as_written else jax.checkpoint(function)


def attention_implementation(head_dim: int, dtype) -> str:
    """Which one `attend` uses: "cudnn" (flash attention, no T x S matrix in memory) where it exists, else "xla".

    It exists on NVIDIA GPUs in half precision, for heads whose size is a multiple of 8: up to 128 on Ampere and Ada, up
    to 256 from Hopper on. The larger heads of SD 1.x are on its two smallest grids, where that matrix is small.
    """
    if _as_written or jax.default_backend() != "gpu" or dtype not in (jnp.float16, jnp.bfloat16) or head_dim % 8:
        return "xla"
    device = jax.local_devices()[0]
    generation = float(device.compute_capability) if "cuda" in device.client.platform_version else 0
    largest = 256 if generation >= 9 else 128 if generation >= 8 else 0
    return "cudnn" if head_dim <= largest else "xla"


def attend(query, key, value, heads: int, causal: bool = False):
    """softmax(Q K^T / sqrt(head size)) V, arXiv:1706.03762 equation 1. (B, T, D), (B, S, D), (B, S, D) to (B, T, D).

    Logits are summed and their softmax taken in float32 by either implementation, so that no model needs the
    upcasting its config may ask for (`upcast_attention`, SD 2.1).
    """
    dtype = query.dtype
    if dtype == jnp.float16 and jax.default_backend() == "cpu":  # which lacks this kernel
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))  # (B, T, heads, head size)
    implementation = attention_implementation(query.shape[-1], query.dtype)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation=implementation)
    return mixed.reshape(*mixed.shape[:2], -1).astype(dtype)


def sinusoidal_embedding(timesteps, dim: int, flip_sin_to_cos: bool, freq_shift: float):
    """Sines and cosines of a timestep at `dim` / 2 frequencies, arXiv:2006.11239 (code). (B,) to (B, dim) float32."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


class TimestepEmbedding(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, *, dtype):
        self.linear_1 = linear(in_dim, out_dim, dtype=dtype)
        self.linear_2 = linear(out_dim, out_dim, dtype=dtype)

    def __call__(self, waves):
        return self.linear_2(jax.nn.silu(self.linear_1(waves)))


class ResnetBlock2D(nnx.Module):
    """A ResNet block, arXiv:1512.03385; with `time_dim` the timestep embedding is added in between."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, time_dim: int | None = None, *, dtype
    ):
        self.norm1 = group_norm(in_channels, groups, eps, dtype=dtype)
        self.conv1 = conv(in_channels, out_channels, dtype=dtype)
        self.time_emb_proj = linear(time_dim, out_channels, dtype=dtype) if time_dim else None
        self.norm2 = group_norm(out_channels, groups, eps, dtype=dtype)
        self.conv2 = conv(out_channels, out_channels, dtype=dtype)
        self.conv_shortcut = conv(in_channels, out_channels, 1, dtype=dtype) if in_channels != out_channels else None

    def __call__(self, x, time=None):
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            x = x + self.time_emb_proj(jax.nn.silu(time))[:, None, None]  # (B, 1, 1, C)
        return residual + self.conv2(jax.nn.silu(self.norm2(x)))


class Downsample2D(nnx.Module):
    """Halves height and width, rounding up; `padding` is that of `conv`."""

    def __init__(self, channels: int, padding=None, *, dtype):
        self.conv = conv(channels, channels, stride=2, padding=padding, dtype=dtype)

    def __call__(self, x):
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles height and width, or resizes to `size` = (height, width), one less if downsampling rounded up."""

    def __init__(self, channels: int, *, dtype):
        self.conv = conv(channels, channels, dtype=dtype)

    def __call__(self, x, size: tuple[int, int] | None = None):
        batch, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])


class Attention(nnx.Module):
    """Attention from `dim` features to `context_dim` features; `bias` is for the three input projections."""

    def __init__(self, dim: int, context_dim: int, heads: int, bias: bool = False, *, dtype):
        self.heads = heads
        self.to_q = linear(dim, dim, bias=bias, dtype=dtype)
        self.to_k = linear(context_dim, dim, bias=bias, dtype=dtype)
        self.to_v = linear(context_dim, dim, bias=bias, dtype=dtype)
        self.to_out = nnx.List([linear(dim, dim, dtype=dtype)])

    def __call__(self, x, context):
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nnx.Module):
    """GEGLU: a linear unit gated by a GELU, arXiv:2002.05202."""

    def __init__(self, in_dim: int, out_dim: int, *, dtype):
        self.proj = linear(in_dim, 2 * out_dim, dtype=dtype)

    def __call__(self, x):
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, dtype):
        # In diffusers a dropout without parameters takes index 1 between the two.
        self.net = nnx.List([GEGLU(dim, 4 * dim, dtype=dtype), None, linear(4 * dim, dim, dtype=dtype)])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each with pre-norm and a residual connection."""

    def __init__(self, dim: int, text_dim: int, heads: int, *, dtype):
        self.norm1 = layer_norm(dim, dtype=dtype)
        self.attn1 = Attention(dim, dim, heads, dtype=dtype)
        self.norm2 = layer_norm(dim, dtype=dtype)
        self.attn2 = Attention(dim, text_dim, heads, dtype=dtype)
        self.norm3 = layer_norm(dim, dtype=dtype)
        self.ff = FeedForward(dim, dtype=dtype)

    def __call__(self, x, text_states):
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), text_states)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """A transformer over the positions of a (B, H, W, C) grid, with cross-attention to text states (B, T, text_dim)."""

    def __init__(self, channels: int, text_dim: int, heads: int, groups: int, linear_projection: bool, *, dtype):
        project = linear if linear_projection else conv_1x1
        self.norm = group_norm(channels, groups, 1e-6, dtype=dtype)
        self.proj_in = project(channels, channels, dtype=dtype)
        self.transformer_blocks = nnx.List([BasicTransformerBlock(channels, text_dim, heads, dtype=dtype)])
        self.proj_out = project(channels, channels, dtype=dtype)

    def __call__(self, x, text_states):
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])  # (B, H W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, text_states)
        return x + self.proj_out(tokens.reshape(x.shape))
