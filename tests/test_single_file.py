"""A Stable Diffusion in one .safetensors or .ckpt, as model sites have them: trained from, and written."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import SCRIPTS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2i_training.model import original_names, single_file, tensor_file
from t2i_training.sources import clip_vocabulary, families, original_files

NAME = "single_file.safetensors"
# SHA-256 of the sorted lines "name [sizes]" of the files that were published: v1-5-pruned-emaonly.safetensors, and
# v2-1_512-ema-pruned.safetensors (lists: github.com/arenasys/stable-diffusion-webui-model-toolkit, components).
PUBLISHED = {
    "1": (1131, "0d8bcad4e06d08f9777772d36de2ecfc95aac5f2037a6e6051cfc3426dbddb2b"),
    "2": (1228, "5921dd4fce6a77759ca9a47493a094dec6cef205c52cb3ff9c8e9dc5b50ee99e"),
}


@pytest.fixture(scope="module")
def run(finished):
    """run(script, **changes): the output folder of a short run. Equal changes share one: leave it as it is."""
    return finished


@pytest.fixture(scope="module")
def one_file(run):
    """The tiny Stable Diffusion that the other tests train, as one file of fp32."""
    folder = run("sd", save_single_file=True, save_precision="fp32", learning_rate=0)
    return folder / NAME


def networks(pipeline) -> dict:
    return {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": t for part, net in networks(pipeline).items() for name, t in net.state_dict().items()}


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def open_file(file, folder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)


def texts(file) -> dict:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("family", ["1", "2"])
def test_names_and_shapes_are_those_of_the_published_files(family):
    configurations = {"1": families.SD1, "2": families.SD2}[family]
    with torch.device("meta"):
        nets = {
            "unet": UNet2DConditionModel.from_config(configurations["unet/config.json"]),
            "vae": AutoencoderKL.from_config(configurations["vae/config.json"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configurations["text_encoder/config.json"])),
        }
    parts = {
        part: {name: tensor_file.Lazy(tuple(t.shape), t.dtype, None) for name, t in network.state_dict().items()}
        for part, network in nets.items()
    }
    found = original_names.original_layout(parts, configurations)
    lines = sorted(f"{name} [{','.join(map(str, tensor.shape))}]" for name, tensor in found.items())
    count, digest = PUBLISHED[family]
    assert "first_stage_model.encoder.mid.attn_1.q.weight [512,512,1,1]" in lines
    assert len(lines) == count
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_vocabulary_is_clips(tmp_path):
    vocabulary = clip_vocabulary.vocabulary()
    assert [*vocabulary.values()] == [*range(49408)]
    ends = {
        0: "!", 255: "Ń", 256: "!</w>", 512: "in", 49405: "jekyll</w>", 49406: "<|startoftext|>",
        49407: "<|endoftext|>",
    }  # fmt: skip
    assert {i: [*vocabulary][i] for i in ends} == ends
    families.write(families.SD1, tmp_path / "1")
    families.write(families.SD2, tmp_path / "2")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "1" / "tokenizer")
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    # These ids are those of OpenAI's own tokenizer, clip.simple_tokenizer.
    assert tokenizer("Zürich! 日本の猫 😀").input_ids[1:-1] == [
        89,
        6522,
        4021,
        256,
        39121,
        44353,
        21575,
        163,
        234,
        360,
        7334,
    ]
    assert tokenizer("cats", padding="max_length").input_ids == [49406, 3989, *[49407] * 75]
    two = CLIPTokenizer.from_pretrained(tmp_path / "2" / "tokenizer")
    assert two("a cat", padding="max_length").input_ids == [49406, 320, 2368, 49407, *[0] * 73]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_file_holds_the_exported_model(run, precision, dtype):
    """Read back by diffusers: at fp32 to the bit what the folder holds, else that rounded once."""
    folder = run("sd", save_single_file=True, save_precision=precision, use_ema=True)
    exported = weights(StableDiffusionPipeline.from_pretrained(folder))
    read = weights(open_file(folder / NAME, folder))
    assert_equal(read, {name: tensor.to(dtype).to(read[name].dtype) for name, tensor in exported.items()})
    stored = {tensor.dtype for tensor in load_file(folder / NAME).values()}
    assert stored == {dtype, torch.int64}, "but for the positions of tokens"


def test_header_says_what_managers_show(run):
    options = {"metadata_title": "Emoji 🐈", "metadata_trigger_phrase": "emoji of", "metadata_license": "mit"}
    file = run("sd", save_single_file=True, prediction_type="v_prediction", **options) / NAME
    found = texts(file)
    data = file.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert {name.removeprefix("modelspec."): text for name, text in found.items() if name.startswith("modelspec.")} == {
        "sai_model_spec": "1.0.1", "architecture": "stable-diffusion-v1", "title": "Emoji 🐈",
        "implementation": "https://github.com/Stability-AI/generative-models", "resolution": "32x32",
        "prediction_type": "v", "license": "mit", "trigger_phrase": "emoji of", "hash_sha256": f"0x{digest}",
    }  # fmt: skip
    assert json.loads(found["t2i_training.configurations"])["scheduler/scheduler_config.json"]["prediction_type"] == (
        "v_prediction"
    )


def test_two_runs_write_equal_bytes_and_no_path(run, one_file, pictures):
    again = run("sd", save_single_file=True, save_precision="fp32", learning_rate=0, num_train_epochs=9)
    assert (again / NAME).read_bytes() == one_file.read_bytes()
    assert str(pictures.parent).encode() not in one_file.read_bytes()


def test_number_too_large_for_fp16_is_kept(tmp_path, caplog):
    tensors = {"small": torch.tensor([1.0]), "large": torch.tensor([-70000.0]), "none": torch.ones(0)}
    lazy = {name: tensor_file.of(tensor) for name, tensor in tensors.items()}
    tensor_file.write(tmp_path / "a.safetensors", lazy, "fp16", lambda digest: {"hash": digest})
    read = load_file(tmp_path / "a.safetensors")
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        "small": torch.float16, "large": torch.float32, "none": torch.float16,
    }  # fmt: skip
    assert read["large"].item() == -70000
    assert "large holds numbers too large for fp16: it is written as fp32" in caplog.text


def test_full_disk_leaves_the_folder(command, monkeypatch, caplog):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", fail)
    tokens = command("sd", save_single_file=True)
    load_script("sd").main(tokens)
    folder = tokens[tokens.index("--output_dir") + 1]
    StableDiffusionPipeline.from_pretrained(folder)
    said = f"{NAME} cannot be written ([Errno 28] No space left on device): the model's folder is complete"
    assert said in caplog.text
    monkeypatch.undo()
    single_file.main([folder, "--save_precision=fp16"])
    assert_equal(
        weights(open_file(f"{folder}/{NAME}", folder)),
        {
            n: t.half().float() if t.is_floating_point() else t
            for n, t in weights(StableDiffusionPipeline.from_pretrained(folder)).items()
        },
    )


# --------------------------------------------------------------------------------------------------- what is trained on


@pytest.mark.parametrize("script", ["sd", "sd_lora"])
def test_run_from_a_file_is_the_run_from_the_folder(run, one_file, script):
    rows, files = [], []
    for base in (one_file, one_file.parent):
        folder = run(script, pretrained_model_name_or_path=base, max_train_steps=2)
        rows.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
        files.append(load_file(folder / SCRIPTS[script].trained))
    assert rows[0] == rows[1]
    assert_equal(*files)


def rewrite(file, target, change, texts=None):
    """A copy of a file with other tensors, without the header's texts unless they are given."""
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata=texts)
    return target


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
WHOLE = "a whole Stable Diffusion 1.x or 2.x is needed"
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ONE = {f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), CONTEXT: (8, 768), f"{VAE}encoder.conv_in.weight": (8, 3, 3, 3),
       f"{TEXT}transformer.text_model.final_layer_norm.bias": (768,)}  # fmt: skip
