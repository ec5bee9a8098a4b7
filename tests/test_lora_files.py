"""LoRA files of other tools: what A1111, ComfyUI and kohya's scripts find in ours, and starting from theirs."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_script
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import ADAPTERS

KOHYA = "kohya_lora_weights.safetensors"
ROUNDED = {"rtol": 1e-3, "atol": 2e-4}  # of outputs near 1; a wrong scale moves them by 0.01 and more


@pytest.fixture(scope="module")
def run(finished):
    """run(**changes): the output folder of a short LoRA run. Equal changes share one: leave it as it is."""
    return lambda **changes: finished("sd_lora", **changes)


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory) -> Path:
    """A file as kohya's scripts write it: the UNet's attention, feed-forward and projections, a convolution, the text
    encoder; rank 3, of the convolution 2, alpha 1, in fp16.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    generator, tensors = torch.Generator().manual_seed(0), {}

    def add(prefix: str, name: str, weight, rank: int):
        stem = prefix + name.replace(".", "_")
        out, inner = weight.shape[0], weight.shape[1:]
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, *inner, generator=generator).half()
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, *[1] * (weight.ndim - 2), generator=generator).half()
        tensors[f"{stem}.alpha"] = torch.tensor(1.0).half()

    for name, module in pipeline.unet.named_modules():
        if re.search(r"(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)$", name):
            add("lora_unet_", name, module.weight, 3)
    add("lora_unet_", "up_blocks.0.resnets.0.conv1", pipeline.unet.up_blocks[0].resnets[0].conv1.weight, 2)
    for name, module in pipeline.text_encoder.named_modules():
        if re.search(r"(_proj|fc1|fc2)$", name):
            add("lora_te_", f"text_model.{name.removeprefix('text_model.')}", module.weight, 3)
    file = tmp_path_factory.mktemp("theirs") / "anime style.safetensors"
    save_file(tensors, file, metadata={"ss_network_dim": "3", "ss_network_alpha": "1"})
    return file


def loaded(model, file) -> StableDiffusionPipeline:
    """The base with a LoRA file that diffusers has read itself."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline


def outputs(pipeline) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 16, 16, generator=generator)
    with torch.no_grad():
        unet = pipeline.unet(latents, torch.tensor([10, 900]), states).sample
        return [unet, pipeline.text_encoder(torch.arange(16)[None])[0]]


def by_hand(model, file) -> list[torch.Tensor]:
    """W + (alpha / rank) up @ down, as ComfyUI's and A1111's loaders compute it, which look up these very names."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    for prefix, network in (("lora_unet_", pipeline.unet), ("lora_te_text_model_", pipeline.text_encoder)):
        for name, module in network.named_modules():
            stem = prefix + name.removeprefix("text_model.").replace(".", "_")
            if f"{stem}.lora_up.weight" in tensors:
                up, down = tensors.pop(f"{stem}.lora_up.weight"), tensors.pop(f"{stem}.lora_down.weight")
                scale = tensors.pop(f"{stem}.alpha") / down.shape[0]
                module.weight.data += scale * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    assert not tensors, "each tensor has been looked up"
    return outputs(pipeline)


def texts(file) -> dict:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# -------------------------------------------------------------------------------------------------------------- written


