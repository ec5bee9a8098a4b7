"""What runs leave is read by older libraries, too: under transformers 4.57.1 it computes what it does under today's."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import older_stack
import pytest
from safetensors import safe_open
from scripts import ADAPTERS, REPOSITORY

REQUIREMENTS = Path(__file__).with_name("requirements_older_stack.txt")
BUNDLED = REPOSITORY / "examples/quickstart/tiny-emoji-diffusion"


@pytest.fixture(scope="module")
def older(request) -> Path:
    """The folder of older libraries, installed once and kept in pytest's cache."""
    number = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = request.config.cache.mkdir("older-stack") / number
    if not folder.exists():
        partial = folder.with_name(f"{number}.{os.getpid()}")
        options = ["--quiet", "--no-deps", "--retries=1", "--disable-pip-version-check", "--target", str(partial)]
        command = [sys.executable, "-m", "pip", "install", *options, "--requirement", str(REQUIREMENTS)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"older libraries cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        partial.rename(folder)
    return folder


@pytest.fixture(scope="module")
def as_written(finished, guarded_model, tmp_path_factory) -> Path:
    """An export whose CLIP networks are as today's transformers writes them."""
    folder = tmp_path_factory.mktemp("written") / "out"
    shutil.copytree(finished("sd", pretrained_model_name_or_path=guarded_model, max_train_steps=1), folder)
    for part in ("text_encoder", "safety_checker"):
        shutil.copytree(guarded_model / part, folder / part, dirs_exist_ok=True)
    return folder


def names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@pytest.mark.slow("40 s, two installations: test_clip_names.py holds the names")
def test_exports_compute_the_same_under_older_libraries(finished, older, guarded_model, as_written, tmp_path):
    full = finished("sd", pretrained_model_name_or_path=guarded_model, max_train_steps=1)
    lora = finished("sd_lora", save_kohya=True, checkpointing_steps=4)
    prior, decoder = (finished(script, max_train_steps=1) for script in ("prior", "decoder"))
    files = [lora / ADAPTERS, lora / "checkpoint-4" / ADAPTERS, lora / "kohya_lora_weights.safetensors"]
    wanted = [f"sd={full}", f"sd={BUNDLED}", f"prior={prior}", f"decoder={decoder}"]
    wanted += [f"adapters={full},{file}" for file in files] + [f"sd={as_written}"]
    command = [sys.executable, older_stack.__file__, str(tmp_path / "older.npz"), *wanted]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(older)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    today, then = older_stack.outputs(wanted), np.load(tmp_path / "older.npz")
    assert set(today) == set(then)
    differences = {name: float(np.abs(then[name].astype(np.float64) - value).max()) for name, value in today.items()}
    grey_level = 1 / 255 / 0.26  # after normalisation
    limits = {name: 1.01 * grey_level if name.endswith("pixels") else 1e-5 for name in today if name[0] != "7"}
    assert {name: differences[name] for name in limits if not differences[name] <= limits[name]} == {}
    assert {"0.states", "0.safety", "1.picture", "2.image", "2.embeds", "3.picture", "6.picture"} <= set(limits)
    if "embeddings.token_embedding.weight" in names(as_written / "text_encoder/model.safetensors"):
        assert differences["7.states"] > 0.1, "so that this test can fail: nothing has been renamed there"
        assert differences["7.safety"] > 0.1


@pytest.mark.parametrize("script", ["sd", "prior"])
def test_exports_hold_the_old_names(script, finished, guarded_model):
    changes = {"pretrained_model_name_or_path": guarded_model} if script == "sd" else {}
    folder = finished(script, max_train_steps=1, **changes)
    assert "text_model.embeddings.token_embedding.weight" in names(folder / "text_encoder/model.safetensors")
    if script == "sd":
        checker = names(folder / "safety_checker/model.safetensors")
        assert "vision_model.vision_model.embeddings.patch_embedding.weight" in checker
        assert "concept_embeds" in checker
    else:
        image_encoder = names(folder / "image_encoder/model.safetensors")
        assert "vision_model.embeddings.patch_embedding.weight" in image_encoder


def test_the_bundled_model_holds_the_old_names():
    found = names(BUNDLED / "text_encoder/model.safetensors")
    assert len(found) == 36
    assert all(name.startswith("text_model.") for name in found)
