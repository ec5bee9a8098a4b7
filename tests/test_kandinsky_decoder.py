"""The scripts for Kandinsky's decoder, whole and LoRA: what they leave, how that is loaded, and what they optimise.

The inference snippets are those of the guides with today's calls, offline, on the runs' own output folders.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import load_script
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, KandinskyV22CombinedPipeline, UNet2DConditionModel
from PIL import Image
from runs import in_memory
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import ADAPTERS, SCRIPTS
from test_kandinsky_prior import draw
from test_train_text_to_image import LEFT, column, differ, drawn_at, make_loader, optimizer, picture, tree

from t2i_training.data import draws
from t2i_training.model import lora

BOTH = ("decoder", "decoder_lora")
EXPORTED = {
    "model_index.json", "movq/config.json", "movq/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
}  # fmt: skip
FLAGS = {
    "decoder": {"validation_prompts": ["a cat", "a dog"]},
    "decoder_lora": {"validation_prompt": "a cat", "num_validation_images": 2},
}
PROMPTS = {"decoder": ["a cat", "a dog"], "decoder_lora": ["a cat"] * 2}


@pytest.fixture(params=BOTH)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def trained(command):
    """trained(script): (output folder, the UNet as it stands in memory) of a run that validates and saves."""

    @functools.cache
    def make(script: str) -> tuple[Path, UNet2DConditionModel]:
        tokens = command(script, checkpointing_steps=3, validation_epochs=1, **FLAGS[script])
        with in_memory(UNet2DConditionModel) as networks:
            load_script(script).main(tokens)
        (unet,) = networks
        return Path(tokens[tokens.index("--output_dir") + 1]), unet

    return make


@pytest.fixture
def base(decoder_model):
    """The base decoder's pipeline."""
    return DiffusionPipeline.from_pretrained(decoder_model)


@pytest.fixture
def base_prior(prior_model):
    """The base prior's pipeline."""
    return DiffusionPipeline.from_pretrained(prior_model)


def output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, generator=generator)
    condition = {"image_embeds": embeds}
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 700]), None, added_cond_kwargs=condition).sample


# --------------------------------------------------------------------------------------------------- what a run leaves


def tree_of(script: str) -> set[str]:
    return LEFT | (EXPORTED if script == "decoder" else {ADAPTERS})


def test_exported_tree(finished, script):
    assert tree(finished(script)) == tree_of(script)


def test_tree_with_checkpoints_and_pictures(trained, script):
    folder, _ = trained(script)
    weights = ["unet/config.json", SCRIPTS["decoder"].trained] if script == "decoder" else [ADAPTERS]
    saved = {f"checkpoint-3/{name}" for name in ("manifest.json", "optimizer.bin", *weights)}
    names = (".png", *(f"/0{i}.png" for i in range(len(PROMPTS[script]))))
    pictures = {f"validation/step-00000{step}{name}" for step in (0, 3, 4) for name in names}
    assert tree(folder) == tree_of(script) | saved | pictures


def test_metrics(trained, script):
    folder, _ = trained(script)
    assert column(folder, "step") == [1, 2, 3, 4]
    assert column(folder, "epoch") == [0.3333, 0.6667, 1.0, 1.3333]
    assert column(folder, "lr") == [1e-2 if script == "decoder_lora" else 1e-3] * 4
    assert all(0 < loss < 10 and norm > 0 for loss, norm in zip(column(folder, "loss"), column(folder, "grad_norm")))


def test_movq_is_exported_as_it_was_and_the_whole_unet_is_trained(finished, decoder_model):
    folder = finished("decoder")
    movq = "movq/diffusion_pytorch_model.safetensors"
    assert differ(load_file(folder / movq), load_file(decoder_model / movq)) == []
    before, after = (
        load_file(decoder_model / SCRIPTS["decoder"].trained),
        load_file(folder / SCRIPTS["decoder"].trained),
    )
    assert len(differ(before, after)) > 0.95 * len(before)


