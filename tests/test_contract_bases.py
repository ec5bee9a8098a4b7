"""Contract: a base as people have it trains, or one line says what is wrong with it.

What can be seen in files alone is said while flags are checked: before torch is imported and data are opened.
"""

import json
import os
import re
import shutil

import pytest
from conftest import load_script

FLAG = "pretrained_model_name_or_path"
PLAIN = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(model, tmp_path):
    """A copy of the tiny Stable Diffusion."""
    return shutil.copytree(model, tmp_path / "base")


def weights(folder, part="unet"):
    (file,) = (folder / part).glob("*.safetensors")
    return file


def cut(file, size=None):
    os.truncate(file, file.stat().st_size // 2 if size is None else size)


def web_page(file):
    file.write_text("<!DOCTYPE html><html><head><title>Sign in</title></head></html>")


def as_bin(folder, part="unet"):
    import torch
    from safetensors.torch import load_file

    file = weights(folder, part)
    target = file.with_name("pytorch_model.bin") if part == "text_encoder" else file.with_suffix(".bin")
    torch.save(load_file(file), target)
    file.unlink()
    return target


def in_two_files(folder, part="unet"):
    """Split a network's weights as `save_pretrained` does; returns the second file."""
    from safetensors.torch import load_file, save_file

    file = weights(folder, part)
    tensors = load_file(file)
    names, stem = sorted(tensors), file.name.removesuffix(".safetensors")
    parts = {f"{stem}-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for name, kept in parts.items():
        save_file({key: tensors[key] for key in kept}, file.with_name(name), metadata={"format": "pt"})
    where = {key: name for name, kept in parts.items() for key in kept}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()
    return file.with_name(f"{stem}-00002-of-00002.safetensors")


def with_tensors(folder, part, change, metadata=True):
    """Write a network's weights again, after `change` of the dictionary."""
    from safetensors.torch import load_file, save_file

    file = weights(folder, part)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"} if metadata else None)


def configure(folder, name, **entries):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))


def mark(folder, name, encoding):
    (folder / name).write_bytes((folder / name).read_text().encode(encoding))


def link_to_nothing(folder):
    file = weights(folder)
    file.unlink()
    file.symlink_to("../../blobs/0123")


def rename(folder, name):
    weights(folder).rename(folder / "unet" / name)


def cast(folder, dtype):
    import torch

    with_tensors(folder, "unet", lambda t: t.update({n: v.to(getattr(torch, dtype)) for n, v in t.items()}))


# What files alone tell

