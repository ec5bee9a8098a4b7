"""Tensors of CLIP networks are renamed in place; nothing else of a file changes."""

import json

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from t2i_training.run.clip_names import keep_old_names

SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8,
}  # fmt: skip
TEXT = CLIPTextConfig(vocab_size=20, bos_token_id=1, eos_token_id=2, max_position_embeddings=16, **SHAPE)
VISION = CLIPVisionConfig(image_size=32, patch_size=8, **SHAPE)
NETWORKS = {  # -> (a network, the old name of one of its tensors)
    "text": (lambda: CLIPTextModel(TEXT), "text_model.encoder.layers.1.mlp.fc1.bias"),
    "text with projection": (lambda: CLIPTextModelWithProjection(TEXT), "text_model.final_layer_norm.weight"),
    "vision": (lambda: CLIPVisionModel(VISION), "vision_model.embeddings.class_embedding"),
    "vision with projection": (lambda: CLIPVisionModelWithProjection(VISION), "vision_model.post_layernorm.bias"),
    "safety checker": (
        lambda: StableDiffusionSafetyChecker(CLIPConfig(text_config=TEXT.to_dict(), vision_config=VISION.to_dict())),
        "vision_model.vision_model.encoder.layers.0.mlp.fc1.bias",
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("layout", ["one file", "several files", "fp16 variant"])
def test_every_clip_network_gets_the_old_names_and_loads_the_same(kind, layout, tmp_path):
    make, name = NETWORKS[kind]
    network, variant = make(), "fp16" if "fp16" in layout else None
    options = {"max_shard_size": "8KB"} if layout == "several files" else {}
    network.save_pretrained(tmp_path / "part", variant=variant, **options)
    assert (len(list((tmp_path / "part").glob("*.safetensors"))) > 1) == bool(options)
    keep_old_names(tmp_path)
    found = {name for file in (tmp_path / "part").glob("*.safetensors") for name in load_file(file)}
    assert name in found
    assert len(found) == len(network.state_dict())
    for index in (tmp_path / "part").glob("*.index.json"):
        assert set(json.loads(index.read_text())["weight_map"]) == found
    loaded, report = type(network).from_pretrained(tmp_path / "part", variant=variant, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in network.state_dict().items())
    written = {file.name: file.read_bytes() for file in (tmp_path / "part").iterdir()}
    keep_old_names(tmp_path)  # what has the old names stays as it is
    assert {file.name: file.read_bytes() for file in (tmp_path / "part").iterdir()} == written


def test_all_else_of_a_file_stays(tmp_path):
    tensors = {
        "embeddings.token_embedding.weight": torch.randn(3, 5).half(), "empty": torch.zeros(0, 2),
        "embeddings.position_ids": torch.arange(7)[None], "bf16": torch.randn(3).bfloat16(),
    }  # fmt: skip
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "note": "kept: é"})
    size, data = file.stat().st_size, file.read_bytes()
    keep_old_names(tmp_path)
    assert file.read_bytes().endswith(data[8 + int.from_bytes(data[:8], "little") :])
    assert 0 < file.stat().st_size - size < 200
    assert (file.read_bytes()[0] + 8) % 8 == 0, "the tensors are aligned"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept: é"}
    loaded = load_file(file)
    assert set(loaded) == {f"text_model.{name}" for name in tensors}
    assert all(torch.equal(loaded[f"text_model.{name}"], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_other_networks_keep_their_names(tmp_path):
    """Also those whose tensors are called a little like CLIP's."""
    for number, tensors in enumerate([{"shared.weight": 1}, {"vision_model.embeddings.patch_embedding.weight": 1}, {}]):
        (tmp_path / str(number)).mkdir()
        tensors = {name: torch.ones(size) for name, size in tensors.items()}
        save_file(tensors, tmp_path / str(number) / "model.safetensors")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    keep_old_names(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == before