def test_card(trained, script, prior_model):
    card = (trained(script)[0] / "README.md").read_text()
    assert "license: apache-2.0\n" in card
    assert "- kandinsky\n" in card
    assert ("- lora\n" in card) is (script == "decoder_lora")
    assert (f"prior:\n- {prior_model}\n" in card) is (script == "decoder")
    assert "(validation/step-000004.png)" in card


# ----------------------------------------------------------------------------------------------------- how it is loaded


def test_decoder_loads_by_itself_as_in_the_guides(trained, base, decoder_model):
    """Its card leads to the prior, without a connection."""
    folder, unet = trained("decoder")
    pipe = AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=torch.float32)
    assert isinstance(pipe, KandinskyV22CombinedPipeline)
    assert torch.equal(output(pipe.unet), output(unet))
    assert (output(pipe.unet) - output(base.unet)).abs().max() > 0.01
    drawn = picture(folder / "validation/step-000004/01.png")
    assert np.array_equal(draw(pipe, "a dog", 4), drawn)
    assert not np.array_equal(draw(AutoPipelineForText2Image.from_pretrained(decoder_model), "a dog", 4), drawn)


def test_checkpoint_loads_into_the_base_pipeline(trained, decoder_model):
    folder, last = trained("decoder")
    unet = UNet2DConditionModel.from_pretrained(f"{folder}/checkpoint-3/unet")
    pipe = AutoPipelineForText2Image.from_pretrained(decoder_model, unet=unet, torch_dtype=torch.float32)
    assert np.array_equal(draw(pipe, "a cat", 3), picture(folder / "validation/step-000003/00.png"))
    assert not torch.equal(output(unet), output(last))


def test_fine_tuned_prior_and_decoder_together(trained, finished):
    folder, unet = trained("decoder")
    tuned = finished("prior")
    pipe_prior = DiffusionPipeline.from_pretrained(tuned)
    prior_components = {"prior_" + k: v for k, v in pipe_prior.components.items()}
    pipe = AutoPipelineForText2Image.from_pretrained(folder, **prior_components)
    assert torch.equal(output(pipe.unet), output(unet))
    assert differ(dict(pipe.prior_prior.named_parameters()), load_file(tuned / SCRIPTS["prior"].trained)) == []
    assert not np.array_equal(draw(pipe, "a dog", 4), picture(folder / "validation/step-000004/01.png"))


def test_adapters_load_with_todays_call(trained, base, decoder_model):
    folder, unet = trained("decoder_lora")
    pipe = AutoPipelineForText2Image.from_pretrained(decoder_model)
    pipe.unet.load_lora_adapter(folder, prefix=None, weight_name=ADAPTERS)
    assert torch.equal(output(pipe.unet), output(unet))
    assert (output(unet) - output(base.unet)).abs().max() > 0.01
    assert np.array_equal(draw(pipe, "a cat", 4), picture(folder / "validation/step-000004/01.png"))


def test_adapters_of_a_checkpoint_load_with_todays_call(trained, decoder_model):
    folder, _ = trained("decoder_lora")
    pipe = AutoPipelineForText2Image.from_pretrained(decoder_model)
    pipe.unet.load_lora_adapter(folder / "checkpoint-3", prefix=None, weight_name=ADAPTERS)
    assert np.array_equal(draw(pipe, "a cat", 3), picture(folder / "validation/step-000003/00.png"))


def test_both_adapters_in_one_pipeline(trained, finished, decoder_model):
    folder, unet = trained("decoder_lora")
    pipe = AutoPipelineForText2Image.from_pretrained(decoder_model)
    file = {"prefix": None, "weight_name": ADAPTERS}
    pipe.unet.load_lora_adapter(folder, **file)
    pipe.prior_prior.load_lora_adapter(finished("prior_lora"), **file)
    assert torch.equal(output(pipe.unet), output(unet))
    assert not np.array_equal(draw(pipe, "a cat", 3), picture(folder / "validation/step-000004/00.png"))


