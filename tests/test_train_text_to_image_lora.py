"""The Stable Diffusion LoRA script: what it leaves, that what it leaves is what was trained, and its own flags.

Flags that it shares with the full run act through the same code; the objective is shown to be the same one below.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from runs import in_memory
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import ADAPTERS
from test_train_text_to_image import LEFT, column, differ, draw, drawn_at, optimizer, picture, tree

KOHYA = "kohya_lora_weights.safetensors"
DRAWN = {"validation_prompt": "a cat", "num_validation_images": 2}


@pytest.fixture(scope="module")
def run(finished):
    """run(**changes): the output folder of a short run. Equal changes share one: leave it as it is."""
    return lambda **changes: finished("sd_lora", **changes)


@pytest.fixture(scope="module")
def trained(command):
    """(output folder, the UNet that was trained, as it stands in memory) of a run with everything it can leave."""
    tokens = command("sd_lora", **DRAWN, save_kohya=True, checkpointing_steps=4)
    with in_memory(UNet2DConditionModel) as networks:
        load_script("sd_lora").main(tokens)
    (unet,) = networks
    return Path(tokens[tokens.index("--output_dir") + 1]), unet


@pytest.fixture
def pipeline(model):
    """pipeline(): the base pipeline, loaded anew."""

    def load():
        loaded = StableDiffusionPipeline.from_pretrained(model)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return load


def output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 16, 16, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), states).sample


def merged(unet, adapters: dict) -> UNet2DConditionModel:
    """By hand: W + up @ down (arXiv:2106.09685; alpha = rank makes the scale 1) in every matrix that has adapters."""
    unet, downs = copy.deepcopy(unet), [name for name in adapters if name.endswith(".lora.down.weight")]
    assert len(downs) * 2 == len(adapters)
    for name in downs:
        module = unet.get_submodule(name.removeprefix("unet.").removesuffix(".lora.down.weight"))
        module.weight.data += adapters[name.replace("down.weight", "up.weight")] @ adapters[name]
    return unet


def metadata(file) -> dict:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# --------------------------------------------------------------------------------------------------- what a run leaves


def test_exported_tree(run, trained):
    assert tree(run()) == {ADAPTERS, *LEFT}
    saved = ("manifest.json", "optimizer.bin", ADAPTERS, "kohya_lora_weights-step00000004.safetensors")
    checkpoint = {f"checkpoint-4/{name}" for name in saved}
    pictures = {f"validation/step-00000{step}{rest}" for step in (0, 3, 4) for rest in (".png", "/00.png", "/01.png")}
    assert tree(trained[0]) == {ADAPTERS, KOHYA} | LEFT | checkpoint | pictures


def test_file_holds_fp32_adapters_of_every_attention_matrix_and_their_configuration(run, pipeline):
    adapters = load_file(run() / ADAPTERS)
    matrices = {
        name for name, module in pipeline().unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")) and isinstance(module, torch.nn.Linear)
    }  # fmt: skip
    assert len(matrices) == 32
    assert set(adapters) == {f"unet.{name}.lora.{side}.weight" for name in matrices for side in ("down", "up")}
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    facts = json.loads(metadata(run() / ADAPTERS)["lora_adapter_metadata"])
    assert (facts["unet.r"], facts["unet.lora_alpha"], facts["unet.peft_type"]) == (4, 4, "LORA")
    assert facts["unet.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"], "in an order that is always the same"
    assert all(adapters[name].abs().max() > 0 for name in adapters), "also those that began as zero"


def test_loaded_pipeline_is_the_trained_one(trained, pipeline):
    """To the last bit the network in memory, to rounding the sum that is done by hand, and not the base."""
    folder, unet = trained
    loaded, base = pipeline(), pipeline()
    loaded.load_lora_weights(folder)
    assert torch.equal(output(loaded.unet), output(unet))
    adapters = load_file(folder / ADAPTERS)
    torch.testing.assert_close(output(loaded.unet), output(merged(base.unet, adapters)), rtol=1e-4, atol=1e-5)
    assert (output(loaded.unet) - output(base.unet)).abs().max() > 0.01
    assert np.array_equal(draw(loaded, "a cat", 3), picture(folder / "validation/step-000004/00.png"))
    loaded.unload_lora_weights()
    assert torch.equal(output(loaded.unet), output(base.unet))


def test_checkpoint_holds_the_same_adapters(trained, pipeline):
    folder, unet = trained
    loaded = pipeline()
    loaded.load_lora_weights(folder / "checkpoint-4")
    assert torch.equal(output(loaded.unet), output(unet))


def test_base_is_untouched(trained, pipeline):
    _, unet = trained
    base = {name: tensor for name, tensor in unet.state_dict().items() if "lora_" not in name}
    assert differ({name.replace(".base_layer", ""): base[name] for name in base}, pipeline().unet.state_dict()) == []
    assert {"lora_" in name for name, tensor in unet.named_parameters() if tensor.requires_grad} == {True}


def test_kohya_file(trained, pipeline):
    """Its names are those of A1111, ComfyUI and kohya's scripts; diffusers' own importer reads it, too."""
    folder, unet = trained
    kohya, base = load_file(folder / KOHYA), pipeline()
    modules = [name for name, _ in base.unet.named_modules()]
    matrices = [name for name in modules if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    wanted = {f"lora_unet_{name.replace('.', '_')}" for name in matrices}
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in wanted
    assert set(kohya) == {
        f"{name}.{part}" for name in wanted for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert {float(kohya[f"{name}.alpha"]) for name in wanted} == {4.0}
    assert {tensor.dtype for name, tensor in kohya.items() if name.endswith("weight")} == {torch.float32}
    facts = metadata(folder / KOHYA)
    assert (facts["ss_network_module"], facts["ss_network_dim"]) == ("networks.lora", "4")
    assert facts["ss_network_alpha"] == "4"
    base.load_lora_weights(folder, weight_name=KOHYA)
    assert torch.equal(output(base.unet), output(unet))


def test_card_says_how_to_load_it(trained):
    card = (trained[0] / "README.md").read_text()
    assert "- lora\n" in card
    assert "pipe.load_lora_weights(" in card
    assert "(validation/step-000004.png)" in card


# ------------------------------------------------------------------------------------------------------- the objective

OBJECTIVES = [
    {},
    {"noise_offset": 0.3, "input_perturbation": 0.3, "random_flip": True, "caption_dropout": 0.5},
    {"snr_gamma": 0.5},
    {"dream_training": True, "dream_detail_preservation": 2.0},
    {"prediction_type": "v_prediction", "scale_lr": True},
]


@pytest.mark.parametrize("changes", OBJECTIVES)
def test_objective_is_the_full_runs(finished, changes):
    """Adapters begin as zero: the first loss is the full run's on the same samples. The gradient is another one."""
    lora, full = (finished(script, **changes, max_train_steps=1) for script in ("sd_lora", "sd"))
    assert column(lora, "loss") == pytest.approx(column(full, "loss"), rel=1e-6)
    assert column(lora, "grad_norm") != pytest.approx(column(full, "grad_norm"), rel=0.1)
    if changes:
        assert column(lora, "loss") != pytest.approx(column(finished("sd_lora", max_train_steps=1), "loss"), rel=1e-4)


