"""The text encoder of Stable Diffusion: CLIP's (SD 1.x, arXiv:2103.00020) or OpenCLIP's (SD 2.x, arXiv:2212.07143)."""

import jax
import jax.numpy as jnp
from flax import nnx

from ...model.networks import check_clip_skip
from .config import complete
from .layers import attend, embed, layer_norm, linear
from .weights import Network

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # arXiv:1606.08415 section 2
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
DEFAULTS = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
ONLY = {"model_type": ("clip_text_model",), "hidden_act": tuple(ACTIVATIONS)}


class CLIPTextModel(Network):
    """Token numbers (B, T) to one state per token (B, T, D), from the last layer and normalised.

    `config` is that of transformers' class of the same name. SD 2.x takes the last but one of OpenCLIP's 24 layers;
    its config has 23. Unknown keys are ignored, as in transformers.
    """

    weights_stem = "model"

    def __init__(self, config: dict, *, dtype=jnp.float32):
        self.config, self.dtype = complete(config, DEFAULTS, ONLY, strict=False), dtype
        self.text_model = TextTransformer(self.config, dtype=dtype)

    def __call__(self, input_ids):
        return self.text_model(input_ids)


def skip_layers(text_encoder: CLIPTextModel, clip_skip: int) -> CLIPTextModel:
    """As `model/networks.skip_layers`: the text encoder up to layer `clip_skip`, counted from the last."""
    config, kept = text_encoder.config, text_encoder.config["num_hidden_layers"] + 1 - clip_skip
    check_clip_skip(clip_skip, config["num_hidden_layers"])
    if clip_skip == 1:
        return text_encoder
    blank = nnx.eval_shape(lambda: CLIPTextModel(config | {"num_hidden_layers": kept}, dtype=text_encoder.dtype))
    graph, state = nnx.split(blank)
    weights = dict(nnx.to_flat_state(nnx.state(text_encoder)))
    return nnx.merge(graph, nnx.from_flat_state({path: weights[path] for path, _ in nnx.to_flat_state(state)}))


class TextTransformer(nnx.Module):
    def __init__(self, config: dict, *, dtype):
        self.embeddings = Embeddings(config, dtype=dtype)
        self.encoder = Encoder(config, dtype=dtype)
        self.final_layer_norm = layer_norm(config["hidden_size"], config["layer_norm_eps"], dtype=dtype)

    def __call__(self, input_ids):
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class Embeddings(nnx.Module):
    def __init__(self, config: dict, *, dtype):
        self.token_embedding = embed(config["vocab_size"], config["hidden_size"], dtype=dtype)
        self.position_embedding = embed(config["max_position_embeddings"], config["hidden_size"], dtype=dtype)

    def __call__(self, input_ids):
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class Encoder(nnx.Module):
    def __init__(self, config: dict, *, dtype):
        self.layers = nnx.List([EncoderLayer(config, dtype=dtype) for _ in range(config["num_hidden_layers"])])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class EncoderLayer(nnx.Module):
    def __init__(self, config: dict, *, dtype):
        dim, eps = config["hidden_size"], config["layer_norm_eps"]
        self.layer_norm1 = layer_norm(dim, eps, dtype=dtype)
        self.self_attn = SelfAttention(dim, config["num_attention_heads"], dtype=dtype)
        self.layer_norm2 = layer_norm(dim, eps, dtype=dtype)
        self.mlp = MLP(dim, config["intermediate_size"], config["hidden_act"], dtype=dtype)

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nnx.Module):
    """Causal self-attention: a token attends to itself and to earlier ones."""

    def __init__(self, dim: int, heads: int, *, dtype):
        self.heads = heads
        self.q_proj = linear(dim, dim, dtype=dtype)
        self.k_proj = linear(dim, dim, dtype=dtype)
        self.v_proj = linear(dim, dim, dtype=dtype)
        self.out_proj = linear(dim, dim, dtype=dtype)

    def __call__(self, x):
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nnx.Module):
    def __init__(self, dim: int, hidden_dim: int, activation: str, *, dtype):
        self.activation = activation
        self.fc1 = linear(dim, hidden_dim, dtype=dtype)
        self.fc2 = linear(hidden_dim, dim, dtype=dtype)

    def __call__(self, x):
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))
