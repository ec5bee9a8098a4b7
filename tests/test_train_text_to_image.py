"""The Stable Diffusion script: what a run leaves, and that every flag does what it says.

`FLAGS` names, for each flag, the test that shows it act. Runs are short, and shared by the tests that look at them.
"""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import test_hub
import tiny
import torch
import yaml
from accelerate import Accelerator, PartialState
from conftest import flags, free_port, load_script
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scripts import TORCH

from t2i_training.data import buckets, captions, draws, inspection
from t2i_training.data.dataset import open_dataset
from t2i_training.model import ema
from t2i_training.report import validation
from t2i_training.report.progress import Progress
from t2i_training.run import clip_names, lifecycle

UNET = "unet/diffusion_pytorch_model.safetensors"
PROMPTS = ["a cat", "a dog"]

RECORDED = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir caption_column center_crop
    checkpointing_steps checkpoints_total_limit dataloader_num_workers dataset_config_name dataset_name
    dream_detail_preservation dream_training enable_xformers_memory_efficient_attention foreach_ema
    gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token image_column image_interpolation_mode
    input_perturbation learning_rate local_rank logging_dir lr_scheduler lr_warmup_steps max_grad_norm
    max_train_samples max_train_steps mixed_precision noise_offset non_ema_revision num_train_epochs offload_ema
    output_dir prediction_type pretrained_model_name_or_path push_to_hub random_flip report_to resolution
    resume_from_checkpoint revision scale_lr seed snr_gamma tracker_project_name train_batch_size train_data_dir
    use_8bit_adam use_ema validation_epochs validation_prompts variant
"""  # the command line of the published script
ADDED = [
    "aspect_ratio_buckets", "cache_crops", "cache_encodings", "caption_dropout", "caption_extension",
    "caption_prefix", "caption_suffix", "caption_tag_dropout_rate", "clip_skip", "config", "encodings_dir",
    "keep_tokens", "log_file", "logging_steps", "max_token_length", "metadata_license", "metadata_title",
    "metadata_trigger_phrase", "num_repeats", "pretrained_vae_model_name_or_path", "repeats_from_folders",
    "save_precision", "save_single_file", "shuffle_caption", "skip_bad_samples", "torch_compile",
    "use_aspect_ratio_buckets",
]  # fmt: skip
FLAGS = {
    "adam_beta1": "test_adam_flags",
    "adam_beta2": "test_adam_flags",
    "adam_epsilon": "test_adam_flags",
    "adam_weight_decay": "test_adam_flags",
    "allow_tf32": "test_allow_tf32",
    "aspect_ratio_buckets": "test_contract_buckets.test_named_shapes",
    "cache_crops": "test_contract_encodings.test_crops",
    "cache_dir": "test_cache_dir_holds_models_and_data",
    "cache_encodings": "test_contract_encodings.test_cached_training_is_the_same_training",
    "caption_column": "test_columns_of_other_names_and_lists_of_captions",
    "caption_dropout": "test_caption_dropout",
    "caption_extension": "test_contract_caption_files.test_the_extension_can_be_named",
    "caption_prefix": "test_contract_captions.test_prefix_and_suffix",
    "caption_suffix": "test_contract_captions.test_prefix_and_suffix",
    "caption_tag_dropout_rate": "test_contract_captions.test_tags_are_left_out_at_the_rate_asked_for",
    "center_crop": "test_crops",
    "checkpointing_steps": "test_checkpoints_and_their_limit",
    "checkpoints_total_limit": "test_checkpoints_and_their_limit",
    "clip_skip": "test_contract_captions.test_clip_skip",
    "config": "test_config_repeats_a_run",
    "dataloader_num_workers": "test_workers_load_and_change_nothing",
    "dataset_config_name": "test_data_set_with_two_configurations",
    "dataset_name": "test_data_set_by_hub_name_from_the_cache",
    "dream_detail_preservation": "test_dream",
    "dream_training": "test_dream",
    "enable_xformers_memory_efficient_attention": "test_bad_input.test_flag_whose_package_is_missing",
    "encodings_dir": "test_contract_encodings.test_warm_run_encodes_nothing",
    "foreach_ema": "test_averages_placement_and_fused_sweep",
    "gradient_accumulation_steps": "test_batch_size_and_accumulation",
    "gradient_checkpointing": "test_gradient_checkpointing",
    "hub_model_id": "test_hub.test_refused_upload_is_one_line_and_keeps_the_trained_model",
    "hub_token": "test_hub.test_rejected_token_ends_the_run_in_one_line_before_training",
    "image_column": "test_columns_of_other_names_and_lists_of_captions",
    "image_interpolation_mode": "test_interpolation_modes",
    "input_perturbation": "test_objective_flags",
    "keep_tokens": "test_contract_captions.test_tags_are_shuffled_but_the_first",
    "learning_rate": "test_learning_rate",
    "local_rank": "test_local_rank",
    "log_file": "test_progress.test_log_file",
    "logging_dir": "test_trackers.test_all_tells_tensorboard",
    "logging_steps": "test_logging_steps",
    "lr_scheduler": "test_schedules",
    "lr_warmup_steps": "test_schedules",
    "max_grad_norm": "test_max_grad_norm",
    "max_token_length": "test_contract_captions.test_long_captions_are_read_in_chunks",
    "max_train_samples": "test_max_train_samples",
    "max_train_steps": "test_epochs_and_steps",
    "metadata_license": "test_single_file.test_header_says_what_managers_show",
    "metadata_title": "test_single_file.test_header_says_what_managers_show",
    "metadata_trigger_phrase": "test_single_file.test_header_says_what_managers_show",
    "mixed_precision": "test_bf16_rounds_the_computation_and_nothing_that_is_kept",
    "noise_offset": "test_objective_flags",
    "non_ema_revision": "test_revisions",
    "num_repeats": "test_contract_captions.test_repeats_draw_for_themselves_and_are_encoded_once",
    "num_train_epochs": "test_epochs_and_steps",
    "offload_ema": "test_averages_placement_and_fused_sweep",
    "output_dir": "test_exported_tree",
    "prediction_type": "test_prediction_type_is_trained_drawn_and_exported",
    "pretrained_model_name_or_path": "test_revisions",
    "pretrained_vae_model_name_or_path": "test_single_file.test_other_vae",
    "push_to_hub": "test_hub.test_weights_card_pictures_and_curves_arrive_and_nothing_else",
    "random_flip": "test_flips",
    "repeats_from_folders": "test_contract_caption_files.test_kohya_with_captions",
    "report_to": "test_trackers.test_all_tells_wandb",
    "resolution": "test_resolution",
    "resume_from_checkpoint": "test_resume_by_name_latest_and_path",
    "revision": "test_revisions",
    "save_precision": "test_single_file.test_file_holds_the_exported_model",
    "save_single_file": "test_single_file.test_file_holds_the_exported_model",
    "scale_lr": "test_scale_lr",
    "seed": "test_seed",
    "shuffle_caption": "test_contract_captions.test_tags_are_shuffled_but_the_first",
    "skip_bad_samples": "test_contract_data_faults.test_skipping_trains_on_the_rest_and_lists_the_dropped",
    "snr_gamma": "test_objective_flags",
    "torch_compile": "test_compile.test_compiled_once_and_in_place",
    "tracker_project_name": "test_trackers.test_all_tells_tensorboard",
    "train_batch_size": "test_batch_size_and_accumulation",
    "train_data_dir": "test_folder_of_pictures_and_data_dir",
    "use_aspect_ratio_buckets": "test_contract_buckets.test_resumed_and_cached",
    "use_8bit_adam": "test_bad_input.test_flag_whose_package_is_missing",
    "use_ema": "test_average_is_exported",
    "validation_epochs": "test_validation_cadence",
    "validation_prompts": "test_validation_pictures_and_grid",
    "variant": "test_variant",
}


@pytest.fixture(scope="module")
def script():
    return load_script("sd")


@pytest.fixture(scope="module")
def tokens(model, pictures, tmp_path_factory):
    """tokens(**changes): the command line of a short run; `output_dir` is a new folder unless given."""

    def make(**changes) -> list[str]:
        defaults = {
            "pretrained_model_name_or_path": model, "train_data_dir": pictures,
            "resolution": 32, "train_batch_size": 2, "max_train_steps": 4, "lr_warmup_steps": 0, "seed": 3,
            "report_to": "none", "logging_steps": 1, "learning_rate": 1e-3,
        }  # fmt: skip
        changes.setdefault("output_dir", tmp_path_factory.mktemp("run") / "out")
        return flags(**defaults | changes)

    return make


@pytest.fixture(scope="module")
def run(script, tokens):
    """run(**changes): the output folder of a short run. Equal changes share one: leave it as it is."""
    done = {}

    def make(**changes) -> Path:
        key = repr(sorted(changes.items()))
        if key not in done:
            command = tokens(**changes)
            script.main(command)
            done[key] = Path(command[command.index("--output_dir") + 1])
        return done[key]

    return make


@pytest.fixture
def parse(script, tokens):
    """parse(**changes): the checked arguments of such a run."""
    return lambda **changes: script.parse_args(tokens(**changes))


@pytest.fixture(scope="module")
def base(model):
    """The base pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sampler(script, base, parse):
    """sampler(**changes): a function (epoch, index) -> sample, as loader workers make it for a run with these flags."""

    def make(**changes):
        samples = make_loader(script, parse(**changes), base, [base.vae, base.text_encoder]).dataset
        return lambda epoch, index: samples[epoch, index]

    return make