def test_gradient_checkpointing(run):
    plain, checkpointed = (run(**changes) for changes in ({}, {"gradient_checkpointing": True}))
    assert column(checkpointed, "loss") == pytest.approx(column(plain, "loss"), rel=1e-6)
    assert column(checkpointed, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- precision


def precision_of_a_run(command, script: str, kind: type, precision: str, **changes):
    """(types of what is frozen in memory, types of what is trained, output folder) of a run with a checkpoint."""
    tokens = command(script, mixed_precision=precision, checkpointing_steps=4, **changes)
    with in_memory(kind) as networks:
        load_script(script).main(tokens)
    types = [{p.dtype for p in networks[0].parameters() if p.requires_grad is trained} for trained in (False, True)]
    return *types, Path(tokens[tokens.index("--output_dir") + 1])


def check_precision(half: torch.dtype, frozen: set, trained: set, folder: Path) -> None:
    assert frozen == {half}
    assert trained == {torch.float32}
    state = optimizer_state(folder)
    assert {moment.dtype for moment in state} == {torch.float32}
    for file in (folder / ADAPTERS, folder / "checkpoint-4" / ADAPTERS):
        adapters = load_file(file)
        assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.to(half).float()) for tensor in adapters.values())
        assert all(tensor.isfinite().all() for tensor in adapters.values())


def optimizer_state(folder: Path) -> list[torch.Tensor]:
    saved = torch.load(folder / "checkpoint-4/optimizer.bin", weights_only=True)
    return [entry[name] for entry in saved["state"].values() for name in ("exp_avg", "exp_avg_sq")]


def test_bf16_keeps_adapters_and_optimizer_in_fp32(command, run):
    frozen, trained, folder = precision_of_a_run(command, "sd_lora", UNet2DConditionModel, "bf16", **DRAWN)
    check_precision(torch.bfloat16, frozen, trained, folder)
    assert len(optimizer_state(folder)) == 2 * 64


