"""The Flax networks against their torch twins, on tiny networks with random weights, and their files."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("optax")

import flax.serialization
import jax.numpy as jnp

from t2i_training.sd_flax import networks

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
try:  # compiling is most of the time here, and these networks are too small to be worth optimising
    jax.jit(lambda: 0, compiler_options=QUICK)()
except Exception:  # a release that has other options
    QUICK = {}
jit = partial(jax.jit, compiler_options=QUICK)

BUNDLED = Path(__file__).parent.parent / "examples" / "quickstart" / "tiny-emoji-diffusion"
UNETS = {
    "sd1": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2,
        "cross_attention_dim": 12, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sd2": {
        "block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 2, "attention_head_dim": (1, 4),
        "cross_attention_dim": 20, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True, "upcast_attention": True,
        "norm_eps": 1e-4, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 5,
    },
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
BARE_VAE = VAE | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
TEXT = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 9, "hidden_act": "quick_gelu", "bos_token_id": 48, "eos_token_id": 49,
}  # fmt: skip
LOADERS = {
    "unet": networks.load_unet, "vae": networks.load_vae, "text_encoder": networks.load_text_encoder,
}  # fmt: skip


def make_twin(kind: str, **changes):
    """A tiny torch network, every parameter random, in evaluation mode."""
    torch.manual_seed(0)
    if kind == "unet":
        twin = UNet2DConditionModel(**UNETS["sd1"] | changes)
    elif kind == "vae":
        twin = AutoencoderKL(**VAE | changes)
    else:
        twin = CLIPTextModel(CLIPTextConfig(**TEXT | changes))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return twin.eval()


def channels_last(tensor: torch.Tensor):
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def assert_close(ours, theirs, atol=1e-4):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol)


def torch_names(twin) -> dict[str, torch.Tensor]:
    """The twin's parameters; transformers 5 leaves out the prefix that files have."""
    prefix = "text_model." if isinstance(twin, CLIPTextModel) and not hasattr(twin, "text_model") else ""
    return {prefix + name: tensor for name, tensor in twin.state_dict().items()}


def assert_same_weights(network, twin, dtype=torch.float32):
    ours, theirs = network.state_dict(), torch_names(twin)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name].to(dtype).float().numpy(), err_msg=name)


def assert_same_gradient(ours, twin, rtol=1e-3):
    """Of every parameter, relative to its largest number; of small ones to a thousandth of the largest of all.

    The bias of a key has none, for softmax does not see it: on either side there is rounding noise, or nothing.
    """
    ours = ours.state_dict()
    theirs = dict(zip(torch_names(twin), twin.parameters(), strict=True))
    assert ours.keys() == theirs.keys()
    largest = {name: parameter.grad.abs().max().item() for name, parameter in theirs.items()}
    for name, parameter in theirs.items():
        assert largest[name] > 0 or name.endswith(("to_k.bias", "k_proj.bias")), name
        error = np.abs(ours[name] - parameter.grad.numpy()).max()
        assert error <= rtol * (largest[name] + 1e-3 * max(largest.values())), name


@jit
def call(network, *inputs):
    return network(*inputs)


