"""A Stable Diffusion in one .safetensors or .ckpt, as model sites have them: trained from, and written."""

import hashlib
import json

import pytest
import torch
from conftest import load_script
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2i_training.model import single_file, tensor_file
from t2i_training.sources import families

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
    found = single_file.original_layout(parts, configurations)
    lines = sorted(f"{name} [{','.join(map(str, tensor.shape))}]" for name, tensor in found.items())
    count, digest = PUBLISHED[family]
    assert "first_stage_model.encoder.mid.attn_1.q.weight [512,512,1,1]" in lines
    assert len(lines) == count
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_vocabulary_is_clips(tmp_path):
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
    again = run(
        "sd", save_single_file=True, save_precision="fp32", learning_rate=0, metadata_title=one_file.parent.name
    )
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
    assert f"{NAME} cannot be written (No space left on device): the model's folder is complete" in caplog.text
    monkeypatch.undo()
    single_file.main([folder])
    assert_equal(
        weights(open_file(f"{folder}/{NAME}", folder)),
        {
            n: t.half().float() if t.is_floating_point() else t
            for n, t in weights(StableDiffusionPipeline.from_pretrained(folder)).items()
        },
    )


# --------------------------------------------------------------------------------------------------- what is trained on


@pytest.mark.parametrize("script", ["sd", "sd_lora", "sd_flax"])
def test_run_from_a_file_is_the_run_from_the_folder(run, one_file, script):
    rows, files = [], []
    for base in (one_file, one_file.parent):
        folder = run(script, pretrained_model_name_or_path=base, max_train_steps=2)
        rows.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
        trained = {"sd_lora": "pytorch_lora_weights.safetensors"}.get(
            script, "unet/diffusion_pytorch_model.safetensors"
        )
        files.append(load_file(folder / trained))
    assert rows[0] == rows[1]
    assert_equal(*files)