def make_loader(script, args, pipeline, frozen) -> torch.utils.data.DataLoader:
    """A run's own loader, of which `dataset[epoch, index]` is what its workers make of a visit to a row."""
    accelerator = Accelerator()
    Path(args.output_dir).mkdir(exist_ok=True)
    opened, looked_at = inspection.inspect(args, accelerator, open_dataset(args, args.seed))
    progress = Progress(args, accelerator, opened, looked_at, {}, args.seed)
    reads_pixels = hasattr(args, "use_aspect_ratio_buckets")  # the prior's images are read at CLIP's size alone
    shapes = [buckets.choose(args, looked_at, progress.effective_batch)[0]] if reads_pixels else []
    return script.make_dataloader(args, opened, looked_at, *shapes, pipeline, frozen, pipeline.scheduler, progress)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / UNET)


def frozen(file: Path) -> dict:
    """Tensors of a base's file under the names that an export gives them: CLIP's have two."""
    tensors = load_file(file)
    names = clip_names.old_names(set(tensors))
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def differ(one: dict, other: dict) -> list[str]:
    """Names of the tensors that are not bit for bit the same."""
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder: Path, name: str) -> list:
    return [row[name] for row in rows(folder)]


def optimizer(folder: Path) -> dict:
    return torch.load(folder / "optimizer.bin", weights_only=True)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def draw(pipeline, prompt: str, seed: int, side: int = 32) -> np.ndarray:
    """A pipeline's own image, from noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    options = {"height": side, "width": side, "num_inference_steps": validation.STEPS}
    return np.asarray(pipeline(prompt, generator=generator, **options).images[0])


# ---------------------------------------------------------------------------------------------------------- the table


def test_every_flag_has_its_test(parse):
    recorded = RECORDED.split()
    assert len(recorded) == len(set(recorded)) == 57
    assert set(vars(parse())) == {*recorded, *ADDED, "typed"}
    assert set(FLAGS) == {*recorded, *ADDED}
    for place in FLAGS.values():
        module, _, name = place.rpartition(".")
        assert callable(getattr(importlib.import_module(module or __name__), name))


# --------------------------------------------------------------------------------------------------- what a run leaves


def test_run_leaves_a_loadable_pipeline(run):
    folder = run(checkpointing_steps=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    trained = UNet2DConditionModel.from_pretrained(folder / "checkpoint-4" / "unet")
    assert differ(pipeline.unet.state_dict(), trained.state_dict()) == []
    assert column(folder, "step") == [1, 2, 3, 4]


LEFT = {".inspected_pictures.json", ".lock", "README.md", "metrics.jsonl", "run_config.yaml", "training_curves.png"}


def test_exported_tree(run, tokens, script, tmp_path):
    assert tree(run()) == test_hub.EXPORTED | LEFT
    script.main(tokens(output_dir=tmp_path / "new" / "folder", max_train_steps=1))
    assert tree(tmp_path) == {f"new/folder/{path}" for path in test_hub.EXPORTED | LEFT}


def test_frozen_parts_are_exported_as_they_were(run, model):
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert differ(load_file(run() / part), frozen(model / part)) == []
    assert len(differ(weights(run()), weights(model))) > 0.9 * len(weights(model))


def test_vocabulary_files_stand_beside_the_tokenizer(run, base):
    from transformers import CLIPTokenizer

    folder = run() / "tokenizer"
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    assert json.loads(vocabulary.read_text(encoding="utf-8")) == base.tokenizer.get_vocab()
    assert merges.read_text() == "#version: 0.2\n"
    rebuilt = CLIPTokenizer(vocab=str(vocabulary), merges=str(merges))
    assert rebuilt("a cat").input_ids == base.tokenizer("a cat").input_ids


GUIDE = """
accelerate launch --mixed_precision="fp16"  train_text_to_image.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --dataset_name=$dataset_name \\
  --use_ema \\
  --resolution=32 --center_crop --random_flip \\
  --train_batch_size=1 \\
  --gradient_accumulation_steps=4 \\
  --gradient_checkpointing \\
  --max_train_steps=2 \\
  --learning_rate=1e-05 \\
  --max_grad_norm=1 \\
  --lr_scheduler="constant" --lr_warmup_steps=0 \\
  --output_dir="sd-pokemon-model"