def test_adapters_are_what_was_added_to_the_base(trained, base):
    """W + B @ A by hand (arXiv:2106.09685), also where the image embedding enters; fp32, with its configuration."""
    folder, unet = trained("decoder_lora")
    adapters = load_file(folder / ADAPTERS)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
    matrices = [name for name, _ in base.unet.named_modules() if name.endswith(targets)]
    assert len(matrices) == 24
    assert set(adapters) == {f"{name}.lora_{side}.weight" for name in matrices for side in "AB"}
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    for name in matrices:
        added = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
        assert added.abs().max() > 0
        base.unet.get_submodule(name).weight.data += added
    torch.testing.assert_close(output(unet), output(base.unet), rtol=1e-4, atol=1e-5)
    with safe_open(folder / ADAPTERS, "pt") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (facts["r"], facts["lora_alpha"]) == (4, 4)
    assert facts["target_modules"] == sorted(targets)


def test_first_row_of_the_grid_is_the_base(trained, script, decoder_model):
    folder, _ = trained(script)
    pipe = AutoPipelineForText2Image.from_pretrained(decoder_model)
    grid = Image.open(folder / "validation" / "step-000004.png")
    for row, step in enumerate((0, 4)):
        for i, prompt in enumerate(PROMPTS[script]):
            cell = grid.crop((110 + 166 * i, 27 + 166 * row, 270 + 166 * i, 187 + 166 * row))
            drawn = picture(folder / f"validation/step-00000{step}/0{i}.png")
            assert np.array_equal(np.asarray(cell.resize((32, 32), Image.Resampling.NEAREST)), drawn)
            if step == 0 and i < 2:
                assert np.array_equal(draw(pipe, prompt, 3 + i), drawn)


def test_validation_cadence(finished, script):
    """Epochs of three updates; every epoch for LoRA, every fifth for a full run."""
    folder = finished(script, max_train_steps=4, **FLAGS[script])
    assert drawn_at(folder) == [f"step-00000{s}.png" for s in ((0, 4) if script == "decoder" else (0, 3, 4))]


# ---------------------------------------------------------------------------------------------------------- the samples


@pytest.fixture
def sampler(script, command, base, base_prior):
    """sampler(**changes): a function (epoch, index) -> sample, as loader workers make it for a run with these flags."""

    def make(**changes):
        module = load_script(script)
        args, frozen = module.parse_args(command(script, **changes)), [base.movq, base_prior.image_encoder]
        samples = make_loader(module, args, base, frozen).dataset
        return lambda epoch, index: samples[epoch, index]

    return make


def test_resolution(finished, sampler, script):
    for resolution in (16, 64):
        sample = sampler(resolution=resolution)(0, 0)
        assert sample["pixels"].shape == (3, resolution, resolution)
        assert sample["clip_pixels"].shape == (3, 32, 32)
        assert sample["noise"].shape == (4, resolution // 2, resolution // 2)
    folder = finished(script, resolution=48, max_train_steps=1, **FLAGS[script])
    assert picture(folder / "validation/step-000001/00.png").shape == (48, 48, 3)


def test_pixels(sampler, base_prior, pictures, tmp_path, script):
    """Of 40 x 32 pixels the middle for the latents; for CLIP what its image processor makes of the image.

    Of a larger image to three levels of 255, since it is resized in another way.
    """
    folder = tiny.make_pictures(tmp_path / "data", 2)
    smooth = np.random.default_rng(0).integers(0, 256, (12, 15, 3)).astype(np.uint8)
    Image.fromarray(smooth).resize((150, 120), Image.Resampling.BICUBIC).save(folder / "1.png")
    sample = sampler(train_data_dir=folder)
    for i, levels in ((0, 0), (1, 3)):
        with Image.open(folder / f"{i}.png") as image:
            wanted = base_prior.image_processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]
        pixels = load_script(script).images.normalize_for_clip(sample(0, i)["clip_pixels"][None], torch.float32)[0]
        assert float((pixels - wanted).abs().max()) <= levels / 255 / 0.26 + 1e-5
    middle = picture(folder / "0.png")[:, 4:36].transpose(2, 0, 1)
    assert np.array_equal(sample(0, 0)["pixels"].numpy(), middle)
    assert np.array_equal(sample(1, 0)["pixels"].numpy(), middle)
    with Image.open(folder / "0.png") as image:
        half = np.asarray(image.resize((20, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))).transpose(2, 0, 1)
    pixels = sampler(train_data_dir=folder, resolution=16)(0, 0)["pixels"]
    assert np.allclose(pixels.int(), half.astype(int), rtol=0, atol=1)  # torch's filter; see test_images.py