@pytest.mark.gpu
def test_fp16_trains_under_its_loss_scaler(command):
    frozen, trained, folder = precision_of_a_run(command, "sd_lora", UNet2DConditionModel, "fp16", **DRAWN)
    check_precision(torch.float16, frozen, trained, folder)


# ------------------------------------------------------------------------------------------------------------ its flags


def test_max_grad_norm(run):
    """Adam's first moment after one update is a tenth of the clipped gradient; the norm logged is the one before."""
    norms = []
    for limit in (1e-3, 100.0):
        folder = run(max_grad_norm=limit, max_train_steps=1, checkpointing_steps=1)
        moments = [state["exp_avg"] for state in optimizer(folder / "checkpoint-1")["state"].values()]
        norms.append(float(torch.stack([moment.norm() for moment in moments]).norm()) / 0.1)
        assert column(folder, "grad_norm") == column(run(), "grad_norm")[:1]
    before = column(run(), "grad_norm")[0]
    assert before > 2e-3
    assert norms == pytest.approx([1e-3, before], rel=1e-3)


def test_rank(run, pipeline):
    folder = run(rank=2, save_kohya=True)
    adapters = load_file(folder / ADAPTERS)
    ranks = {tensor.shape[0 if name.endswith("down.weight") else 1] for name, tensor in adapters.items()}
    assert ranks == {2}
    facts = json.loads(metadata(folder / ADAPTERS)["lora_adapter_metadata"])
    assert (facts["unet.r"], facts["unet.lora_alpha"]) == (2, 2)
    outputs = []
    for name in (ADAPTERS, KOHYA):
        loaded = pipeline()
        loaded.load_lora_weights(folder, weight_name=name)
        outputs.append(output(loaded.unet))
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], output(merged(pipeline().unet, adapters)), rtol=1e-4, atol=1e-5)


def test_another_rank_does_not_resume(run, command, tmp_path):
    checkpoint = run(checkpointing_steps=4) / "checkpoint-4"
    with pytest.raises(SystemExit) as error:
        load_script("sd_lora").main(command("sd_lora", rank=8, resume_from_checkpoint=checkpoint))
    reason = "its adapters have other names, or another --rank or --network_weights"
    assert error.value.code == f"error: {checkpoint} does not fit this model: {reason}"


def test_validation_every_epoch_unless_told_otherwise(run):
    """Epochs of three updates."""
    assert drawn_at(run(max_train_steps=8, **DRAWN)) == [f"step-00000{step}.png" for step in (0, 3, 6, 8)]
    third = run(max_train_steps=8, validation_epochs=2, **DRAWN)
    assert drawn_at(third) == [f"step-00000{step}.png" for step in (0, 6, 8)]
    assert not (run() / "validation").exists()


def test_number_of_validation_pictures_and_the_base_in_the_first_row(run, pipeline):
    folder = run(validation_prompt="a dog", num_validation_images=3)
    base, loaded = pipeline(), pipeline()
    loaded.load_lora_weights(folder)
    grid = Image.open(folder / "validation" / "step-000004.png")
    assert grid.size == (110 + 3 * 166, 27 + 2 * 166)
    for row, (step, pipe) in enumerate([(0, base), (4, loaded)]):
        for i in range(3):
            wanted = draw(pipe, "a dog", 3 + i)
            assert np.array_equal(picture(folder / f"validation/step-00000{step}/0{i}.png"), wanted)
            x, y = 110 + 166 * i, 27 + 166 * row
            cell = grid.crop((x, y, x + 160, y + 160)).resize((32, 32), Image.Resampling.NEAREST)
            assert np.array_equal(np.asarray(cell), wanted)
    assert len(list((folder / "validation" / "step-000000").iterdir())) == 3


def test_seed_decides_the_adapters_and_nothing_else_does(run, tmp_path):
    torch.manual_seed(5)
    first = load_file(run() / ADAPTERS)
    torch.manual_seed(6)
    assert differ(load_file(run(output_dir=tmp_path / "again") / ADAPTERS), first) == []
    start = {seed: load_file(run(seed=seed, learning_rate=0) / ADAPTERS) for seed in (3, 4)}
    assert all(name.endswith("down.weight") for name in differ(start[3], start[4]))
    assert len(differ(start[3], start[4])) == 32
    assert all(tensor.abs().max() == 0 for name, tensor in start[3].items() if name.endswith("up.weight"))


def test_flags_of_full_runs_are_refused(command, capsys):
    for flag in ("--use_ema", "--validation_prompts=a cat", "--tracker_project_name=x", "--non_ema_revision=main"):
        with pytest.raises(SystemExit) as stop:
            load_script("sd_lora").parse_args([*command("sd_lora"), flag])
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err