"""


def launch_the_guides_command(model, pictures, folder) -> subprocess.CompletedProcess:
    """In the folder of the script, as the guide says."""
    environment = os.environ | {"MODEL_NAME": str(model), "dataset_name": str(pictures)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", GUIDE], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


# What the launcher starts in the script's place: it writes down what it was started with.
TOLD = """
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open("told.json", "w"))
"""


def test_the_guides_command_from_the_scripts_folder(model, pictures, server, tmp_path):
    (tmp_path / "train_text_to_image.py").write_text(TOLD)
    launch_the_guides_command(model, pictures, tmp_path)
    tokens, environment = json.loads((tmp_path / "told.json").read_text())
    run = server.start(tokens, tmp_path, environment=environment)
    assert run.wait() == 0, run.output()
    check_the_guides_run(tmp_path / "sd-pokemon-model", run.output())


@pytest.mark.slow("28 s, two interpreters: the test above is the same in two halves")
def test_the_guides_command_in_one(model, pictures, tmp_path):
    shutil.copy(TORCH["sd"].path, tmp_path)
    done = launch_the_guides_command(model, pictures, tmp_path)
    check_the_guides_run(tmp_path / "sd-pokemon-model", done.stderr)


def check_the_guides_run(folder, said: str) -> None:
    assert "fp16 needs a GPU: training in fp32" in said
    assert tree(folder) >= test_hub.EXPORTED | LEFT
    assert [row["step"] for row in rows(folder)] == [2]  # logged every ten updates, and after the last
    assert differ(StableDiffusionPipeline.from_pretrained(folder).unet.state_dict(), weights(folder)) == []


# ---------------------------------------------------------------------------------------------------- models from a hub


@pytest.fixture(scope="module")
def hub_cache(model, tmp_path_factory):
    """A hub cache that holds two revisions of tiny/sd: `main` is the model, `other` a different one."""
    cache = tmp_path_factory.mktemp("hub")
    other = tiny.make_stable_diffusion(tmp_path_factory.mktemp("models") / "sd", seed=1)
    repository = cache / "models--tiny--sd"
    (repository / "refs").mkdir(parents=True)
    for name, commit, folder in (("main", "a" * 40, model), ("other", "b" * 40, other)):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    return cache, weights(model), weights(other)


def test_revisions(script, parse, hub_cache):
    cache, main, other = hub_cache

    def load(**changes):
        args = parse(pretrained_model_name_or_path="tiny/sd", cache_dir=cache, **changes)
        pipeline, unet, _ = script.load_models(args, Accelerator())
        return pipeline.unet.state_dict(), unet.state_dict()

    for unet in load():
        assert differ(unet, main) == []
    for revision in ("other", "b" * 40):
        for unet in load(revision=revision):
            assert differ(unet, other) == []
    average, trained = load(use_ema=True, non_ema_revision="other")
    assert differ(average, main) == []
    assert differ(trained, other) == []


def test_run_trains_the_revision_that_was_asked_for(run, hub_cache):
    cache, _, other = hub_cache
    where = {"pretrained_model_name_or_path": "tiny/sd", "cache_dir": cache, "max_train_steps": 1}
    folder = run(**where, revision="other", learning_rate=0, adam_weight_decay=0)
    assert differ(weights(folder), other) == []
    settings = {"learning_rate": 0, "adam_weight_decay": 0, "checkpointing_steps": 1}
    folder = run(**where, **settings, use_ema=True, non_ema_revision="other")
    assert differ(weights(folder / "checkpoint-1"), other) == []


def test_cache_dir_holds_models_and_data(run, script, parse, hub_cache, pictures, tmp_path):
    """Data that `datasets` reads, that is; a folder with metadata needs no second copy."""
    (tmp_path / "set").mkdir()
    stored = {"image": [(pictures / f"{i}.png").read_bytes() for i in range(2)], "text": ["a", "b"]}
    datasets.Dataset.from_dict(stored).to_parquet(tmp_path / "set" / "train.parquet")
    run(cache_dir=tmp_path / "cache", max_train_steps=1, train_data_dir=tmp_path / "set")
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    args = parse(pretrained_model_name_or_path="tiny/sd", cache_dir=tmp_path / "cache")
    with pytest.raises(SystemExit, match="--pretrained_model_name_or_path tiny/sd"):  # it is in the other cache
        script.load_models(args, Accelerator())


def test_variant(script, parse, base, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    halved = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16)
    halved.unet.conv_in.weight.data.fill_(0.25)
    halved.save_pretrained(folder, variant="fp16")
    for variant, first in (("fp16", 0.25), (None, float(base.unet.conv_in.weight.detach().flatten()[0]))):
        args = parse(pretrained_model_name_or_path=folder, variant=variant)
        pipeline, unet, _ = script.load_models(args, Accelerator())
        assert float(unet.conv_in.weight.detach().flatten()[0]) == first
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
        assert pipeline.vae.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------- data


def read_captions(args) -> list:
    return open_dataset(args, args.seed)[args.caption_column]


def test_folder_of_pictures_and_data_dir(parse, run, tmp_path):
    whole = tmp_path / "whole"
    for name, count in (("day", 2), ("night", 3)):
        tiny.make_pictures(whole / name, count)
    assert len(read_captions(parse(train_data_dir=whole))) == 5
    assert len(read_captions(parse(train_data_dir=whole / "night"))) == 3
    assert len(read_captions(parse(dataset_name=whole, train_data_dir="day"))) == 2
    assert column(run(train_data_dir=whole / "day"), "epoch") == [1.0, 2.0, 3.0, 4.0]


def test_data_set_with_two_configurations(parse, tmp_path):
    configurations = []
    for name, count in (("day", 2), ("night", 3)):
        tiny.make_pictures(tmp_path / name, count)
        configurations.append({"config_name": name, "data_files": f"{name}/**"})
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configurations})}---\n")
    for name, count in (("day", 2), ("night", 3)):
        args = parse(train_data_dir=None, dataset_name=tmp_path, dataset_config_name=name)
        assert read_captions(args) == [f"image {i}" for i in range(count)]


def test_data_set_by_hub_name_from_the_cache(parse, pictures, run, tmp_path):
    """What an earlier run has downloaded is found without a connection."""
    datasets.load_dataset("imagefolder", data_files={"train": f"{pictures}/**"}, cache_dir=str(tmp_path / "made"))
    (made,) = (info.parent for info in (tmp_path / "made").rglob("dataset_info.json"))
    cached = shutil.copytree(made, tmp_path / "cache" / "artist___emoji" / "default" / "0.0.0" / ("c" * 40))
    (cached / "imagefolder-train.arrow").rename(cached / "emoji-train.arrow")
    folder = run(train_data_dir=None, dataset_name="artist/emoji", cache_dir=tmp_path / "cache")
    assert differ(weights(folder), weights(run())) == []
    assert "datasets:\n- artist/emoji\n" in (folder / "README.md").read_text()


def test_columns_of_other_names_and_lists_of_captions(run, sampler, base, pictures, tmp_path):
    photos = [{"bytes": (pictures / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
    words = [[f"one {i}", f"two {i}"] for i in range(3)]
    features = {"photo": datasets.Image(), "words": datasets.Sequence(datasets.Value("string"))}
    table = datasets.Dataset.from_dict({"photo": photos, "words": words}, features=datasets.Features(features))
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    own = {"train_data_dir": None, "dataset_name": tmp_path / "set", "image_column": "photo", "caption_column": "words"}
    sample = sampler(**own, center_crop=True)
    drawn = {base.tokenizer.decode(sample(epoch, 1)["input_ids"][0], skip_special_tokens=True) for epoch in range(20)}
    assert {text.replace(" ", "") for text in drawn} == {"one1", "two1"}
    wanted = picture(pictures / "1.png")[:, 4:36].transpose(2, 0, 1)
    assert np.array_equal(sample(0, 1)["pixels"].numpy(), wanted)
    assert column(run(**own), "step") == [1, 2, 3, 4]


def test_max_train_samples(run, parse):
    assert column(run(max_train_samples=2), "epoch") == [1.0, 2.0, 3.0, 4.0]
    chosen = {tuple(read_captions(parse(max_train_samples=2, seed=seed))) for seed in range(8)}
    assert {len(set(texts)) for texts in chosen} == {2}
    assert len(chosen) > 3
    assert read_captions(parse(max_train_samples=2, seed=1)) == read_captions(parse(max_train_samples=2, seed=1))


def test_workers_load_and_change_nothing(script, base, run, parse):
    assert differ(weights(run(dataloader_num_workers=2)), weights(run())) == []
    for workers in (0, 2):
        args = parse(dataloader_num_workers=workers)
        loader = make_loader(script, args, base, [base.vae, base.text_encoder])
        assert loader.num_workers == workers


SAMPLE = {"pixels", "input_ids", "posterior_noise", "noise", "timesteps", "index"}


def test_what_is_drawn_for_a_sample(sampler):
    """By name and number, literally; what a flag adds is there only with the flag, and shifts nothing."""
    plain, everything = sampler()(2, 5), sampler(noise_offset=0.1, input_perturbation=0.1)(2, 5)
    assert set(plain) == SAMPLE
    assert set(everything) == {*SAMPLE, "noise_offset", "input_perturbation"}
    assert int(plain["index"]) == 5
    assert int(plain["timesteps"]) == draws.generator(3, 2, 5, "timestep").integers(1000)
    wanted = {
        "posterior_noise": ("posterior", (4, 16, 16)), "noise": ("noise", (4, 16, 16)),
        "noise_offset": ("noise_offset", (4, 1, 1)), "input_perturbation": ("input_perturbation", (4, 16, 16)),
    }  # fmt: skip
    for name, (stream, shape) in wanted.items():
        assert torch.equal(everything[name], draws.normal(draws.generator(3, 2, 5, stream), shape))
    assert all(torch.equal(plain[name], everything[name]) for name in SAMPLE)


def test_picture_and_caption_are_read_each_by_itself(script, base, pictures):
    """By the two functions that cached encodings stand between: nothing of theirs depends on the rest of a sample."""
    whole = picture(pictures / "2.png").transpose(2, 0, 1)
    for source in (str(pictures / "2.png"), (pictures / "2.png").read_bytes()):
        read = script.read_image(source, (32, 32), None, False, "lanczos")
        assert set(read) == {"pixels"}
        assert np.array_equal(read["pixels"].numpy(), whole[:, :, 4:36])
        assert np.array_equal(
            script.read_image(source, (32, 32), None, True, "lanczos")["pixels"].numpy(), whole[:, :, 35:3:-1]
        )
    left = int(draws.generator(7, 0, 1, "crop").integers(9))
    assert left != 4
    read = script.read_image(source, (32, 32), draws.generator(7, 0, 1, "crop"), False, "lanczos")
    assert np.array_equal(read["pixels"].numpy(), whole[:, :, left : left + 32])
    assert set(script.read_caption("a cat", base.tokenizer, 1)) == {"input_ids"}
    wanted = base.tokenizer("a cat", max_length=16, padding="max_length", return_tensors="pt").input_ids[0]
    assert torch.equal(script.read_caption("a cat", base.tokenizer, 1)["input_ids"][0], wanted)


def test_encodings_of_pictures_and_captions(script, sampler, base):
    """Posterior moments times the VAE's factor, and text states: each from its own half of the batch alone."""
    sample = sampler(center_crop=True)
    batch = torch.utils.data.default_collate([sample(0, index) for index in range(4)])
    with torch.no_grad():
        posterior = base.vae.encode(batch["pixels"] / 127.5 - 1).latent_dist
        states = base.text_encoder(batch["input_ids"][:, 0]).last_hidden_state
        pictures = script.encode_images({"pixels": batch["pixels"]}, base.vae)
        text = script.encode_captions({"input_ids": batch["input_ids"]}, base.text_encoder)
    assert base.vae.config.scaling_factor == 0.18215
    torch.testing.assert_close(pictures["latents_mean"], posterior.mean * 0.18215)
    torch.testing.assert_close(pictures["latents_std"], posterior.std * 0.18215)
    torch.testing.assert_close(text["text_states"], states)
    both = script.encode(batch, base.vae, base.text_encoder)
    assert set(both) == {"latents_mean", "latents_std", "text_states"}
    assert all(torch.equal(both[name], (pictures | text)[name]) for name in both)
    assert not any(tensor.requires_grad for tensor in both.values())