TWO = ONE | {CONTEXT: (8, 1024)}
V = "weights do not tell what it predicts: add --prediction_type=v_prediction (most models for 768 pixels) or"
FILES = {  # shapes of a file's tensors, what is said of it
    "VAE": ({"encoder.conv_in.weight": (8, 3, 3, 3)}, "is a VAE: give it as --pretrained_vae_model_name_or_path, "),
    "VAE with its prefix": ({f"{VAE}decoder.conv_in.weight": (8, 4, 3, 3)}, "is a VAE: give it as "),
    "LoRA of kohya": ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 4)}, "is a LoRA: give the model"),
    "LoRA of diffusers": ({"unet.down_blocks.0.attentions.0.to_q.lora.up.weight": (8, 4)}, "is a LoRA: give the model"),
    "LoHa": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": (8, 4)}, "is a LoRA: give the model"),
    "SDXL": (ONE | {"conditioner.embedders.0.transformer.text_model.x": (1,)}, f"is a Stable Diffusion XL; {WHOLE}"),
    "SD 3": ({f"{UNET}joint_blocks.0.x.weight": (1,)}, f"is a newer architecture: {WHOLE}"),
    "inpainting": (ONE | {f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)}, f"is a model for inpainting; {WHOLE}"),
    "depth": (TWO | {f"{UNET}input_blocks.0.0.weight": (8, 5, 3, 3)}, f"is a model with depth; {WHOLE}"),
    "UNet alone": ({n: s for n, s in ONE.items() if n.startswith(UNET)}, "has a UNet and no text encoder that is read"),
    "diffusers' UNet": ({"conv_in.weight": (8, 4, 3, 3)}, "is the UNet of a folder of diffusers: give the folder that"),
    "text encoder": ({"text_model.embeddings.position_ids": (1, 77)}, "is the text encoder of a folder of diffusers"),
    "ControlNet": ({"control_model.time_embed.0.weight": (8, 8)}, f"is a ControlNet: {WHOLE}"),
    "embedding": ({"emb_params": (4, 768)}, f"is an embedding (textual inversion): {WHOLE}"),
    "no VAE": ({n: s for n, s in ONE.items() if not n.startswith(VAE)}, "has no VAE: add one with --pretrained_vae_"),
    "another width": (ONE | {CONTEXT: (8, 512)}, "has a UNet that reads text states of 512 numbers, not of 768 or"),
    "2.x": (TWO, V),
    "something": ({"weight": (1,)}, f"holds no UNet of a Stable Diffusion (1 other tensors); {WHOLE}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_file_that_cannot_be_trained(kind, tmp_path, refused):
    shapes, said = FILES[kind]
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    line = refused("sd", pretrained_model_name_or_path=file)
    assert f"--pretrained_model_name_or_path {file} {said}" in line or (kind == "2.x" and said in line)


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        (b"", {}, "cannot be read: it is empty: fetch it again"),
        (b"<!DOCTYPE html>", {}, "cannot be read: it is a web page"),
        (b"version https://git-lfs", {}, "cannot be read: it is a Git LFS pointer in place of it"),
        (b"\x10", {}, "cannot be read: it is damaged or incomplete"),
    ],
)
def test_file_that_is_damaged(content, changes, said, tmp_path, refused):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert said in refused("sd", pretrained_model_name_or_path=tmp_path / "model.safetensors", **changes)