def test_names_and_header_of_the_file_for_other_tools(run):
    file = (
        run(save_kohya=True, save_precision="fp16", metadata_trigger_phrase="emoji of", metadata_license="mit") / KOHYA
    )
    tensors = load_file(file)
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0"
    sides = {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(f"{stem}.")}
    assert {name: tuple(tensor.shape) for name, tensor in sides.items()} == {
        ".lora_down.weight": (4, 16), ".lora_up.weight": (16, 4), ".alpha": (),
    }  # fmt: skip
    assert sides[".alpha"] == 4
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    data = file.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert texts(file) == {
        "format": "pt", "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "4", "ss_network_alpha": "4", "ss_network_args": "{}", "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "sd, fine-tuned", "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "epsilon", "modelspec.trigger_phrase": "emoji of", "modelspec.license": "mit",
        "modelspec.hash_sha256": f"0x{digest}",
    }  # fmt: skip


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_of_that_file_alone(run, precision, dtype):
    folder = run(save_kohya=True, save_precision=precision)
    assert {tensor.dtype for tensor in load_file(folder / KOHYA).values()} == {dtype}
    assert {tensor.dtype for tensor in load_file(folder / ADAPTERS).values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------------- started from


@pytest.fixture(scope="module")
def sources(run, theirs, model, tmp_path_factory) -> dict[str, Path]:
    """The same LoRA, but for the first, in each way that files are written."""
    ours = run(save_kohya=True, save_precision="fp32", max_train_steps=3)
    kept = tmp_path_factory.mktemp("kept")
    old = kept / "old.safetensors"  # unet....attn1.processor.to_q_lora.down.weight
    save_file(
        {
            re.sub(r"\.to_(q|k|v|out)(\.0)?\.lora\.", r".processor.to_\1_lora.", name): tensor
            for name, tensor in load_file(ours / ADAPTERS).items()
        },
        old,
    )
    unet = loaded(model, theirs).unet
    layers = get_peft_model_state_dict(unet, adapter_name="default_0")
    config = unet.peft_config["default_0"].to_dict()
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) != (3, 3, {}), "scales that are not 1"
    StableDiffusionPipeline.save_lora_weights(kept, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    return {
        "ours": ours / ADAPTERS, "ours for other tools": ours / KOHYA,
        "a checkpoint's": run(checkpointing_steps=2) / "checkpoint-2" / ADAPTERS,
        "kohya's": theirs, "diffusers', of before peft": old, "diffusers', alpha in the header": kept / ADAPTERS,
    }  # fmt: skip


SOURCES = (
    "ours",
    "ours for other tools",
    "a checkpoint's",
    "kohya's",
    "diffusers', of before peft",
    "diffusers', alpha in the header",
)


@pytest.mark.parametrize("source", SOURCES)
def test_run_starts_from_the_file(source, sources, run, model):
    """A run that learns nothing leaves what diffusers makes of the file itself; alpha is folded in, then it is rank."""
    file = sources[source]
    folder = run(network_weights=file, learning_rate=0, max_train_steps=1, save_kohya=True, save_precision="fp32")
    for found, expected in zip(outputs(loaded(model, folder / ADAPTERS)), outputs(loaded(model, file)), strict=True):
        torch.testing.assert_close(found, expected, **ROUNDED)
    for found, expected in zip(by_hand(model, folder / KOHYA), outputs(loaded(model, file)), strict=True):
        torch.testing.assert_close(found, expected, **ROUNDED)
    plain = outputs(StableDiffusionPipeline.from_pretrained(model))
    changed = [(now - before).abs().max() > 0.01 for now, before in zip(outputs(loaded(model, file)), plain)]
    assert changed == [True, source == "kohya's"]
    assert len(load_file(folder / ADAPTERS)) == sum("alpha" not in name for name in load_file(file))


def test_all_of_the_files_adapters_are_trained(theirs, run, model):
    before, after = run(network_weights=theirs, learning_rate=0, max_train_steps=1), run(network_weights=theirs)
    first, last = load_file(before / ADAPTERS), load_file(after / ADAPTERS)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if name.startswith("unet.")}
    assert any("conv1" in name for name in changed)
    assert any("ff.net.0.proj" in name for name in changed)


def test_encodings_are_those_of_the_merged_text_encoder(theirs, run):
    """With and without the cache the same loss, another than without the file's text encoder."""
    rows = [
        json.loads((run(**changes, max_train_steps=1, center_crop=True) / "metrics.jsonl").read_text().splitlines()[0])
        for changes in ({"network_weights": theirs}, {"network_weights": theirs, "cache_encodings": True})
    ]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