# ------------------------------------------------------------------------------------------------------------ images


def test_resolution(run, sampler):
    for resolution in (16, 64):
        sample = sampler(resolution=resolution)(0, 0)
        assert sample["pixels"].shape == (3, resolution, resolution)
        assert sample["noise"].shape == (4, resolution // 2, resolution // 2)
    folder = run(resolution=48, max_train_steps=1, validation_prompts=["a cat"])
    assert picture(folder / "validation/step-000001/00.png").shape == (48, 48, 3)


def test_crops(pictures, sampler):
    """The images are 40 x 32, so at resolution 32 nothing is resized and a crop is one of nine columns."""
    whole = picture(pictures / "2.png").transpose(2, 0, 1)
    columns = []
    for center in (False, True):
        sample = sampler(center_crop=center)
        pixels = [sample(epoch, 2)["pixels"].numpy() for epoch in range(40)]
        columns.append([next(x for x in range(9) if np.array_equal(p, whole[:, :, x : x + 32])) for p in pixels])
    assert set(columns[0]) > {0, 8}
    assert len(set(columns[0])) > 6
    assert set(columns[1]) == {4}


def test_flips(pictures, sampler):
    straight = picture(pictures / "2.png")[:, 4:36].transpose(2, 0, 1)
    for flip, wanted in ((False, {False}), (True, {False, True})):
        sample = sampler(center_crop=True, random_flip=flip)
        mirrored = []
        for epoch in range(20):
            pixels = sample(epoch, 2)["pixels"].numpy()
            mirrored.append(np.array_equal(pixels, straight[:, :, ::-1]))
            assert mirrored[-1] or np.array_equal(pixels, straight)
        assert set(mirrored) == wanted


MODES = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
}