def test_flags_that_do_nothing_with_a_file(one_file, tmp_path, refused):
    for flag in ("revision", "non_ema_revision", "variant"):
        line = refused("sd", pretrained_model_name_or_path=one_file, **{flag: "fp16"})
        assert f"--{flag} does nothing with a single file, {one_file}: leave it out" in line
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF")
    line = refused("sd", pretrained_model_name_or_path=other)
    assert f"{other} is a file, and of files only .safetensors and .ckpt are read" in line
    line = refused("decoder", pretrained_decoder_model_name_or_path=one_file)
    assert f"{one_file} is a file: for Kandinsky a folder or a hub name is needed" in line
    line = refused("sd", save_precision="fp16")
    assert "--save_precision does nothing without --save_single_file" in line


def test_source_in_the_place_of_the_result(one_file, command, refused, tmp_path):
    """Another file may lie there."""
    line = refused("sd", pretrained_model_name_or_path=one_file, output_dir=one_file.parent)
    assert f"--output_dir {one_file.parent} holds {one_file} of --pretrained_model_name_or_path, which would" in line
    adapters = tmp_path / "kohya_lora_weights.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 4)}, adapters)
    line = refused("sd_lora", network_weights=adapters, output_dir=tmp_path)
    assert f"--output_dir {tmp_path} holds {adapters} of --network_weights, which would be overwritten" in line
    shutil.copy(one_file, tmp_path / "base.safetensors")
    tokens = command("sd", pretrained_model_name_or_path=tmp_path / "base.safetensors", output_dir=tmp_path)
    assert load_script("sd").parse_args(tokens).output_dir == str(tmp_path)