SAMPLE = {"pixels", "clip_pixels", "noise", "timesteps", "index"}


def test_draws_of_a_sample(sampler, base_prior):
    dropping, plain = sampler(image_embeds_dropout=0.25), sampler()
    samples = [dropping(epoch, 1) for epoch in range(80)]
    assert len({int(sample["timesteps"]) for sample in samples}) > 60
    assert {0 <= int(sample["timesteps"]) < 1000 for sample in samples} == {True}
    noise = torch.stack([sample["noise"] for sample in samples])
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert 8 < sum(bool(sample["dropped"]) for sample in samples) < 35, "one of four is dropped"
    for epoch, sample in enumerate(samples):
        assert set(sample) == {*SAMPLE, "dropped", "empty_embeds"}
        assert (sample["dropped"].dtype, sample["dropped"].shape) == (torch.bool, ())
        assert bool(sample["dropped"]) == (draws.generator(3, epoch, 1, "image_embeds_dropout").random() < 0.25)
        assert torch.equal(sample["empty_embeds"], samples[0]["empty_embeds"])
    with torch.no_grad():
        torch.testing.assert_close(samples[0]["empty_embeds"], base_prior.get_zero_embed()[0], rtol=1e-6, atol=1e-6)
    assert all(set(plain(epoch, 1)) == SAMPLE for epoch in range(20)), "nothing can be dropped"
    for name in ("noise", "timesteps", "clip_pixels", "pixels"):
        assert torch.equal(plain(3, 1)[name], samples[3][name])
    assert torch.equal(samples[3]["noise"], draws.normal(draws.generator(3, 3, 1, "noise"), (4, 16, 16)))
    assert int(samples[3]["timesteps"]) == draws.generator(3, 3, 1, "timestep").integers(1000)


def test_picture_is_read_by_itself(script, pictures):
    """By the function that cached encodings stand behind: nothing of it depends on the rest of a sample."""
    whole = picture(pictures / "2.png").transpose(2, 0, 1)
    with Image.open(pictures / "2.png") as image:
        half = np.asarray(image.resize((20, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))).transpose(2, 0, 1)
    for source in (str(pictures / "2.png"), (pictures / "2.png").read_bytes()):
        for sides, wanted in (((32, 16), (whole[:, :, 4:36], half)), ((16, 32), (half, whole[:, :, 4:36]))):
            read = load_script(script).read_image(source, (sides[0], sides[0]), None, False, sides[1])
            assert set(read) == {"pixels", "clip_pixels"}
            for name, expected in zip(("pixels", "clip_pixels"), wanted, strict=True):  # torch's filter and Pillow's
                assert np.abs(read[name].numpy().astype(int) - expected).max() <= 2


# -------------------------------------------------------------------------------------------------------- the objective