def test_interpolation_modes(pictures, sampler):
    results = set()
    for mode, resampling in MODES.items():
        pixels = sampler(image_interpolation_mode=mode, resolution=16, center_crop=True)(0, 0)["pixels"]
        with Image.open(pictures / "0.png") as image:
            wanted = image.convert("RGB").resize((20, 16), resampling).crop((2, 0, 18, 16))
        off = 1 if mode in ("bicubic", "bilinear", "lanczos") else 0  # in torch's filters; see test_images.py
        assert np.allclose(pixels.permute(1, 2, 0).int(), np.asarray(wanted, dtype=int), rtol=0, atol=off), mode
        results.add(pixels.numpy().tobytes())
    assert len(results) == 6
    assert torch.equal(sampler(resolution=16)(0, 0)["pixels"], sampler(resolution=16)(0, 0)["pixels"])


def test_mirror_and_crop_do_not_shift_other_draws(sampler):
    plain, flipped = sampler()(0, 3), sampler(random_flip=True, center_crop=True, noise_offset=0.1)(0, 3)
    for name in ("noise", "timesteps", "posterior_noise", "input_ids"):
        assert torch.equal(plain[name], flipped[name])


def test_caption_dropout(sampler, base):
    empty = captions.tokenize(base.tokenizer, "")[None]
    dropped = [torch.equal(sampler(caption_dropout=0.5)(epoch, 0)["input_ids"], empty) for epoch in range(40)]
    assert 8 < sum(dropped) < 32
    assert not any(torch.equal(sampler()(epoch, 0)["input_ids"], empty) for epoch in range(40))


# ----------------------------------------------------------------------------------------------------------- objective