def test_lora_script_says_what_it_writes(refused):
    line = refused("sd_lora", save_single_file=True)
    assert line.endswith(
        "--save_single_file: adapters are no whole model: this script writes pytorch_lora_weights.safetensors, and "
        "with --save_kohya kohya_lora_weights.safetensors for A1111 and ComfyUI"
    )


def test_file_that_lacks_a_tensor(one_file, command, tmp_path, monkeypatch, capsys):
    """A file of that name in the working folder is not taken for the text encoder's."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(one_file, tmp_path / "model.safetensors")
    for lost, said in (
        (
            f"{TEXT}transformer.text_model.final_layer_norm.bias",
            f"lacks {TEXT}transformer.text_model.final_layer_norm.bias: download it again",
        ),
        (f"{UNET}time_embed.0.bias", f"lacks {UNET}time_embed.0.bias: download it again"),
        (f"{VAE}decoder.conv_out.bias", f"lacks {VAE}decoder.conv_out.bias: download it again"),
    ):
        file = rewrite(
            one_file, tmp_path / "lacks.safetensors",
            lambda tensors, lost=lost: {n: t for n, t in tensors.items() if n != lost}, texts(one_file),
        )  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            load_script("sd").main(command("sd", pretrained_model_name_or_path=file))
        assert f"--pretrained_model_name_or_path {file}: {said}" in str(stop.value)


# ------------------------------------------------------------------------------------- what a file does not say clearly


@pytest.fixture(scope="module")
def two(tmp_path_factory, model) -> Path:
    """Folder of a tiny Stable Diffusion 2.x: OpenCLIP's text encoder, of 23 layers, and linear projections."""
    folder = tmp_path_factory.mktemp("two") / "sd2"
    shutil.copytree(model, folder)
    torch.manual_seed(2)
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=23, num_attention_heads=2,
            max_position_embeddings=16, hidden_act="gelu", **ends,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    unet = UNet2DConditionModel.load_config(folder / "unet")
    config = dict(unet) | {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def test_stable_diffusion_2_comes_back(two, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(two, folder)
    single_file.main([str(folder), "--save_precision=fp32"])
    assert_equal(weights(open_file(folder / NAME, folder)), weights(StableDiffusionPipeline.from_pretrained(folder)))
    tensors = load_file(folder / NAME)
    layer = f"{TEXT}model.transformer.resblocks"
    assert tensors[f"{layer}.0.attn.in_proj_weight"].shape == (48, 16)
    assert torch.equal(tensors[f"{layer}.23.mlp.c_fc.bias"], tensors[f"{layer}.22.mlp.c_fc.bias"]), "read by nothing"
    assert texts(folder / NAME)["modelspec.architecture"] == "stable-diffusion-v2-512"


def identified(tensors: dict, header=None, flag=None, file="model.safetensors"):
    return original_files.identify(Path(file), tensors, header or {}, True, flag)


@pytest.mark.parametrize(
    ("tensors", "header", "flag", "predicts", "how"),
    [
        (ONE, {}, None, "epsilon", "1.x that predicts epsilon (as all of 1.x do that do not say otherwise)"),
        (ONE, {"modelspec.prediction_type": "v"}, None, "v_prediction", "1.x that predicts v (by its header)"),
        (ONE | {"v_pred": ()}, {}, None, "v_prediction", "1.x that predicts v (by its tensor v_pred)"),
        (ONE, {"modelspec.prediction_type": "v"}, "epsilon", "epsilon", "1.x that predicts epsilon (by --prediction"),
        (TWO, {"modelspec.prediction_type": "epsilon"}, None, "epsilon", "2.x that predicts epsilon (by its header)"),
        (TWO, {}, "v_prediction", "v_prediction", "2.x that predicts v (by --prediction_type)"),
        (ONE | {f"{UNET}x": (1,), "model_ema.decay": ()}, {}, None, "epsilon", "; of its two sets of UNet weights the"),
    ],
)
def test_what_a_model_predicts(tensors, header, flag, predicts, how):
    found = identified(tensors, header, flag)
    assert found.configurations["scheduler/scheduler_config.json"]["prediction_type"] == predicts
    assert how in found.description
    width = found.configurations["unet/config.json"]["cross_attention_dim"]
    assert width == (1024 if tensors == TWO else 768)
    assert found.configurations["unet/config.json"].get("upcast_attention", False) == (
        tensors == TWO and flag is not None
    )


def test_configuration_beside_the_file(tmp_path):
    """As A1111 reads it."""
    file = tmp_path / "model.safetensors"
    file.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    found = identified(TWO, file=file)
    assert found.description == "Stable Diffusion 2.x that predicts v (by model.yaml)"
    file.with_suffix(".yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert "predicts epsilon (by model.yaml)" in identified(TWO, file=file).description


def test_checkpoint_of_before_safetensors(one_file, tmp_path, command, run, monkeypatch):
    """With what Lightning leaves beside the weights; the tiny model's configurations stand in for the published."""
    configurations = json.loads(texts(one_file)["t2i_training.configurations"])
    monkeypatch.setattr(original_files, "_family", lambda *_: ("1", configurations, "epsilon"))
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(one_file), "global_step": 470000, "epoch": 6}, file)
    tokens = command("sd", pretrained_model_name_or_path=file, max_train_steps=2)
    load_script("sd").main(tokens)
    trained = "unet/diffusion_pytorch_model.safetensors"
    same = run("sd", pretrained_model_name_or_path=one_file, max_train_steps=2) / trained
    assert (Path(tokens[tokens.index("--output_dir") + 1]) / trained).read_bytes() == same.read_bytes()


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
def test_checkpoint_that_could_run_code(flag, one_file, tmp_path, command):
    class Callback:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(one_file), "callbacks": Callback()}, file)
    with pytest.raises(SystemExit) as stop:
        load_script("sd").main(command("sd", **{flag: file}))
    assert f"--{flag} {file}: holds Python objects besides tensors, which" in str(stop.value)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------ other VAE