@pytest.fixture
def objective(script, command, sampler):
    """objective(dropped=..., **changes): (loss of one batch, the batch, the network, the embeddings that it saw)."""

    def make(dropped=None, **changes):
        module = load_script(script)
        args = module.parse_args(command(script, **changes))
        accelerator = Accelerator()
        pipeline, unet, scheduler = module.load_models(args, accelerator)
        frozen = module.freeze(args, pipeline, accelerator)
        if script == "decoder_lora":
            unet = lora.add_adapters(unet, args, args.seed, accelerator, lora.ADDED_KV_ATTENTION)
        sample = sampler(**changes)
        batch = torch.utils.data.default_collate([sample(0, index) for index in range(4)])
        if dropped is not None:
            batch["dropped"] = torch.tensor(dropped)
        batch |= module.encode(batch, *frozen)
        before, seen = {name: tensor.clone() for name, tensor in batch.items()}, []
        look = lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["image_embeds"])  # noqa: E731
        hook = unet.register_forward_pre_hook(look, with_kwargs=True)
        loss = module.compute_loss(unet, batch, scheduler, args)
        hook.remove()
        assert differ(batch, before) == [], "the batch is left as it was"
        return loss, batch, unet, *seen

    return make


def test_encoded_batch(objective, base, base_prior, pictures):
    """Latents neither sampled nor scaled; embeddings by the prior's own image processor."""
    _, batch, _, seen = objective()
    assert torch.equal(seen, batch["image_embeds"])
    photos = [Image.open(pictures / f"{i}.png").convert("RGB") for i in range(4)]
    squares = torch.stack([torch.from_numpy(np.asarray(photo)[:, 4:36].copy()) for photo in photos])
    with torch.no_grad():
        latents = base.movq.encode(squares.permute(0, 3, 1, 2) / 127.5 - 1).latents
        pixels = base_prior.image_processor(photos, return_tensors="pt").pixel_values
        embeds = base_prior.image_encoder(pixels).image_embeds
    torch.testing.assert_close(batch["latents"], latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["image_embeds"], embeds, rtol=1e-4, atol=1e-5)


def test_dropped_embedding_is_the_prior_pipelines_zero_embedding(objective, base_prior):
    """Which stands, at inference, for the unconditional half of guidance."""
    some, batch, _, seen = objective(dropped=[False, True, False, True], image_embeds_dropout=0.25)
    whole, same, _, embeds = objective(dropped=[False] * 4, image_embeds_dropout=0.25)
    plain, _, _, _ = objective()
    with torch.no_grad():
        zero = base_prior.get_zero_embed()[0]
        many = base_prior.get_zero_embed(4)
    assert torch.equal(many[3], zero)
    for i in (1, 3):
        torch.testing.assert_close(seen[i], zero, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(embeds[i], zero, atol=1e-2)
    for i in (0, 2):
        assert torch.equal(seen[i], embeds[i])
    assert torch.equal(embeds, batch["image_embeds"]), "what is encoded, and cached, does not know what is dropped"
    assert differ(batch, same) == ["dropped"]
    assert torch.equal(whole, plain)
    assert float(some.detach()) != pytest.approx(float(whole.detach()), rel=1e-4)


def test_embedding_of_nothing_is_the_prior_pipelines(script, base_prior):
    """In the encoder's precision, on the CPU, from where loader workers put it into samples."""
    nothing = load_script(script).embed_nothing(base_prior.image_encoder)
    assert (nothing.shape, nothing.dtype, nothing.device.type) == ((32,), torch.float32, "cpu")
    assert not nothing.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(nothing, base_prior.get_zero_embed()[0], rtol=1e-6, atol=1e-6)
    assert nothing.abs().max() > 1e-2, "which is not zero"
    halved = load_script(script).embed_nothing(base_prior.image_encoder.bfloat16())
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), nothing, rtol=0.1, atol=0.05)


def test_dropout_acts_on_a_run(finished, script):
    plain, dropped = (finished(script, image_embeds_dropout=share) for share in (0, 0.9999))
    assert differ(load_file(plain / SCRIPTS[script].trained), load_file(dropped / SCRIPTS[script].trained))


def linear_alpha_bar(timesteps) -> torch.Tensor:
    """DDPM, arXiv:2006.11239: betas from 0.00085 to 0.012, as the base decoder's scheduler says."""
    betas = np.linspace(0.00085, 0.012, 1000)
    return torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)[timesteps]