@pytest.fixture
def objective(script, parse, sampler):
    """objective(**changes): (loss of one batch under these flags, the batch, UNet, alpha_bar at its timesteps)."""

    def make(**changes):
        args = parse(**changes)
        pipeline, unet, scheduler = script.load_models(args, Accelerator())
        sample = sampler(**changes)
        batch = torch.utils.data.default_collate([sample(0, index) for index in range(4)])
        batch |= script.encode(batch, pipeline.vae, pipeline.text_encoder)
        alpha_bar = pipeline.scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
        return script.compute_loss(unet, batch, scheduler, args).detach(), batch, unet, alpha_bar

    return make


def parts(batch):
    return batch["latents_mean"] + batch["latents_std"] * batch["posterior_noise"], batch["noise"]


def error(unet, batch, noisy, target):
    """(B,) mean squared error of the network's prediction."""
    with torch.no_grad():
        prediction = unet(noisy, batch["timesteps"], batch["text_states"]).sample
    return (prediction - target).square().mean((1, 2, 3))


def test_objective_flags(objective, run):
    plain, batch, unet, alpha_bar = objective()
    latents, noise = parts(batch)

    def noised(by):
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * by

    def hand(noisy, target):
        return float(error(unet, batch, noisy, target).mean())

    assert float(plain) == pytest.approx(hand(noised(noise), noise), rel=1e-5)

    loss, offset_batch, _, _ = objective(noise_offset=0.3)
    shifted = noise + 0.3 * offset_batch["noise_offset"]
    assert offset_batch["noise_offset"].shape == (4, 4, 1, 1)
    assert float(loss) == pytest.approx(hand(noised(shifted), shifted), rel=1e-5)

    loss, perturbed, _, _ = objective(input_perturbation=0.3)
    assert float(loss) == pytest.approx(hand(noised(noise + 0.3 * perturbed["input_perturbation"]), noise), rel=1e-5)

    loss, _, _, _ = objective(snr_gamma=0.5)
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    weight = torch.minimum(snr, torch.tensor(0.5)) / snr
    assert float(loss) == pytest.approx(float((weight * error(unet, batch, noised(noise), noise)).mean()), rel=1e-4)
    assert float(weight.min()) < 1

    plainly_trained = weights(run())
    for changes in ({"noise_offset": 0.3}, {"input_perturbation": 0.3}, {"snr_gamma": 0.5}, {"dream_training": True}):
        assert float(objective(**changes)[0]) != pytest.approx(float(plain), rel=1e-3)
        assert differ(weights(run(**changes)), plainly_trained)