@pytest.fixture(scope="module")
def other_vae(model, tmp_path_factory) -> Path:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    AutoencoderKL.from_config(AutoencoderKL.load_config(model / "vae")).save_pretrained(folder)
    return folder


def other_vaes(model, other_vae, tmp_path) -> dict:
    whole = tmp_path / "whole"
    shutil.copytree(model, whole)
    shutil.copytree(other_vae, whole / "vae", dirs_exist_ok=True)
    single_file.main([str(whole), "--save_precision=fp32"])
    shutil.copy(whole / NAME, tmp_path / "VAE.SAFETENSORS")
    return {"folder": other_vae, "pipeline": whole, "single file": tmp_path / "VAE.SAFETENSORS"}


@pytest.mark.parametrize("script", ["sd", "sd_lora"])
def test_other_vae(script, run, model, other_vae, tmp_path):
    losses = {"its own": loss(run(script, max_train_steps=1))}
    for kind, vae in other_vaes(model, other_vae, tmp_path).items():
        folder = run(script, max_train_steps=1, pretrained_vae_model_name_or_path=vae)
        losses[kind] = loss(folder)
        if script != "sd_lora":
            saved = [load_file(place / "diffusion_pytorch_model.safetensors") for place in (folder / "vae", other_vae)]
            assert_equal(*saved)
    assert losses["folder"] != losses["its own"]
    assert losses["folder"] == losses["pipeline"] == losses["single file"]