def unet_inputs(in_channels: int, text_dim: int, size=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    noisy_latents = torch.randn(2, in_channels, *size, generator=generator)
    return noisy_latents, torch.tensor([3, 977]), torch.randn(2, 7, text_dim, generator=generator)


def flax_inputs(noisy_latents, timesteps, text_states):
    return channels_last(noisy_latents), jnp.asarray(timesteps.numpy()), jnp.asarray(text_states.numpy())


@jit
def squared(network, *inputs):
    """The loss whose gradient is compared: the mean square of what the network returns, and that itself."""

    def loss(network):
        output = network(*inputs)
        return jnp.square(output).mean(), output

    (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(network)
    return output, gradient


@pytest.mark.parametrize(("config", "gradient_checkpointing"), [("sd1", False), ("sd2", True)])
def test_unet_and_its_gradient_are_the_torch_twins(config, gradient_checkpointing, tmp_path):
    twin = make_twin("unet", **UNETS[config])
    twin.save_pretrained(tmp_path)
    # 7 x 6 latents: halved to 4 x 3, doubled to 8 x 6, cut to 7 x 6.
    inputs = unet_inputs(twin.config.in_channels, twin.config.cross_attention_dim, size=(7, 6))
    expected = twin(*inputs).sample
    expected.square().mean().backward()
    unet = networks.load_unet(tmp_path, gradient_checkpointing=gradient_checkpointing)
    output, gradient = squared(unet, *flax_inputs(*inputs))
    assert_close(output, channels_last(expected))
    assert_same_gradient(gradient, twin)


def test_checkpointing_keeps_less_for_the_backward_pass(tmp_path):
    make_twin("unet").save_pretrained(tmp_path)
    inputs = flax_inputs(*unet_inputs(4, 12))

    def bytes_kept(gradient_checkpointing):
        unet = networks.load_unet(tmp_path, gradient_checkpointing=gradient_checkpointing)
        _, backward = jax.eval_shape(lambda unet: jax.vjp(lambda unet: unet(*inputs), unet), unet)
        return sum(np.prod(kept.shape) for kept in jax.tree.leaves(backward))

    assert bytes_kept(True) < 0.5 * bytes_kept(False)


@pytest.mark.parametrize(
    ("activation", "dtype", "atol"),
    [("quick_gelu", jnp.float32, 1e-4), ("gelu", jnp.float32, 1e-4), ("gelu", jnp.float16, 2e-2)],
    ids=["quick_gelu", "gelu", "fp16"],
)
def test_text_encoder_is_the_torch_twin(activation, dtype, atol, tmp_path):
    twin = make_twin("text_encoder", hidden_act=activation)
    twin.save_pretrained(tmp_path)
    input_ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    text_states, gradient = squared(networks.load_text_encoder(tmp_path, dtype=dtype), jnp.asarray(input_ids.numpy()))
    assert text_states.dtype == dtype
    expected = twin(input_ids)[0]
    assert_close(text_states, expected.detach(), atol=atol)
    expected.square().mean().backward()
    assert_same_gradient(gradient, twin, rtol=1e-3 if dtype == jnp.float32 else 0.2)


@pytest.mark.parametrize("config", [VAE, BARE_VAE], ids=["vae", "bare_vae"])
def test_autoencoder_is_the_torch_twin(config, tmp_path):
    twin = make_twin("vae", **config)
    twin.save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 15, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = twin.encode(pixels).latent_dist
    expected = [posterior.mean, posterior.std, twin.decode(posterior.mean).sample]
    sum(output.square().mean() for output in expected).backward()

    @partial(jax.value_and_grad, has_aux=True)
    def loss(vae):
        mean, std = vae.encode(channels_last(pixels))
        outputs = [mean, std, vae.decode(mean)]
        return sum(jnp.square(output).mean() for output in outputs), outputs

    (_, outputs), gradient = jit(loss)(networks.load_vae(tmp_path))
    for output, theirs in zip(outputs, expected, strict=True):
        assert_close(output, channels_last(theirs))
    assert_same_gradient(gradient, twin)


@pytest.mark.slow("8 s of compiling: the tests above compare such networks, those below such files")
def test_bundled_pipeline():
    """What ships with this repository, in fp16 files, computes the same in float32."""
    input_ids = torch.randint(0, 1025, (2, 16), generator=torch.Generator().manual_seed(1))
    noisy_latents, timesteps, _ = unet_inputs(4, 64, size=(8, 8))
    text_encoder = networks.load_text_encoder(BUNDLED / "text_encoder")
    with torch.no_grad():
        text_states = CLIPTextModel.from_pretrained(BUNDLED / "text_encoder", dtype=torch.float32)(input_ids)[0]
        assert_close(call(text_encoder, jnp.asarray(input_ids.numpy())), text_states)
        twin = UNet2DConditionModel.from_pretrained(BUNDLED / "unet", torch_dtype=torch.float32)
        unet = networks.load_unet(BUNDLED / "unet")
        output = call(unet, *flax_inputs(noisy_latents, timesteps, text_states))
        assert_close(output, channels_last(twin(noisy_latents, timesteps, text_states).sample))
        twin = AutoencoderKL.from_pretrained(BUNDLED / "vae", torch_dtype=torch.float32)
        vae = networks.load_vae(BUNDLED / "vae")
        decoded = jit(type(vae).decode)(vae, channels_last(noisy_latents))
        assert_close(decoded, channels_last(twin.decode(noisy_latents).sample))


def test_half_precision_computes_in_half_and_keeps_parameters_in_float32(tmp_path):
    twin = make_twin("unet")
    twin.save_pretrained(tmp_path)
    unet, inputs = networks.load_unet(tmp_path, dtype=jnp.bfloat16), unet_inputs(4, 12)
    assert {parameter.dtype for parameter in jax.tree.leaves(unet)} == {jnp.dtype("float32")}
    output = call(unet, *flax_inputs(*inputs))
    assert output.dtype == jnp.bfloat16
    expected = channels_last(twin(*inputs).sample)
    assert_close(output.astype(jnp.float32), expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_split_gives_a_dict_by_names_and_the_way_back(tmp_path):
    twin = make_twin("unet")
    twin.save_pretrained(tmp_path)
    parameters, merge = networks.split(networks.load_unet(tmp_path))
    assert parameters.keys() == twin.state_dict().keys()
    assert_same_weights(merge(parameters), twin)
    halved = merge({name: np.asarray(value) / 2 for name, value in parameters.items()}).state_dict()
    np.testing.assert_array_equal(halved["conv_in.weight"], twin.conv_in.weight.detach().numpy() / 2)


@pytest.mark.parametrize("kind", LOADERS)
def test_saved_network_loads_in_torch_bit_for_bit(kind, tmp_path):
    twin = make_twin(kind)
    twin.half().save_pretrained(tmp_path / "base")
    network = LOADERS[kind](tmp_path / "base")
    networks.save(network, tmp_path / "saved")
    loaded, report = type(twin).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_same_weights(network, loaded)
    assert_same_weights(LOADERS[kind](tmp_path / "saved"), twin)
    base, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "saved"))
    assert base | {"dtype": "float32"} == saved if "dtype" in base else base == saved


@pytest.mark.parametrize("kind", LOADERS)
def test_bin_files(kind, tmp_path):
    twin = make_twin(kind)
    twin.config.save_pretrained(tmp_path) if kind == "text_encoder" else twin.save_config(tmp_path)
    name = "pytorch_model.bin" if kind == "text_encoder" else "diffusion_pytorch_model.bin"
    tensors = torch_names(twin)
    if kind == "text_encoder":  # as files of transformers before 4.31 have it
        tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    for zipped in (True, False):
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert_same_weights(LOADERS[kind](tmp_path), twin)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    make_twin("unet").save_config(tmp_path)
    torch.save({"conv_in.weight": Path("/")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        networks.load_unet(tmp_path)


def old_flax_tree(twin) -> dict:
    """The parameters as diffusers' and transformers' Flax classes named and shaped them, as nested dicts."""
    tree = {}
    for name, tensor in torch_names(twin).items():
        array = tensor.detach().numpy()
        *modules, leaf = name.split(".")
        if leaf == "weight":
            leaf = {1: "scale", 2: "kernel", 4: "kernel"}[array.ndim]
            leaf = "embedding" if "embedding" in modules[-1] else leaf
            array = {"kernel": array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T}.get(leaf, array)
        path = ".".join(modules)
        if not isinstance(twin, CLIPTextModel):
            path = re.sub(r"([A-Za-z_]\w*)\.(\d+)", r"\1_\2", path)
        if isinstance(twin, AutoencoderKL):
            for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}.items():
                path = path.replace(new, old)
        branch = tree
        for module in path.split("."):
            branch = branch.setdefault(module, {})
        branch[leaf] = np.ascontiguousarray(array)
    return tree


@pytest.mark.parametrize("kind", LOADERS)
def test_old_flax_files(kind, tmp_path):
    twin = make_twin(kind)
    twin.config.save_pretrained(tmp_path) if kind == "text_encoder" else twin.save_config(tmp_path)
    if kind != "text_encoder":
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"_class_name": "Flax" + config["_class_name"], "use_memory_efficient_attention": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
    name = "flax_model.msgpack" if kind == "text_encoder" else "diffusion_flax_model.msgpack"
    (tmp_path / name).write_bytes(flax.serialization.msgpack_serialize(old_flax_tree(twin)))
    network = LOADERS[kind](tmp_path)
    assert_same_weights(network, twin)
    networks.save(network, tmp_path / "saved")
    assert_same_weights(network, type(twin).from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_and_variant_files(safe, variant, tmp_path):
    twin = make_twin("unet")
    options = {"variant": variant, "safe_serialization": safe}
    twin.save_pretrained(tmp_path / "shards", max_shard_size="40KB", **options)
    twin.save_pretrained(tmp_path / "whole", **options)
    assert len(list((tmp_path / "shards").glob("*-of-*"))) > 1
    for folder in (tmp_path / "shards", tmp_path / "whole"):
        assert_same_weights(networks.load_unet(folder, variant=variant), twin)
        with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
            networks.load_unet(folder, variant="ema")


def test_bfloat16_files(tmp_path):
    twin = make_twin("unet")
    twin.bfloat16().save_pretrained(tmp_path)
    assert_same_weights(networks.load_unet(tmp_path), twin, torch.bfloat16)


def test_old_names_of_the_autoencoders_attention(tmp_path):
    """The autoencoders of Stable Diffusion 1.x and 2.x are stored with these."""
    twin = make_twin("vae")
    twin.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    assert_same_weights(networks.load_vae(tmp_path), twin)


def test_files_that_do_not_fit_are_refused(tmp_path):
    make_twin("unet").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)

    def load_with(changed):
        save_file(changed, file)
        networks.load_unet(tmp_path)

    name = "down_blocks.0.resnets.0.conv1.weight"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_with({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=re.escape(f"{name} is (8, 8, 1, 3), but config.json makes it (8, 8, 3, 3)")):
        load_with(tensors | {name: torch.zeros(8, 8, 1, 3)})
    with pytest.raises(ValueError, match=r"tensor class_embedding\.weight has no place"):
        load_with(tensors | {"class_embedding.weight": torch.zeros(8)})
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model.safetensors.*but: config.json"):
        networks.load_unet(tmp_path)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "only_cross_attention", True),
        ("unet", "transformer_layers_per_block", 2),
        ("unet", "down_block_types", ["CrossAttnDownBlock2D", "AttnDownBlock2D"]),
        ("unet", "layers_per_block", [1, 1]),
        ("unet", "attention_head_dim", 3),
        ("unet", "_class_name", "UNet2DModel"),
        ("unet", "some_future_key", 1),
        ("vae", "shift_factor", 0.1),
        ("vae", "up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder", "model_type", "t5"),
    ],
)
def test_configs_asking_for_what_is_not_built_are_refused(kind, key, value, tmp_path):
    make_twin(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"{key}.*{value[1] if isinstance(value, list) else value}"):
        LOADERS[kind](tmp_path)