def test_dream(objective):
    losses = []
    for p in (1.0, 3.0):
        loss, batch, unet, alpha_bar = objective(dream_training=True, dream_detail_preservation=p)
        latents, noise = parts(batch)
        sigma = (1 - alpha_bar).sqrt()
        noisy = alpha_bar.sqrt() * latents + sigma * noise
        with torch.no_grad():
            first = unet(noisy, batch["timesteps"], batch["text_states"]).sample
        added = sigma**p * (noise - first)
        wanted = error(unet, batch, noisy + sigma * added, noise + added).mean()
        assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
        losses.append(float(loss))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_prediction_type_is_trained_drawn_and_exported(objective, run, base, model, v_model):
    for changes in ({"prediction_type": "v_prediction"}, {"pretrained_model_name_or_path": v_model}):
        loss, batch, unet, alpha_bar = objective(**changes)
        latents, noise = parts(batch)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
        assert float(loss) == pytest.approx(float(error(unet, batch, noisy, velocity).mean()), rel=1e-5)
    folder = run(prediction_type="v_prediction", validation_prompts=["a cat"])
    assert StableDiffusionPipeline.from_pretrained(folder).scheduler.config.prediction_type == "v_prediction"
    assert json.loads((model / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"
    scheduler = type(base.scheduler).from_config(base.scheduler.config, prediction_type="v_prediction")
    pipeline = StableDiffusionPipeline(**base.components | {"scheduler": scheduler}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    drawn = picture(folder / "validation/step-000000/00.png")
    assert np.array_equal(drawn, draw(pipeline, "a cat", 3))
    assert not np.array_equal(drawn, draw(base, "a cat", 3))
    exported = StableDiffusionPipeline.from_pretrained(run(pretrained_model_name_or_path=v_model))
    assert exported.scheduler.config.prediction_type == "v_prediction"


def test_gradient_checkpointing(script, parse, run):
    for wanted in (False, True):
        _, unet, _ = script.load_models(parse(gradient_checkpointing=wanted), Accelerator())
        assert unet.is_gradient_checkpointing is wanted
        assert unet.training
    assert column(run(gradient_checkpointing=True), "loss") == pytest.approx(column(run(), "loss"), rel=1e-6)


# ----------------------------------------------------------------------------------------------- batches, steps, seeds


def test_batch_size_and_accumulation(run):
    assert column(run(), "epoch") == [0.3333, 0.6667, 1.0, 1.3333]
    assert column(run(train_batch_size=3), "epoch") == [0.5, 1.0, 1.5, 2.0]
    whole, split = run(train_batch_size=4), run(train_batch_size=2, gradient_accumulation_steps=2)
    assert column(split, "epoch") == column(whole, "epoch") == [0.6667, 1.3333, 2.0, 2.6667]
    assert column(split, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)
    assert column(split, "grad_norm") == pytest.approx(column(whole, "grad_norm"), rel=1e-3)


def test_epochs_and_steps(run):
    """Six images in batches of four: an epoch is one and a half updates."""
    assert column(run(train_batch_size=4, num_train_epochs=1, max_train_steps=None), "step") == [1, 2]
    assert column(run(train_batch_size=4, num_train_epochs=2, max_train_steps=None), "step") == [1, 2, 3]
    assert column(run(train_batch_size=4, num_train_epochs=2, max_train_steps=1), "step") == [1]


def test_seed(run):
    assert differ(weights(run(output_dir=run().parent / "again")), weights(run())) == []
    assert column(run(seed=4), "loss") != pytest.approx(column(run(), "loss"), rel=1e-3)
    unset = run(seed=None)
    drawn = yaml.safe_load((unset / "run_config.yaml").read_text())["seed"]
    assert 0 <= drawn < 2**31
    assert differ(weights(run(seed=drawn)), weights(unset)) == []


def test_logging_steps(run):
    folder = run(logging_steps=3)
    assert column(folder, "step") == [3, 4]
    losses = column(run(), "loss")
    assert column(folder, "loss") == pytest.approx([sum(losses[:3]) / 3, losses[3]], rel=1e-6)


def test_config_repeats_a_run(run, script, tmp_path):
    first = run(random_flip=True, validation_prompts=PROMPTS, noise_offset=0.1)
    script.main(["--config", str(first / "run_config.yaml"), "--output_dir", str(tmp_path / "out")])
    assert differ(weights(tmp_path / "out"), weights(first)) == []
    assert tree(tmp_path / "out") == tree(first)


def test_local_rank(parse, monkeypatch, sd_flags, server, tmp_path):
    """What legacy launchers pass as a flag, today's libraries read from the environment, which has the last word."""
    PartialState()  # this process is a single one, whatever the environment says from here on
    monkeypatch.setenv("LOCAL_RANK", "5")
    lifecycle.start(parse(local_rank=1))
    assert os.environ["LOCAL_RANK"] == "5"
    monkeypatch.delenv("LOCAL_RANK")
    lifecycle.start(parse())
    assert "LOCAL_RANK" not in os.environ
    lifecycle.start(parse(local_rank=0))
    assert "LOCAL_RANK" not in os.environ  # one process, and no launcher
    launcher = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = server.start(sd_flags(local_rank=0, max_train_steps=1), tmp_path, environment=launcher)
    assert run.wait() == 0, run.output()  # which without LOCAL_RANK ends in an error of torch.distributed


def test_allow_tf32(parse):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        lifecycle.start(parse())
        assert torch.get_float32_matmul_precision() == "highest"
        lifecycle.start(parse(allow_tf32=True))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------------------------------------- precision


def test_bf16_rounds_the_computation_and_nothing_that_is_kept(run, model):
    folder = run(mixed_precision="bf16", checkpointing_steps=4)
    for file in (folder, folder / "checkpoint-4"):
        trained = weights(file)
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert differ(load_file(folder / part), frozen(model / part)) == []
    assert column(folder, "loss") == pytest.approx(column(run(), "loss"), rel=0.02)
    assert column(folder, "loss") != pytest.approx(column(run(), "loss"), rel=1e-6)


def test_precision_of_the_launcher_holds_unless_the_flag_says_otherwise(run, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    inherited = run(output_dir=tmp_path / "inherited")
    overruled = run(output_dir=tmp_path / "overruled", mixed_precision="no")
    monkeypatch.undo()
    assert differ(weights(inherited), weights(run(mixed_precision="bf16", checkpointing_steps=4))) == []
    assert differ(weights(overruled), weights(run())) == []


def test_fp16_without_a_gpu_trains_in_fp32_and_says_so(run):
    with pytest.warns(UserWarning, match="fp16 needs a GPU: training in fp32"):
        folder = run(mixed_precision="fp16")
    assert differ(weights(folder), weights(run())) == []


# ----------------------------------------------------------------------------------------------------------- optimizer


def test_learning_rate(run, model):
    """AdamW's first step moves a weight by the rate, wherever the gradient is far above epsilon."""
    before = weights(model)
    for rate in (1e-3, 2.5e-4):
        folder = run(learning_rate=rate, adam_weight_decay=0, max_train_steps=1)
        after = weights(folder)
        moved = max(float((after[name] - before[name]).abs().max()) for name in before)
        assert moved == pytest.approx(rate, rel=1e-2)
        assert column(folder, "lr") == [rate]


def test_scale_lr(run):
    sizes = {"train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 1}
    assert column(run(**sizes), "lr") == [1e-3]
    assert column(run(**sizes, scale_lr=True), "lr") == pytest.approx([6e-3])


def test_adam_flags(run, model):
    """The state after one update, and the update itself, by AdamW's formulas."""
    chosen = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.5, "adam_epsilon": 0.01}
    folder = run(**chosen, max_train_steps=1, checkpointing_steps=1)
    saved = optimizer(folder / "checkpoint-1")
    group = saved["param_groups"][0]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.9), 0.5, 0.01)
    before, after = weights(model), weights(folder)
    names = [name for name, _ in UNet2DConditionModel.from_pretrained(model / "unet").named_parameters()]
    for i, name in enumerate(names):
        gradient = saved["state"][i]["exp_avg"] / 0.2
        assert torch.allclose(saved["state"][i]["exp_avg_sq"], 0.1 * gradient.square(), rtol=1e-4, atol=1e-12)
        wanted = before[name] * (1 - 1e-3 * 0.5) - 1e-3 * gradient / (gradient.abs() + 0.01)
        assert torch.allclose(after[name], wanted, rtol=1e-5, atol=1e-7)


def test_max_grad_norm(run):
    """Adam's first moment after one update is a tenth of the clipped gradient; the norm logged is the one before."""
    norms = []
    for limit in (0.25, 100.0):
        folder = run(max_grad_norm=limit, max_train_steps=1, checkpointing_steps=1)
        moments = [state["exp_avg"] for state in optimizer(folder / "checkpoint-1")["state"].values()]
        norms.append(float(torch.stack([moment.norm() for moment in moments]).norm()) / 0.1)
        assert column(folder, "grad_norm") == column(run(), "grad_norm")[:1]
    assert norms == pytest.approx([0.25, column(run(), "grad_norm")[0]], rel=1e-3)


SCHEDULES = {  # factors of the rate over six updates, two of them warm-up; all names are in test_lifecycle.py
    "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
    "piecewise_constant:1:2,0.1:4,0.01": [1, 1, 0.1, 0.1, 0.01, 0.01],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(run, name):
    warm_up = 2 if SCHEDULES[name][0] == 0 else 0
    folder = run(lr_scheduler=name, lr_warmup_steps=warm_up, max_train_steps=6, gradient_accumulation_steps=2)
    assert column(folder, "lr") == pytest.approx([1e-3 * factor for factor in SCHEDULES[name]], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- average


def test_average_is_exported(run, model):
    """By hand: diffusers' EMAModel, stepped over the weights that every update left."""
    from diffusers.training_utils import EMAModel

    folder = run(use_ema=True, checkpointing_steps=1, validation_prompts=["a cat"])
    names = list(dict(UNet2DConditionModel.from_pretrained(model / "unet").named_parameters()))
    average = EMAModel([weights(model)[name] for name in names])
    for step in (1, 2, 3, 4):
        saved = weights(folder / f"checkpoint-{step}")
        average.step([torch.nn.Parameter(saved[name]) for name in names])
        stored = load_file(folder / f"checkpoint-{step}" / "unet_ema" / "diffusion_pytorch_model.safetensors")
        assert differ(stored, dict(zip(names, average.shadow_params, strict=True))) == []
    assert differ(weights(folder), stored) == []
    assert differ(weights(folder), saved)
    assert differ(saved, weights(run())) == []  # the weights that are trained do not depend on it
    exported = StableDiffusionPipeline.from_pretrained(folder)
    exported.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(folder / "validation/step-000004/00.png"), draw(exported, "a cat", 3))


def test_averages_placement_and_fused_sweep(run, parse, base):
    exported = weights(run(use_ema=True))
    for flag in ("offload_ema", "foreach_ema"):
        other = weights(run(use_ema=True, **{flag: True}))
        assert all(torch.allclose(other[name], exported[name], rtol=1e-5, atol=1e-7) for name in exported)

    def device_and_sweep(**changes):  # a device that is not the host, and needs no hardware
        average = ema.make_ema(copy.deepcopy(base.unet).to("meta"), base.unet, **changes)
        return {str(tensor.device) for tensor in average.shadow_params}, average.foreach

    assert device_and_sweep() == ({"meta"}, True)
    assert device_and_sweep(offload=True) == ({"cpu"}, True)
    assert [ema.make_ema(base.unet, foreach=wanted).foreach for wanted in (False, True)] == [False, True]


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_and_their_limit(run):
    def names(folder):
        return sorted(path.name for path in folder.glob("checkpoint-*"))

    assert names(run()) == []
    assert names(run(checkpointing_steps=1)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert names(run(checkpointing_steps=3)) == ["checkpoint-3"]
    assert names(run(checkpointing_steps=1, checkpoints_total_limit=2)) == ["checkpoint-3", "checkpoint-4"]


def test_resume_by_name_latest_and_path(run, tmp_path):
    whole = run(checkpointing_steps=1)
    for wanted, kept in (("checkpoint-2", 2), ("latest", 3)):
        folder = shutil.copytree(whole, tmp_path / wanted)
        if wanted == "latest":
            shutil.rmtree(folder / "checkpoint-4")
        (folder / UNET).unlink()
        log = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        run(checkpointing_steps=9, output_dir=folder, resume_from_checkpoint=wanted)
        again = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert [json.loads(line)["step"] for line in again] == [1, 2, 3, 4]
        assert again[:kept] == log[:kept]
        assert again[kept:] != log[kept:]  # written anew: their images per second are others
        assert differ(weights(folder), weights(whole)) == []
    elsewhere = run(resume_from_checkpoint=whole / "checkpoint-2")
    assert column(elsewhere, "step") == [3, 4]
    assert differ(weights(elsewhere), weights(whole)) == []


# ---------------------------------------------------------------------------------------------------------- validation


def drawn_at(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "validation").glob("step-*.png"))


def test_validation_cadence(run):
    """Epochs of three updates; and always before the first and after the last."""
    every = run(max_train_steps=8, validation_prompts=["a cat"], validation_epochs=1)
    assert drawn_at(every) == [f"step-00000{step}.png" for step in (0, 3, 6, 8)]
    second = run(max_train_steps=8, validation_prompts=["a cat"], validation_epochs=2)
    assert drawn_at(second) == [f"step-00000{step}.png" for step in (0, 6, 8)]
    assert not (run() / "validation").exists()
    assert differ(weights(every), weights(run(max_train_steps=8))) == []


def test_validation_pictures_and_grid(run, base):
    """The first row is the untouched base model, drawn by its own pipeline; the last the pipeline that is exported."""
    folder = run(validation_prompts=PROMPTS)
    exported = StableDiffusionPipeline.from_pretrained(folder)
    exported.set_progress_bar_config(disable=True)
    grid = Image.open(folder / "validation" / "step-000004.png")
    assert grid.size == (110 + 2 * 166, 27 + 2 * 166)
    for row, (step, pipeline) in enumerate([(0, base), (4, exported)]):
        for i, prompt in enumerate(PROMPTS):
            wanted = draw(pipeline, prompt, 3 + i)
            assert np.array_equal(picture(folder / f"validation/step-00000{step}/0{i}.png"), wanted)
            x, y = 110 + 166 * i, 27 + 166 * row
            cell = grid.crop((x, y, x + 160, y + 160)).resize((32, 32), Image.Resampling.NEAREST)
            assert np.array_equal(np.asarray(cell), wanted)
    first = Image.open(folder / "validation" / "step-000000.png")
    assert first.size == (110 + 2 * 166, 27 + 166)
    # labels stand left of each row
    assert np.asarray(ImageOps.grayscale(grid.crop((0, 90, 110, 130)))).min() < 100
    assert np.asarray(ImageOps.grayscale(grid.crop((0, 256, 110, 296)))).min() < 100
    card = (folder / "README.md").read_text()
    assert "(validation/step-000004.png)" in card
    assert "- `a cat`\n- `a dog`\n" in card
