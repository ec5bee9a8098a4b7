"""Contract: every file of weights that a run writes loads by the documented call, whole, and draws other images.

At the same step a checkpoint draws what the export draws.
"""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import load_script
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    PriorTransformer,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from runs import outcome
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import ADAPTERS, SCRIPTS

from t2i_training.run import manifest

RUN = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 3e-2}
NETWORKS = {"sd": "unet", "prior": "prior", "decoder": "unet"}
FLAGS = {"sd_lora": {"save_kohya": True}, **{script: {"use_ema": True} for script in NETWORKS}}
ADAPTED = {"sd_lora": 32, "prior_lora": 8, "decoder_lora": 24}  # script -> matrices that have adapters


@pytest.fixture
def run(finished):
    """run(script): the output folder of its run, with checkpoints 2 and 4. Leave it as it is."""
    return lambda script: finished(script, **RUN, **FLAGS.get(script, {}))


@pytest.fixture
def base(request, model, prior_model, decoder_model):
    """base(script): the base's pipeline, loaded anew, with or without another network in it; Kandinsky's is of both."""

    def load(script, **network):
        if script.startswith("sd"):
            return StableDiffusionPipeline.from_pretrained(model, **network)
        prior = DiffusionPipeline.from_pretrained(prior_model, **{n: network[n] for n in network if n == "prior"})
        components = {f"prior_{name}": component for name, component in prior.components.items()}
        components |= {name: network[name] for name in network if name == "unet"}
        return AutoPipelineForText2Image.from_pretrained(decoder_model, **components)

    return load


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 3}
    if hasattr(pipeline, "prior_prior"):
        arguments["prior_num_inference_steps"] = 3
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type="np", **arguments).images[0]


def trained_part(pipeline, script: str):
    return pipeline.prior_prior if script.startswith("prior") else pipeline.unet


def load_adapters(pipeline, script: str, folder, **weight_name) -> None:
    """The documented calls."""
    if script == "sd_lora":
        pipeline.load_lora_weights(folder, **weight_name)
    else:
        trained_part(pipeline, script).load_lora_adapter(folder, prefix=None, weight_name=ADAPTERS)


def loaded_adapters(network) -> int:
    """How many matrices have adapters; each must add something, in the scale that it was trained in."""
    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        (name,) = layer.lora_A
        assert layer.lora_B[name].weight.abs().max() > 0, "its name was not in the file"
        assert (layer.scaling[name], layer.r[name]) == (1.0, 4)
    return len(layers)


@pytest.mark.parametrize("script", ADAPTED)
def test_adapters_load(script, run, base):
    folder, pictures = run(script), {"base": draw(base(script))}
    for place in ("checkpoint-2", "checkpoint-4", "."):
        pipeline = base(script)
        load_adapters(pipeline, script, folder / place)
        assert loaded_adapters(trained_part(pipeline, script)) == ADAPTED[script]
        assert len(load_file(folder / place / ADAPTERS)) == 2 * ADAPTED[script], "none of the file is left over"
        pictures[place] = draw(pipeline)
    assert np.array_equal(pictures["checkpoint-4"], pictures["."])
    assert np.abs(pictures["checkpoint-4"] - pictures["base"]).max() > 0.01
    assert np.abs(pictures["checkpoint-4"] - pictures["checkpoint-2"]).max() > 0.001


def weights(unet) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def test_two_adapters_at_once(run, base):
    """They add up: W + 0.5 of one + 0.25 of the other, which fusing them writes into the weights."""
    folder, pipeline = run("sd_lora"), base("sd_lora")
    before = weights(pipeline.unet)
    pipeline.load_lora_weights(folder, adapter_name="last")
    pipeline.load_lora_weights(folder / "checkpoint-2", adapter_name="earlier")
    pipeline.set_adapters(["last", "earlier"], [0.5, 0.25])
    pipeline.fuse_lora(adapter_names=["last", "earlier"])
    pipeline.unload_lora_weights()
    parts = [(0.5, load_file(folder / ADAPTERS)), (0.25, load_file(folder / "checkpoint-2" / ADAPTERS))]
    changed = 0
    for name, tensor in pipeline.unet.state_dict().items():
        down, up = (f"unet.{name.removesuffix('.weight')}.lora.{side}.weight" for side in ("down", "up"))
        added = sum((w * adapters[up] @ adapters[down] for w, adapters in parts if up in adapters), torch.tensor(0.0))
        torch.testing.assert_close(tensor, before[name] + added, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, before[name])
    assert changed == ADAPTED["sd_lora"]


def test_fused_and_saved_is_a_pipeline_like_any(run, base, tmp_path):
    pipeline, plain = base("sd_lora"), base("sd_lora")
    pipeline.load_lora_weights(run("sd_lora"))
    adapted = draw(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert loaded.unet.state_dict().keys() == plain.unet.state_dict().keys()
    np.testing.assert_allclose(draw(loaded), adapted, atol=1e-3)
    assert np.abs(draw(plain) - adapted).max() > 0.01


def test_a_scale_of_zero_is_the_base(run, base):
    pipeline = base("sd_lora")
    plain = draw(pipeline)
    pipeline.load_lora_weights(run("sd_lora"))
    pipeline.set_adapters(["default_0"], [0.0])
    np.testing.assert_allclose(draw(pipeline), plain, atol=1e-6)


def test_adapters_change_images_that_start_from_images(run, base):
    pipeline = AutoPipelineForImage2Image.from_pipe(base("sd_lora"))
    pipeline.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (64, 64), "orange")

    def change():
        generator = torch.Generator().manual_seed(0)
        return pipeline("a cat", image, num_inference_steps=4, generator=generator, output_type="np").images[0]

    plain = change()
    pipeline.load_lora_weights(run("sd_lora"))
    assert np.abs(change() - plain).max() > 0.01


