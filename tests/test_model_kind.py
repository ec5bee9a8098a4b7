"""What a model is, told from configuration files: before data are opened, of a folder before torch is imported."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import load_script

from t2i_training.cli import checks
from t2i_training.sources import model_kind

FLAG = "--pretrained_model_name_or_path"
BASES = {"sd": "model", "prior": "prior_model", "decoder": "decoder_model"}


@pytest.fixture
def variant_of(request, tmp_path):
    """variant_of("sd", {file: changes}, drop=[...]): a copy of a tiny pipeline with other configuration files."""

    def make(base: str, changes: dict, drop=()) -> Path:
        folder = tmp_path / "other"
        shutil.copytree(request.getfixturevalue(BASES[base]), folder)
        for name, entries in changes.items():
            config = json.loads((folder / name).read_text()) | entries
            kept = {key: value for key, value in config.items() if value != "dropped"}
            (folder / name).write_text(json.dumps(kept))
        for name in drop:
            shutil.rmtree(folder / name)
        return folder

    return make


INDEX, UNET = "model_index.json", "unet/config.json"
TWO_ENCODERS = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
OTHERS = {  # base, changes, what is said of it
    "SDXL": (
        "sd", {INDEX: {"_class_name": "StableDiffusionXLPipeline", **TWO_ENCODERS}},
        " is a StableDiffusionXLPipeline: it has two text encoders; a Stable Diffusion 1.x or 2.x is needed: ",
    ),
    "SDXL's refiner": (
        "sd", {INDEX: {"_class_name": "SDXLImg2ImgPipeline", "text_encoder": [None, None], **TWO_ENCODERS}},
        " is a SDXLImg2ImgPipeline: it has no text_encoder; ",
    ),
    "inpainting": (
        "sd", {INDEX: {"_class_name": "StableDiffusionInpaintPipeline"}, UNET: {"in_channels": 9}},
        ": its UNet has 9 input channels, as for inpainting, and its latents have 4; ",
    ),
    "depth": ("sd", {UNET: {"in_channels": 5}}, ": its UNet has 5 input channels, as with depth, and its latents"),
    "upscaler": ("sd", {UNET: {"in_channels": 7, "num_class_embeds": 1000}}, ": its UNet reads class labels besides; "),
    "SDXL's UNet": ("sd", {UNET: {"addition_embed_type": "text_time"}}, "its UNet reads text_time conditions (SDXL's)"),
    "another's text encoder": (
        "sd", {UNET: {"cross_attention_dim": 32}},
        "its UNet reads text states of 32 numbers, and its text encoder gives 16",
    ),
    "Stable Diffusion 3": (
        "sd", {INDEX: {"_class_name": "StableDiffusion3Pipeline", "unet": "dropped", "transformer": ["", "X"]}},
        " is a StableDiffusion3Pipeline: it has no unet; ",
    ),
    "Flax": (
        "sd", {INDEX: {"_class_name": "FlaxStableDiffusionPipeline", "unet": ["", "FlaxUNet2DConditionModel"]}},
        ": its networks are Flax's, which train_text_to_image_flax.py reads; ",
    ),
    "tiny VAE": ("sd", {INDEX: {"vae": ["diffusers", "AutoencoderTiny"]}}, "its VAE is an AutoencoderTiny, which"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_a_pipeline_of_another_kind(case, variant_of, refused):
    base, changes, said = OTHERS[case]
    folder = variant_of(base, changes)
    for script in ("sd", "sd_lora"):
        line = refused(script, pretrained_model_name_or_path=folder)
        assert f"{FLAG} {folder} is a " in line
        assert said in line


def test_pipelines_that_share_all_of_their_parts_are_taken(variant_of, command):
    folder = variant_of("sd", {INDEX: {"_class_name": "StableDiffusionImg2ImgPipeline"}})
    load_script("sd").parse_args(command("sd", pretrained_model_name_or_path=folder))


DECODER, PRIOR = "pretrained_decoder_model_name_or_path", "pretrained_prior_model_name_or_path"


@pytest.mark.parametrize("script", ["prior", "prior_lora", "decoder", "decoder_lora"])
def test_prior_and_decoder_exchanged(script, refused, prior_model, decoder_model):
    line = refused(script, **{PRIOR: decoder_model})
    assert f"--{PRIOR} {decoder_model} is a KandinskyV22Pipeline: it has no prior and no image_encoder" in line
    assert f", and is for --{DECODER}; a prior of Kandinsky 2.2 is needed" in line
    line = refused(script, **{DECODER: prior_model})
    assert f"is a KandinskyV22PriorPipeline: it has no unet and no movq, and is for --{PRIOR}; " in line


KANDINSKY = {
    "2.1": (
        "decoder", {INDEX: {"_class_name": "KandinskyPipeline"}, UNET: {"addition_embed_type": "text_image"}},
        " is a KandinskyPipeline: its UNet reads text_image conditions (Kandinsky 2.1's) besides; ",
    ),
    "ControlNet": ("decoder", {UNET: {"addition_embed_type": "image_hint"}}, "image_hint conditions (a ControlNet's)"),
    "inpainting": ("decoder", {UNET: {"in_channels": 9}}, "its UNet has 9 input channels, as for inpainting"),
    "2.1's prior": ("prior", {INDEX: {"_class_name": "KandinskyPriorPipeline"}}, ": it is of Kandinsky 2.1; "),
    "of other embeddings": (
        "decoder", {UNET: {"encoder_hid_dim": 768}},
        f"--{PRIOR} gives image embeddings of 32 numbers, and --{DECODER} expects 768",
    ),
    "both in one": (
        "prior", {INDEX: {"_class_name": "KandinskyV22CombinedPipeline"}},
        "take it apart with prior_pipe.save_pretrained(folder)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KANDINSKY)
def test_a_kandinsky_of_another_kind(case, variant_of, refused):
    base, changes, said = KANDINSKY[case]
    folder = variant_of(base, changes)
    assert said in refused(base, **{f"pretrained_{base}_model_name_or_path": folder})


def test_a_decoder_needs_of_a_prior_its_image_encoder_alone(command, prior_model, refused, tmp_path):
    shutil.copytree(prior_model / "image_encoder", tmp_path / "prior" / "image_encoder")
    tokens = {PRIOR: tmp_path / "prior"}
    load_script("decoder").parse_args(command("decoder", **tokens))
    assert "holds no model_index.json" in refused("decoder", validation_prompts=["a"], **tokens)


def _write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"_class_name": "UNet2DConditionModel"}' if name.endswith(".json") else "x")
    return folder


FOLDERS = {  # files -> what a folder without model_index.json is
    ("pytorch_lora_weights.safetensors",): "holds LoRA adapters, and no model: give the base that they were trained on",
    ("pytorch_lora_weights.safetensors", "checkpoint-5/manifest.json"): (
        "holds LoRA adapters, and no model: give the base that they were trained on, and to train them on: "
        "--output_dir={folder} --resume_from_checkpoint=latest; "
    ),
    ("pytorch_lora_weights.safetensors", "manifest.json"): "is a checkpoint of a training run, for --resume_from_check",
    ("adapter_config.json", "adapter_model.safetensors"): "holds LoRA adapters",
    ("config.json", "diffusion_pytorch_model.safetensors"): "is one network (UNet2DConditionModel), and not a whole",
    ("v1-5-pruned.ckpt", "v1-inference.yaml"): (
        "holds no model_index.json: give the single file itself, {folder}/v1-5-pruned.ckpt"
    ),
    ("unet/config.json", "vae/config.json"): "holds no model_index.json (but unet, vae): it is no pipeline",
    ("sd/model_index.json",): "holds no model_index.json, but {folder}/sd does: give that",
    ("snapshots/0123/model_index.json",): "holds no model_index.json, but {folder}/snapshots/0123 does: give that",
    ("unet/config.json", "optimizer.bin"): "is a checkpoint of a training run, for --resume_from_checkpoint",
    ("checkpoint-500/manifest.json",): "is the output folder of a training run that has not come to its end",
    ("notes.txt",): "holds no model_index.json: it is no pipeline of diffusers",
}  # fmt: skip


@pytest.mark.parametrize("files", FOLDERS, ids="+".join)
def test_a_folder_that_is_no_pipeline(files, refused, tmp_path):
    folder = _write(tmp_path / "base", *files)
    line = refused("sd", pretrained_model_name_or_path=folder)
    assert f"{FLAG} {folder} {FOLDERS[files].format(folder=folder)}" in line


def test_a_folder_inside_of_a_pipeline(refused, model):
    for part, what in (("unet", "is one network (UNet2DConditionModel)"), ("scheduler", "is a part of a pipeline")):
        line = refused("sd", pretrained_model_name_or_path=model / part)
        assert f"{model / part} {what}" in line
        assert f": give {model}; " in line


def test_files_that_were_not_copied_whole(refused, variant_of):
    folder = variant_of("sd", {}, drop=["tokenizer"])
    assert "has no folder tokenizer, which its model_index.json names" in refused(
        "sd", pretrained_model_name_or_path=folder
    )
    (folder / UNET).write_text("{")
    assert "holds a unet/config.json that cannot be read" in refused("sd", pretrained_model_name_or_path=folder)
    (folder / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    line = refused("sd", pretrained_model_name_or_path=folder)
    assert (
        "cannot be read: model_index.json is a Git LFS pointer in place of it: run `git lfs pull` where it was" in line
    )


def test_weights_that_are_pointers(refused, variant_of):
    folder = variant_of("sd", {})
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    line = refused("sd", pretrained_model_name_or_path=folder)
    assert "unet/diffusion_pytorch_model.safetensors is a Git LFS pointer in place of it: run `git lfs pull`" in line


# Weights


def rename(folder: Path, part: str, name: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    file.rename(file.with_name(name))


def as_variant(folder: Path, *parts: str) -> Path:
    for part in parts:
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


def test_weights_of_a_variant_alone(refused, variant_of, command):
    folder = as_variant(variant_of("sd", {}), "unet", "vae")
    assert f"{folder} has weights in unet/ only of a variant: try --variant=fp16" in refused(
        "sd", pretrained_model_name_or_path=folder
    )
    load_script("sd").parse_args(command("sd", pretrained_model_name_or_path=folder, variant="fp16"))
    line = refused("sd", pretrained_model_name_or_path=folder, variant="bf16")
    assert "has no weights of --variant=bf16; there are: fp16" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "diffusion_flax_model.msgpack",
            "has no weights in unet/, only Flax's, which train_text_to_image_flax.py reads",
        ),
        ("model.onnx", "has no weights in unet/, only unet/model.onnx, which is read by no diffusers pipeline"),
        ("README.md", "has no weights in unet/"),
    ],
)
def test_weights_of_another_kind(refused, variant_of, name, said):
    folder = variant_of("sd", {})
    rename(folder, "unet", name)
    assert said in refused("sd", pretrained_model_name_or_path=folder)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model-00001-of-00002.safetensors"])
def test_weights_of_every_form_that_diffusers_reads(variant_of, command, name):
    folder = variant_of("sd", {})
    rename(folder, "unet", name)
    load_script("sd").parse_args(command("sd", pretrained_model_name_or_path=folder))


def test_kandinskys_scripts_read_the_variant_that_is_there(variant_of, command, caplog):
    """They have no --variant: what is there is read, and said."""
    folder = as_variant(variant_of("decoder", {}), "unet")
    load_script("decoder").main(command("decoder", max_train_steps=1, **{DECODER: folder}))
    assert f"--{DECODER} {folder} has only weights of the variant fp16: these are used" in caplog.text


# Revisions


@pytest.mark.parametrize("flag", ["revision", "non_ema_revision"])
def test_a_folder_has_no_revisions(flag, refused, model):
    line = refused("sd", use_ema=True, **{flag: "main"})
    assert f"--{flag} names a revision on the hub, and {model} is a folder here: leave --{flag} out" in line


# The hub: what is asked for stands in the cache, and the tests are offline


def cache(folder: Path, files: dict, name="models--someone--model") -> None:
    commit = "0" * 40
    (folder / name / "refs").mkdir(parents=True)
    (folder / name / "refs" / "main").write_text(commit)
    for path, text in files.items():
        file = folder / name / "snapshots" / commit / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_cached_repository_of_another_kind(command, tmp_path, model):
    files = {name: (model / name).read_text() for name in (INDEX, UNET, "vae/config.json", "text_encoder/config.json")}
    files[UNET] = files[UNET].replace('"in_channels": 4', '"in_channels": 9')
    cache(tmp_path, files)
    tokens = command("sd", pretrained_model_name_or_path="someone/model", cache_dir=tmp_path)
    with pytest.raises(
        SystemExit, match=f"^error: {FLAG} someone/model is a StableDiffusionPipeline: .* 9 input channels"
    ):
        load_script("sd").main(tokens)


def test_a_repository_that_is_not_cached(command, tmp_path):
    tokens = command("sd", pretrained_model_name_or_path="someone/model", cache_dir=tmp_path)
    message = f"^error: {FLAG} someone/model: there is no such folder, and no copy in the cache; HF_HUB_OFFLINE forbids"
    with pytest.raises(SystemExit, match=message):
        load_script("sd").main(tokens)


def test_a_prior_needs_no_decoder_without_validation(command, monkeypatch):
    asked = []
    monkeypatch.setattr(
        model_kind, "_check_repository", lambda args, flag, name, kind, trained: asked.append((name, kind))
    )
    for prompts in (None, ["a"]):
        args = load_script("prior").parse_args(command("prior", validation_prompts=prompts, **{DECODER: "a/b"}))
        model_kind.check_hub(args, model_kind.PRIOR)
    assert asked == [("a/b", "decoder")]


def test_flax_reads_all_kinds(command, variant_of, monkeypatch):
    pytest.importorskip("jax")
    folder = variant_of("sd", {INDEX: {"unet": ["diffusers", "FlaxUNet2DConditionModel"]}})
    rename(folder, "unet", "diffusion_flax_model.msgpack")
    args = load_script("sd_flax").parse_args(command("sd_flax", pretrained_model_name_or_path=folder))
    assert args.pretrained_model_name_or_path == str(folder)


def test_every_model_flag_is_looked_at(monkeypatch):
    found = {}
    monkeypatch.setattr(checks, "parse", lambda parser, *_: parser.parse_args(["--pretrained_model_name_or_path", "x"]))
    found["sd"] = [kind for _, kind in model_kind._models(load_script("sd").parse_args())]
    monkeypatch.setattr(checks, "parse", lambda parser, *_: parser.parse_args([]))
    found["prior"] = sorted(kind for _, kind in model_kind._models(load_script("prior").parse_args()))
    assert found == {"sd": ["model"], "prior": ["decoder", "prior"]}