def loss(folder) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_vae_that_does_not_fit(model, command, tmp_path):
    config = dict(AutoencoderKL.load_config(model / "vae")) | {"latent_channels": 8}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    with pytest.raises(SystemExit) as stop:
        load_script("sd").main(command("sd", pretrained_vae_model_name_or_path=tmp_path / "vae"))
    assert "vae: its latents have 8 channels, and the model reads 4" in str(stop.value)


# ------------------------------------------------------------------------------------------------------ the Flax script


def test_flax_reads_and_writes_them(one_file, model, other_vae, command, tmp_path):
    """The networks, tokens and scheduler of the folder; its export, read by diffusers, is what it was given."""
    pytest.importorskip("jax")
    from t2i_training.sd_flax import pipeline as flax_pipeline

    script = load_script("sd_flax")

    def load(**changes):
        args = script.parse_args(command("sd_flax", save_single_file=True, save_precision="fp32", **changes))
        return args, flax_pipeline.load(args, np.float32)

    args, loaded = load(pretrained_model_name_or_path=one_file)
    _, other = load(pretrained_model_name_or_path=one_file, pretrained_vae_model_name_or_path=other_vae)
    _, expected = load(pretrained_vae_model_name_or_path=other_vae)
    for part in ("unet", "vae", "text_encoder"):
        tensors, wanted = getattr(other, part).state_dict(), getattr(expected, part).state_dict()
        assert tensors.keys() == wanted.keys()
        assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)
    assert not np.array_equal(loaded.vae.state_dict()["decoder.conv_in.weight"], tensors_of(other_vae))
    assert other.tokenizer("été 🦊").input_ids == expected.tokenizer("été 🦊").input_ids
    assert other.scheduler.config["beta_end"] == 0.012
    script.export(loaded, SimpleNamespace(export=lambda: loaded.unet), args, tmp_path)
    assert_equal(load_file(tmp_path / NAME), load_file(one_file))


def tensors_of(vae) -> np.ndarray:
    return load_file(vae / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"].numpy()


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("base", ["folder", "single file"])
def test_file_of_a_checkpoint(base, run, one_file, model, command, capsys):
    folder = run("sd", use_ema=True, checkpointing_steps=2, save_single_file=True)
    checkpoint = folder / "checkpoint-4"
    place = {"folder": model, "single file": one_file}[base]
    single_file.main([str(checkpoint), "--base", str(place)])
    said = f"{checkpoint / NAME} (0.00 GiB, fp32), the UNet from {checkpoint / 'unet_ema'}"
    assert said in capsys.readouterr().out
    assert_equal(load_file(checkpoint / NAME), load_file(folder / NAME))  # the average after the last update
    load_script("sd").main(command("sd", use_ema=True, max_train_steps=5, resume_from_checkpoint=checkpoint))
    (checkpoint / NAME).unlink()


def test_command_says_what_it_needs(run, model, tmp_path):
    folder = run("sd", use_ema=True, checkpointing_steps=2, save_single_file=True)
    for place, options, said in (
        (folder / "checkpoint-2", [], "is a checkpoint, which has no VAE and no text encoder: add --base"),
        (folder, ["--base", str(model)], "is a whole pipeline: leave --base out"),
        (tmp_path, [], "holds neither a pipeline nor a checkpoint with a UNet"),
    ):
        with pytest.raises(SystemExit) as stop:
            single_file.main([str(place), *options])
        assert f"error: folder {place}: {said}" in str(stop.value)
