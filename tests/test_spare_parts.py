"""What training does not use of a Stable Diffusion is not loaded: the export of a full run has the base's files."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import load_quick_flax_script, load_script
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from runs import after_update
from safetensors.torch import load_file

from t2i_training.model import spare_parts

CHECKER, EXTRACTOR = "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"


@pytest.fixture
def base(guarded_model, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(guarded_model, tmp_path / "base")


@pytest.fixture
def not_loaded(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(StableDiffusionSafetyChecker, "__init__", refuse)
    yield
    monkeypatch.undo()


def index(folder) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def hash_of(tensor) -> bytes:
    return tensor.numpy().tobytes()


def train(command, script, base, folder, **changes):
    load_script(script).main(
        command(script, pretrained_model_name_or_path=base, output_dir=folder, max_train_steps=1, **changes)
    )
    return folder


def suspects(folder) -> bool:
    """Whether the pipeline that lies there has a safety checker, and it blackens an image."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline("a cat", num_inference_steps=1, height=32, width=32)
    assert bool(found.nsfw_content_detected) is (pipeline.safety_checker is not None)
    return np.asarray(found.images[0]).max() == 0


def test_a_full_run_carries_them_over(command, base, not_loaded, tmp_path, monkeypatch):
    folder = train(command, "sd", base, tmp_path / "out", validation_prompts=["a cat"])
    monkeypatch.undo()
    ours, theirs = (sorted(map(hash_of, load_file(run / CHECKER).values())) for run in (folder, base))
    assert ours == theirs, "under the names that older libraries know, which others look at"
    assert (folder / EXTRACTOR).read_bytes() == (base / EXTRACTOR).read_bytes()
    assert index(folder) | {"_name_or_path": 0} == index(base) | {"_name_or_path": 0}
    assert suspects(folder)
    assert np.asarray(Image.open(folder / "validation/step-000001/00.png")).max() > 0, "validation is not its to judge"


def test_a_run_in_flax_carries_them_over(command, base, not_loaded, tmp_path, monkeypatch):
    pytest.importorskip("flax")
    load_quick_flax_script(monkeypatch)
    folder = train(command, "sd_flax", base, tmp_path / "out")
    monkeypatch.undo()
    assert suspects(folder)


def test_adapters_need_none_of_them(command, base, not_loaded, tmp_path):
    for file in (*base.glob("safety_checker/*"), *base.glob("feature_extractor/*")):
        file.write_bytes(b"damaged")
    train(command, "sd_lora", base, tmp_path / "out", validation_prompt="a cat", num_validation_images=1)


@pytest.mark.parametrize("script", ["sd", "sd_lora"])
def test_a_base_without_the_folders_that_it_names(script, command, base, tmp_path, caplog):
    """People delete them, to save space."""
    shutil.rmtree(base / "safety_checker")
    shutil.rmtree(base / "feature_extractor")
    folder = train(command, script, base, tmp_path / "out")
    said = [message for message in caplog.messages if "left out of the export" in message]
    assert said == ([] if script == "sd_lora" else [
        f"the base's feature_extractor is left out of the export: {base}/feature_extractor is not there",
        "the base's safety_checker is left out of the export: its feature_extractor is not there",
    ])  # fmt: skip
    assert script == "sd_lora" or not suspects(folder)


def test_a_base_that_is_gone_when_the_run_ends(command, base, tmp_path, caplog):
    with after_update(1, lambda: shutil.rmtree(base)):
        folder = train(command, "sd", base, tmp_path / "out")
    assert f"{base} cannot be read any more (" in caplog.text
    assert not suspects(folder)


def as_bin(base):
    torch.save(load_file(base / CHECKER), base / "safety_checker/pytorch_model.bin")
    (base / CHECKER).unlink()


def as_variant(base):
    (base / CHECKER).rename(base / "safety_checker/model.fp16.safetensors")


def under_old_names(base):
    """As the first repositories have it."""
    names = {"feature_extractor": ["transformers", "CLIPFeatureExtractor"], "image_encoder": [None, None]}
    (base / "model_index.json").write_text(json.dumps(index(base) | names))


def under_flax_names(base):
    names = {"safety_checker": ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]}
    (base / "model_index.json").write_text(json.dumps(index(base) | names))


def beside_other_files(base):
    (base / "safety_checker/README.md").write_text("x")
    (base / "safety_checker/pytorch_model.bin").write_bytes(b"x")
    (base / "safety_checker/model.non_ema.safetensors").write_bytes(b"x")


@pytest.fixture
def exported(model, tmp_path):
    """A pipeline that has none of them."""
    return shutil.copytree(model, tmp_path / "out")


@pytest.mark.parametrize("change", [as_bin, as_variant, under_old_names, under_flax_names, beside_other_files])
def test_forms_in_which_they_come(change, base, exported):
    wanted = load_file(base / CHECKER)
    change(base)
    spare_parts.carry_over(base, "fp16", exported)
    assert sorted(path.name for path in (exported / "safety_checker").iterdir()) == ["config.json", "model.safetensors"]
    found = load_file(exported / CHECKER)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert index(exported)["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert suspects(exported)


def cut(file, size: int = -100):
    file.write_bytes(file.read_bytes()[:size])


DAMAGES = {  # what is done to the base -> what is said
    "weights cut short": (lambda base: cut(base / CHECKER), "{base}/safety_checker cannot be read (SafetensorError: "),
    "a .bin cut short": (
        lambda base: (as_bin(base), cut(base / "safety_checker/pytorch_model.bin")),
        " cannot be read (",
    ),
    "a pointer": (
        lambda base: (base / CHECKER).write_text("version https://git-lfs"),
        " cannot be read (SafetensorError: ",
    ),
    "no weights": (lambda base: (base / CHECKER).unlink(), "{base}/safety_checker has no weights that are read here"),
    "an empty folder": (lambda base: [file.unlink() for file in base.glob("safety_checker/*")], "is empty"),
    "another variant alone": (as_variant, "{base}/safety_checker has no weights that are read here"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_left_out(damage, base, exported, caplog):
    do, said = DAMAGES[damage]
    do(base)
    caplog.set_level("INFO", "t2i_training")
    spare_parts.carry_over(base, None, exported)
    (line,) = caplog.messages
    assert line.startswith("the base's safety_checker is left out of the export: ")
    assert said.format(base=base) in line
    assert not (exported / "safety_checker").exists()
    assert not suspects(exported)


def test_a_base_that_never_had_any(model, exported, caplog):
    before = index(exported)
    caplog.set_level("INFO", "t2i_training")
    spare_parts.carry_over(model, None, exported)
    assert (caplog.messages, index(exported)) == ([], before)