DAMAGED = r"damaged or incomplete: it has \d+ bytes, and its header promises \d+: fetch it again"
SEEN_IN_FILES = {
    "the UNet's weights cut": (lambda f: cut(weights(f)), f"unet/{PLAIN} is {DAMAGED}"),
    "the VAE's weights cut": (lambda f: cut(weights(f, "vae")), f"vae/{PLAIN} is {DAMAGED}"),
    "the text encoder's weights cut": (
        lambda f: cut(weights(f, "text_encoder")), f"text_encoder/model.safetensors is {DAMAGED}"
    ),
    "cut in its first bytes": (lambda f: cut(weights(f), 5), f"unet/{PLAIN} is damaged or incomplete: it has 5 bytes"),
    "cut in its header": (lambda f: cut(weights(f), 200), f"unet/{PLAIN} is damaged or incomplete: it has 200 bytes"),
    "longer than promised": (
        lambda f: weights(f).write_bytes(weights(f).read_bytes() + bytes(100)), f"unet/{PLAIN} is {DAMAGED}"
    ),
    "empty": (lambda f: cut(weights(f), 0), f"unet/{PLAIN} is empty: fetch it again"),
    "a web page as safetensors": (
        lambda f: web_page(weights(f)), f"unet/{PLAIN} is a web page, saved in its place: download it again"
    ),
    "a web page as .bin": (
        lambda f: web_page(as_bin(f)), "unet/diffusion_pytorch_model.bin is a web page, saved in its place: download it"
    ),
    "a server's error as safetensors": (
        lambda f: weights(f).write_text("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
        f"unet/{PLAIN} is an XML text, as servers send it with an error, saved in its place: download it again",
    ),
    ".bin cut": (lambda f: cut(as_bin(f)), "unet/diffusion_pytorch_model.bin is damaged or incomplete: fetch it again"),
    "the text encoder's .bin cut": (
        lambda f: cut(as_bin(f, "text_encoder")), "text_encoder/pytorch_model.bin is damaged or incomplete"
    ),
    "one of two files lost": (
        lambda f: in_two_files(f).unlink(),
        "has no unet/diffusion_pytorch_model-00002-of-00002.safetensors, which holds a part of its weights",
    ),
    "one of two files cut": (
        lambda f: cut(in_two_files(f)), f"unet/diffusion_pytorch_model-00002-of-00002.safetensors is {DAMAGED}"
    ),
    "one of the text encoder's two files lost": (
        lambda f: in_two_files(f, "text_encoder").unlink(), "has no text_encoder/model-00002-of-00002.safetensors"
    ),
    "a link that leads nowhere": (link_to_nothing, f"unet/{PLAIN} is a link to nothing: ../../blobs/0123"),
    "an unfinished download": (
        lambda f: rename(f, f"{PLAIN}.crdownload"), f"only unet/{PLAIN}.crdownload, an unfinished download"
    ),
    "a browser's second copy": (
        lambda f: rename(f, "diffusion_pytorch_model (1).safetensors"),
        r"only unet/diffusion_pytorch_model \(1\).safetensors, whose name must be unet/diffusion_pytorch_model.safeten",
    ),
    "a model site's name": (
        lambda f: rename(f, "dreamy_v5.safetensors"),
        "only unet/dreamy_v5.safetensors, whose name must be unet/diffusion_pytorch_model.safetensors",
    ),
    "quantised": (
        lambda f: configure(f, "unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "its unet is quantised \\(bitsandbytes\\)",
    ),
    "an index with a byte order mark": (
        lambda f: mark(f, "model_index.json", "utf-8-sig"),
        "holds a model_index.json that begins with a byte order mark: save it as UTF-8 without BOM",
    ),
    "a configuration with a byte order mark": (
        lambda f: mark(f, "unet/config.json", "utf-8-sig"),
        "holds a unet/config.json that begins with a byte order mark: save it as UTF-8 without BOM",
    ),
    "an index in UTF-16": (
        lambda f: mark(f, "model_index.json", "utf-16"),
        "holds a model_index.json that begins with a byte order mark: save it as UTF-8 without BOM",
    ),
    "no configuration of the UNet": (lambda f: (f / "unet/config.json").unlink(), "has no unet/config.json: "),
    "no configuration of the text encoder": (
        lambda f: (f / "text_encoder/config.json").unlink(),
        "has no text_encoder/config.json: it was not copied completely",
    ),
    "no configuration of the scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(), "has no scheduler/scheduler_config.json: it was not"
    ),
    "no vocabulary": (
        lambda f: [(f / "tokenizer" / n).unlink() for n in ("vocab.json", "merges.txt", "tokenizer.json")],
        "has neither tokenizer/tokenizer.json nor tokenizer/vocab.json with tokenizer/merges.txt: it was not copied",
    ),
    "half of a vocabulary": (
        lambda f: [(f / "tokenizer" / n).unlink() for n in ("merges.txt", "tokenizer.json")],
        "has neither tokenizer/tokenizer.json nor tokenizer/vocab.json with tokenizer/merges.txt: it was not copied",
    ),
    "a UNet of code of its own": (
        lambda f: configure(f, "model_index.json", unet=["my_unet", "MyUNet2DConditionModel"]),
        "its UNet is a MyUNet2DConditionModel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEN_IN_FILES)
def test_what_files_tell_is_said_while_flags_are_checked(case, base, command, capsys):
    damage, said = SEEN_IN_FILES[case]
    damage(base)
    with pytest.raises(SystemExit) as stop:
        load_script("sd").parse_args(command("sd", **{FLAG: base}))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f" error: --{FLAG} {base} " in line
    assert re.search(said, line), line


# What shows when it is loaded


def nan(tensors):
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")


def infinity(tensors):
    tensors[sorted(tensors)[-1]].view(-1)[-1] = float("inf")


def lose(tensors):
    tensors.pop(sorted(tensors)[0])


SEEN_IN_LOADING = {
    "NaN in the UNet": (lambda f: with_tensors(f, "unet", nan), "unet holds values that are not finite, in "),
    "NaN in the VAE": (lambda f: with_tensors(f, "vae", nan), "vae holds values that are not finite, in "),
    "infinity in the text encoder": (
        lambda f: with_tensors(f, "text_encoder", infinity), "text_encoder holds values that are not finite, in "
    ),
    "a tensor of the UNet missing": (
        lambda f: with_tensors(f, "unet", lose), "unet has no weights for conv_in.bias, which its config.json describes"
    ),
    "a tensor of the text encoder missing": (
        lambda f: with_tensors(f, "text_encoder", lose), "text_encoder has no weights for .*position_embedding.weight"
    ),
    "the same in .bin": (
        lambda f: (with_tensors(f, "text_encoder", lose), as_bin(f, "text_encoder")),
        "text_encoder has no weights for .*position_embedding.weight",
    ),
    "a configuration of another size": (
        lambda f: configure(f, "unet/config.json", block_out_channels=[16, 32]), r"conv_in.bias expected .*\[8\]\)\.$"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEN_IN_LOADING)
def test_what_loading_tells_is_said_before_training(case, base, command, tmp_path):
    damage, said = SEEN_IN_LOADING[case]
    damage(base)
    with pytest.raises(SystemExit, match=f"^error: --{FLAG} {base}: .*{said}") as stop:
        load_script("sd").main(command("sd", **{FLAG: base}, output_dir=tmp_path / "out"))
    assert "\n" not in stop.value.code


DECODER, PRIOR = "pretrained_decoder_model_name_or_path", "pretrained_prior_model_name_or_path"
OTHER_SCRIPTS = {  # script, flag, part, and what is said of it when NaN stands in its weights
    "Flax": ("sd_flax", FLAG, "unet", r"unet/\S+: tensor \S+ holds values that are not finite"),
    "what a prior trains": ("prior", PRIOR, "prior", "prior holds values that are not finite, in "),
    "what a prior validates with": ("prior_lora", DECODER, "movq", "movq holds values that are not finite, in "),
    "what a decoder reads of a prior": (
        "decoder", PRIOR, "image_encoder", "image_encoder holds values that are not finite, in "
    ),
    "what a decoder trains": ("decoder_lora", DECODER, "unet", "unet holds values that are not finite, in "),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_SCRIPTS)
def test_values_that_are_not_finite_in_other_scripts(case, request, command, tmp_path):
    script, flag, part, said = OTHER_SCRIPTS[case]
    if script == "sd_flax":
        pytest.importorskip("jax")
    origin = {FLAG: "small_model", PRIOR: "prior_model", DECODER: "decoder_model"}[flag]
    base = shutil.copytree(request.getfixturevalue(origin), tmp_path / "base")
    with_tensors(base, part, nan)
    flags = {"sd_flax": {}, "prior": {"validation_prompts": ["a"]}, "decoder": {"validation_prompts": ["a"]}}
    prompts = flags.get(script, {"validation_prompt": "a"})
    with pytest.raises(SystemExit, match=f"^error: --{flag} {base}: .*{said}"):
        load_script(script).main(command(script, **{flag: base}, **prompts, output_dir=tmp_path / "out"))


# What trains

TAKEN = {
    "in two files": in_two_files,
    "the text encoder in two files": lambda f: in_two_files(f, "text_encoder"),
    "the text encoder as .bin": lambda f: as_bin(f, "text_encoder"),
    "all as .bin": lambda f: [as_bin(f, part) for part in ("unet", "vae", "text_encoder")],
    "fp64": lambda f: cast(f, "float64"),
    "bf16": lambda f: cast(f, "bfloat16"),
    "no metadata": lambda f: [with_tensors(f, p, lambda t: None, metadata=False) for p in ("unet", "text_encoder")],
    "a part that no network has": lambda f: configure(
        f, "model_index.json", controlnet=["diffusers", "ControlNetModel"]
    ),
    "a pipeline of code of its own": lambda f: configure(f, "model_index.json", _class_name="MyStableDiffusion"),
    "a tokenizer without its configuration": lambda f: (f / "tokenizer/tokenizer_config.json").unlink(),
    "a tokenizer of the old files alone": lambda f: (f / "tokenizer/tokenizer.json").unlink(),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_trains(case, base, command, tmp_path, capfd):
    TAKEN[case](base)
    load_script("sd_lora").main(
        command("sd_lora", **{FLAG: base}, max_train_steps=1, checkpointing_steps=5, output_dir=tmp_path / "out")
    )
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert "An error occurred" not in capfd.readouterr().err