SD_UNET = {
    "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
SD15_UNET = SD_UNET | {"attention_head_dim": 8, "cross_attention_dim": 768}
SD21_UNET = SD_UNET | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}  # fmt: skip
SD_VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SD15_TEXT = {
    "attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768,
    "vocab_size": 49408,
}  # fmt: skip
SD21_TEXT = SD15_TEXT | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("network_class", "config", "parameters"),
    [
        (networks.UNet2DConditionModel, SD15_UNET, 859_520_964),
        (networks.UNet2DConditionModel, SD21_UNET, 865_910_724),
        (networks.AutoencoderKL, SD_VAE, 83_653_863),
        (networks.CLIPTextModel, SD15_TEXT, 123_060_480),
        (networks.CLIPTextModel, SD21_TEXT, 340_387_840),
    ],
    ids=["sd15_unet", "sd21_unet", "vae", "sd15_text", "sd21_text"],
)
def test_full_size_networks_have_the_twins_tensors(network_class, config, parameters):
    network = nnx.eval_shape(lambda: network_class(config))
    with torch.device("meta"):
        if network_class is networks.CLIPTextModel:
            twin = CLIPTextModel(CLIPTextConfig(**config))
        else:
            twin = {"UNet2DConditionModel": UNet2DConditionModel}.get(network_class.__name__, AutoencoderKL)(**config)
    shapes = networks.shapes_on_disk(network)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in torch_names(twin).items()}
    assert sum(np.prod(shape) for shape in shapes.values()) == parameters