def test_loss_by_hand(objective, base, base_prior):
    """On the first four channels; Min-SNR's weight for the noise is min(SNR, gamma) / SNR, arXiv:2303.09556."""
    losses = []
    for gamma, dropped in ((None, None), (0.5, None), (None, [False, True, True, False])):
        share = 0.25 if dropped else 0
        loss, batch, _, _ = objective(snr_gamma=gamma, dropped=dropped, image_embeds_dropout=share)
        alpha_bar = linear_alpha_bar(batch["timesteps"]).view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * batch["latents"] + (1 - alpha_bar).sqrt() * batch["noise"]
        embeds = batch["image_embeds"].clone()
        for i in (1, 2) if dropped else ():
            embeds[i] = base_prior.get_zero_embed()[0].detach()
        condition = {"image_embeds": embeds}
        with torch.no_grad():
            prediction = base.unet(noisy, batch["timesteps"], None, added_cond_kwargs=condition).sample
        assert prediction.shape[1] == 8
        errors = (prediction[:, :4] - batch["noise"]).square().mean((1, 2, 3))
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        weights = torch.ones(4) if gamma is None else snr.clamp(max=gamma) / snr
        losses.append(float(loss.detach()))
        assert losses[-1] == pytest.approx(float((weights * errors).mean()), rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_gradient_checkpointing(objective, finished, script):
    results = []
    for wanted in (False, True):
        loss, _, unet, _ = objective(gradient_checkpointing=wanted)
        calls = []
        unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss.backward()
        assert len(calls) == int(wanted), "a block is computed again on the way back"
        results.append({name: p.grad for name, p in unet.named_parameters() if p.requires_grad and p.grad is not None})
    assert differ(*results) == []
    weights = [
        load_file(finished(script, gradient_checkpointing=wanted) / SCRIPTS[script].trained) for wanted in (False, True)
    ]
    assert differ(*weights) == []


# ------------------------------------------------------------------------------------------------ precision and average


def test_bf16_lora_keeps_adapters_and_optimizer_in_fp32(finished, command):
    tokens = command("decoder_lora", mixed_precision="bf16", checkpointing_steps=4, **FLAGS["decoder_lora"])
    with in_memory(UNet2DConditionModel) as networks:
        load_script("decoder_lora").main(tokens)
    folder, (unet,) = Path(tokens[tokens.index("--output_dir") + 1]), networks
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    state = optimizer(folder / "checkpoint-4")["state"].values()
    assert len(state) == 48
    assert {entry[name].dtype for entry in state for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    adapters = load_file(folder / ADAPTERS)
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapters.values())
    assert column(folder, "loss") == pytest.approx(column(finished("decoder_lora"), "loss"), rel=0.05)


def test_bf16_exports_fp32(finished, decoder_model):
    folder = finished("decoder", mixed_precision="bf16", **FLAGS["decoder"])
    weights = load_file(folder / SCRIPTS["decoder"].trained)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    movq = "movq/diffusion_pytorch_model.safetensors"
    assert differ(load_file(folder / movq), load_file(decoder_model / movq)) == []


@pytest.mark.gpu
def test_fp16_trains_under_its_loss_scaler(finished, script):
    folder = finished(script, mixed_precision="fp16", max_train_steps=8, **FLAGS[script])
    weights = load_file(folder / SCRIPTS[script].trained)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(math.isfinite(loss) for loss in column(folder, "loss"))


def test_average_is_validated_and_exported(finished, base):
    """By hand: diffusers' EMAModel, stepped over the weights that every update left."""
    from diffusers.training_utils import EMAModel

    folder = finished("decoder", use_ema=True, checkpointing_steps=1, **FLAGS["decoder"])
    names = [name for name, _ in base.unet.named_parameters()]
    average = EMAModel(base.unet.parameters())
    for step in (1, 2, 3, 4):
        saved = load_file(folder / f"checkpoint-{step}" / SCRIPTS["decoder"].trained)
        average.step([torch.nn.Parameter(saved[name]) for name in names])
    exported = load_file(folder / SCRIPTS["decoder"].trained)
    assert differ({n: exported[n] for n in names}, dict(zip(names, average.shadow_params, strict=True))) == []
    assert differ(load_file(folder / "checkpoint-4/unet_ema/diffusion_pytorch_model.safetensors"), exported) == []
    assert differ(exported, saved)
    pipe = AutoPipelineForText2Image.from_pretrained(folder)
    assert np.array_equal(draw(pipe, "a cat", 3), picture(folder / "validation/step-000004/00.png"))


# ------------------------------------------------------------------------------------------------------------ the flags


def test_caption_column_is_checked_and_changes_nothing(finished, command, script):
    """The guide passes it, though the decoder sees no caption."""
    named, plain = (
        load_file(finished(script, **c) / SCRIPTS[script].trained) for c in ({"caption_column": "text"}, {})
    )
    assert differ(named, plain) == []
    with pytest.raises(SystemExit) as error:
        load_script(script).main(command(script, caption_column="words"))
    said = (
        "error: --caption_column 'words' is not a column; there are: image, text; did you mean --caption_column=text?"
    )
    assert error.value.code == said


def test_pictures_need_no_captions(finished, command, pictures, tmp_path, script):
    (tmp_path / "bare").mkdir()
    for i in range(6):
        (tmp_path / "bare" / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
    for cached in (False, True):
        captioned = finished(script, cache_encodings=cached)
        bare = finished(script, train_data_dir=tmp_path / "bare", cache_encodings=cached)
        assert differ(load_file(bare / SCRIPTS[script].trained), load_file(captioned / SCRIPTS[script].trained)) == []


def test_rank(finished):
    adapters = load_file(finished("decoder_lora", rank=2) / ADAPTERS)
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in adapters.items()} == {2}


def test_seed(finished, script, tmp_path):
    first = load_file(finished(script) / SCRIPTS[script].trained)
    torch.manual_seed(99)
    assert differ(load_file(finished(script, output_dir=tmp_path / "again") / SCRIPTS[script].trained), first) == []
    assert differ(load_file(finished(script, seed=4) / SCRIPTS[script].trained), first)


def test_max_grad_norm(finished, script):
    folder = finished(script, max_grad_norm=1e-3, max_train_steps=1, checkpointing_steps=1)
    moments = [state["exp_avg"] for state in optimizer(folder / "checkpoint-1")["state"].values()]
    assert float(torch.stack([moment.norm() for moment in moments]).norm()) / 0.1 == pytest.approx(1e-3, rel=1e-3)
    assert column(folder, "grad_norm")[0] > 0.01


ELSEWHERE = {  # flags of other scripts, which would do nothing here
    "decoder": ["--rank=2", "--offload_ema", "--num_validation_images=2"],
    "decoder_lora": ["--use_ema", "--validation_prompts=a", "--save_kohya", "--tracker_project_name=a"],
}
NOWHERE = [
    "--prediction_type=v_prediction", "--noise_offset=0.1", "--random_flip", "--center_crop", "--scale_lr",
    "--caption_dropout=0.1", "--image_interpolation_mode=box", "--pretrained_model_name_or_path=x",
]  # fmt: skip


def test_flags_that_would_do_nothing_are_refused(command, script, capsys):
    for flag in ELSEWHERE[script] + NOWHERE:
        with pytest.raises(SystemExit) as stop:
            load_script(script).parse_args([*command(script), flag])
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err


def test_missing_models_are_named_in_one_line(command, script, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for part in ("prior", "decoder"):
        tokens = command(script, **{f"pretrained_{part}_model_name_or_path": tmp_path / "empty"})
        with pytest.raises(SystemExit):
            load_script(script).main(tokens)
        said = f"error: --pretrained_{part}_model_name_or_path {tmp_path}/empty holds no model_index.json"
        assert said in capsys.readouterr().err