def test_resumed_run_is_the_uninterrupted_one(theirs, command, run):
    whole = run(network_weights=theirs, save_kohya=True, checkpointing_steps=2)
    tokens = command("sd_lora", network_weights=theirs, save_kohya=True, checkpointing_steps=2)
    output_dir = Path(tokens[tokens.index("--output_dir") + 1])
    shutil.copytree(whole / "checkpoint-2", output_dir / "checkpoint-2")
    load_script("sd_lora").main([*tokens, "--resume_from_checkpoint=latest"])
    for name in (ADAPTERS, KOHYA):
        assert_same(load_file(output_dir / name), load_file(whole / name))
    with pytest.raises(SystemExit) as stop:
        load_script("sd_lora").main(command("sd_lora", output_dir=output_dir, resume_from_checkpoint="latest"))
    assert "its adapters have other names, or another --rank or --network_weights" in str(stop.value)


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


STEM = "lora_unet_mid_block_attentions_0_proj_in"
BAD = {  # tensors of a file, what is said of it
    "SDXL": ({"lora_te2_x.lora_down.weight": (2, 4)}, "is a LoRA of SDXL, and LoRA adapters of "),
    "LoHa": ({f"{STEM}.hada_w1_a": (2, 4), f"{STEM}.lora_down.weight": (2, 4)}, "is a LoHa, and LoRA adapters of "),
    "DoRA": ({f"{STEM}.dora_scale": (4,), f"{STEM}.lora_down.weight": (2, 4)}, "is a DoRA, and LoRA adapters of "),
    "another module": (
        {"lora_unet_down_blocks_7_to_q.lora_down.weight": (2, 4)},
        "has adapters for down_blocks_7_to_q, which the model's unet does not have",
    ),
    "one side": ({f"{STEM}.lora_down.weight": (2, 16, 1, 1)}, "has no up weight for mid_block.attentions.0.proj_in"),
    "another width": (
        {f"{STEM}.lora_down.weight": (2, 320, 1, 1), f"{STEM}.lora_up.weight": (320, 2, 1, 1)},
        "has adapters of shape (320, 2, 1, 1) @ (2, 320, 1, 1) for mid_block.attentions.0.proj_in, whose weight is "
        "(16, 16, 1, 1) in this model",
    ),
    "something else besides": (
        {f"{STEM}.lora_down.weight": (2, 16, 1, 1), "bundle_emb.x.string_to_param": (1, 768)},
        "holds bundle_emb.x.string_to_param, which is no part of a LoRA",
    ),
    "text encoder alone": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 16),
         "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (32, 2)},
        "has no adapters for the UNet, which are trained here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_file_that_cannot_be_started_from(kind, tmp_path, command):
    shapes, said = BAD[kind]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit) as stop:
        load_script("sd_lora").main(command("sd_lora", network_weights=tmp_path / "a.safetensors"))
    assert f"--network_weights {tmp_path / 'a.safetensors'}: {said}" in str(stop.value)


def test_what_is_refused_at_once(theirs, tmp_path, command, capsys, model):
    (tmp_path / "empty.safetensors").touch()
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for changes, said in (
        ({"network_weights": tmp_path / "no.safetensors"}, "no.safetensors is no file"),
        ({"network_weights": tmp_path}, f"{tmp_path} is a folder: name the file in it"),
        ({"network_weights": model / "model_index.json"}, "is no .safetensors, the only files that LoRA weights are"),
        ({"network_weights": tmp_path / "empty.safetensors"}, "cannot be read: it is empty: fetch it again"),
        ({"network_weights": tmp_path / "other.safetensors"}, "other.safetensors holds no LoRA adapters"),
        ({"network_weights": theirs, "rank": 8}, "has adapters of rank 3: leave --rank out"),
    ):
        with pytest.raises(SystemExit):
            load_script("sd_lora").parse_args(command("sd_lora", **changes))
        assert said in capsys.readouterr().err
    assert load_script("sd_lora").parse_args(command("sd_lora", network_weights=theirs)).rank == 3