def test_adapters_load_in_half_precision(run, base):
    pipeline = base("sd_lora", torch_dtype=torch.bfloat16)
    plain = draw(pipeline)
    pipeline.load_lora_weights(run("sd_lora"))
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}
    assert loaded_adapters(pipeline.unet) == ADAPTED["sd_lora"]
    assert np.abs(draw(pipeline) - plain).max() > 0.01


@pytest.mark.parametrize("script", ADAPTED)
def test_a_checkpoints_adapters_are_written_as_the_exports(script, run):
    """The same names, numbers and configuration."""
    contents, configurations = [], []
    for place in ("checkpoint-4", "."):
        file = run(script) / place / ADAPTERS
        contents.append(load_file(file))
        with safe_open(file, "pt") as opened:
            configurations.append(json.loads(opened.metadata()["lora_adapter_metadata"]))
    assert contents[0].keys() == contents[1].keys()
    assert all(torch.equal(tensor, contents[1][name]) for name, tensor in contents[0].items())
    assert configurations[0] == configurations[1]


def test_kohya_files_of_all_checkpoints_load_from_one_folder(run, base, tmp_path):
    folder = run("sd_lora")
    for file in folder.glob("checkpoint-*/kohya*"):
        shutil.copy(file, tmp_path)
    steps = {2: "kohya_lora_weights-step00000002.safetensors", 4: "kohya_lora_weights-step00000004.safetensors"}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(steps.values())
    for step, name in steps.items():
        described = json.loads((folder / f"checkpoint-{step}/manifest.json").read_text())["files"]
        assert set(described) == {name, ADAPTERS, "optimizer.bin"}
        pipelines = [base("sd_lora") for _ in range(2)]
        load_adapters(pipelines[0], "sd_lora", tmp_path, weight_name=name)
        load_adapters(pipelines[1], "sd_lora", folder / f"checkpoint-{step}")
        assert loaded_adapters(pipelines[0].unet) == ADAPTED["sd_lora"]
        assert len(load_file(tmp_path / name)) == 3 * ADAPTED["sd_lora"]
        assert np.array_equal(*map(draw, pipelines))
    last, exported = (load_file(file) for file in (tmp_path / steps[4], folder / "kohya_lora_weights.safetensors"))
    assert last.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in last.items())


@pytest.mark.parametrize("script", NETWORKS)
def test_networks_of_checkpoints_load(script, run, base):
    folder, part = run(script), NETWORKS[script]
    kind = PriorTransformer if part == "prior" else UNet2DConditionModel
    pictures = {"base": draw(base(script))}
    for place in (f"checkpoint-4/{part}", f"checkpoint-4/{part}_ema", part):
        network, report = kind.from_pretrained(folder / place, output_loading_info=True)
        assert not any(report.values()), report
        pictures[place] = draw(base(script, **{part: network}))
        assert np.abs(pictures[place] - pictures["base"]).max() > 0.001
    assert np.array_equal(pictures[f"checkpoint-4/{part}_ema"], pictures[part]), "the average is exported"
    assert not np.array_equal(pictures[f"checkpoint-4/{part}"], pictures[part])


def write_as_before(checkpoint) -> None:
    """What the checkpoints of these scripts once were: without "unet.", under peft's names."""
    with safe_open(checkpoint / ADAPTERS, "pt") as opened:
        metadata = opened.metadata()
    facts = json.loads(metadata["lora_adapter_metadata"])
    metadata["lora_adapter_metadata"] = json.dumps({name.removeprefix("unet."): fact for name, fact in facts.items()})
    endings = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}
    old = {
        functools.reduce(lambda text, pair: text.replace(*pair), endings.items(), name.removeprefix("unet.")): tensor
        for name, tensor in load_file(checkpoint / ADAPTERS).items()
    }
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in old)
    save_file(old, checkpoint / ADAPTERS, metadata=metadata)
    for kohya in checkpoint.glob("kohya*"):
        kohya.unlink()
    position = manifest.read_manifest(checkpoint)
    (checkpoint / manifest.MANIFEST).unlink()
    manifest.write_manifest(checkpoint, {n: v for n, v in position.items() if n not in ("files", "digest", "format")})


@pytest.mark.parametrize("layout", ["of today", "of before"])
def test_checkpoints_of_either_layout_resume(layout, command, tmp_path):
    """Bit for bit."""
    options = {**RUN, **SCRIPTS["sd_lora"].draws, "save_kohya": True}
    load_script("sd_lora").main(command("sd_lora", output_dir=tmp_path / "whole", **options))
    pieces = shutil.copytree(tmp_path / "whole", tmp_path / "pieces")
    if layout == "of before":
        write_as_before(pieces / "checkpoint-2")
        assert manifest.verify(pieces / "checkpoint-2") is None
    tokens = command("sd_lora", output_dir=pieces, resume_from_checkpoint="checkpoint-2", **options)
    load_script("sd_lora").main(tokens)
    assert outcome(pieces, 4, ADAPTERS, 60) == outcome(tmp_path / "whole", 4, ADAPTERS, 60)
