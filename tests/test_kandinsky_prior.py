"""The scripts for Kandinsky's prior, whole and LoRA: what they leave, how that is loaded, and what they optimise.

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
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, PriorTransformer
from PIL import Image
from runs import in_memory
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import ADAPTERS, SCRIPTS
from test_train_text_to_image import LEFT, column, differ, drawn_at, make_loader, optimizer, picture, tree

from t2i_training.data import draws
from t2i_training.model import lora
from t2i_training.report import validation
from t2i_training.run import lifecycle, output_folder

BOTH = ("prior", "prior_lora")
EXPORTED = {
    "image_encoder/config.json", "image_encoder/model.safetensors", "image_processor/preprocessor_config.json",
    "model_index.json", "prior/config.json", "prior/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    "tokenizer/merges.txt", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
}  # fmt: skip
FLAGS = {
    "prior": {"validation_prompts": ["a cat", "a dog"]},
    "prior_lora": {"validation_prompt": "a cat", "num_validation_images": 2},
}
PROMPTS = {"prior": ["a cat", "a dog"], "prior_lora": ["a cat"] * 2}


@pytest.fixture(params=BOTH)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def trained(command):
    """trained(script): (output folder, the prior as it stands in memory) of a run that validates and saves."""

    @functools.cache
    def make(script: str) -> tuple[Path, PriorTransformer]:
        tokens = command(script, checkpointing_steps=2, **FLAGS[script])
        with in_memory(PriorTransformer) as networks:
            load_script(script).main(tokens)
        (prior,) = networks
        return Path(tokens[tokens.index("--output_dir") + 1]), prior

    return make


@pytest.fixture
def base(prior_model):
    """The base prior's pipeline."""
    return DiffusionPipeline.from_pretrained(prior_model)


def output(prior) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(2, *shape, generator=generator) for shape in ((32,), (32,), (16, 32))]
    mask = torch.arange(16)[None] < torch.tensor([[5], [16]])
    with torch.no_grad():
        return prior(numbers[0], torch.tensor([3, 700]), *numbers[1:], attention_mask=mask).predicted_image_embedding


def draw(pipe, prompt: str, seed: int, side: int = 32) -> np.ndarray:
    """A combined pipeline's own image."""
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": validation.STEPS, "prior_num_inference_steps": validation.STEPS}
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt=prompt, height=side, width=side, generator=generator, **steps).images[0])


def combined(decoder_model, prior_folder):
    """The guides' snippet for a fine-tuned prior."""
    pipe_prior = DiffusionPipeline.from_pretrained(prior_folder, torch_dtype=torch.float32)
    prior_components = {"prior_" + k: v for k, v in pipe_prior.components.items()}
    return AutoPipelineForText2Image.from_pretrained(decoder_model, **prior_components, torch_dtype=torch.float32)


# --------------------------------------------------------------------------------------------------- what a run leaves


def tree_of(script: str) -> set[str]:
    return LEFT | (EXPORTED if script == "prior" else {ADAPTERS})


def test_exported_tree(finished, script):
    assert tree(finished(script)) == tree_of(script)


def test_tree_with_checkpoints_and_pictures(trained, script):
    folder, _ = trained(script)
    weights = ["prior/config.json", SCRIPTS["prior"].trained] if script == "prior" else [ADAPTERS]
    saved = {f"checkpoint-{n}/{name}" for n in (2, 4) for name in ("manifest.json", "optimizer.bin", *weights)}
    steps = (0, 4) if script == "prior" else (0, 3, 4)
    names = (".png", *(f"/0{i}.png" for i in range(len(PROMPTS[script]))))
    pictures = {f"validation/step-00000{step}{name}" for step in steps for name in names}
    assert tree(folder) == tree_of(script) | saved | pictures


def test_metrics(trained, script):
    folder, _ = trained(script)
    assert column(folder, "step") == [1, 2, 3, 4]
    assert column(folder, "epoch") == [0.3333, 0.6667, 1.0, 1.3333]
    assert column(folder, "lr") == [1e-2 if script == "prior_lora" else 1e-3] * 4
    assert all(0 < loss < 10 and norm > 0 for loss, norm in zip(column(folder, "loss"), column(folder, "grad_norm")))


def test_frozen_parts_are_exported_as_they_were(finished, prior_model):
    folder = finished("prior")
    for part in ("image_encoder/model.safetensors", "text_encoder/model.safetensors"):
        assert differ(load_file(folder / part), load_file(prior_model / part)) == []
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((prior_model / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    assert vocabulary == tokenizer["model"]["vocab"]


def test_statistics_stay_what_they_are_and_everything_else_is_trained(finished, prior_model):
    """The optimizer does not know them: under DDP it would wait for gradients that never come."""
    folder = finished("prior", adam_weight_decay=0.5, max_train_steps=2, use_ema=True, checkpointing_steps=2)
    before = load_file(prior_model / SCRIPTS["prior"].trained)
    for part in (folder, folder / "checkpoint-2"):
        after = load_file(part / SCRIPTS["prior"].trained)
        assert set(before) - set(differ(after, before)) == {"clip_mean", "clip_std"}
    assert len(optimizer(folder / "checkpoint-2")["param_groups"][0]["params"]) == len(before) - 2
    assert before["clip_mean"].std() > 0.1
    assert before["clip_std"].std() > 0.1


def test_card(trained, script):
    card = (trained(script)[0] / "README.md").read_text()
    assert "license: apache-2.0\n" in card
    assert "- kandinsky\n" in card
    assert ("- lora\n" in card) is (script == "prior_lora")
    assert "(validation/step-000004.png)" in card
    assert "prior:" not in card


# ----------------------------------------------------------------------------------------------------- how it is loaded


def test_prior_loads_and_combines_as_in_the_guides(trained, base, decoder_model, prior_model):
    folder, prior = trained("prior")
    pipe = combined(decoder_model, folder)
    assert torch.equal(output(pipe.prior_prior), output(prior))
    assert (output(pipe.prior_prior) - output(base.prior)).abs().max() > 0.01
    drawn = picture(folder / "validation/step-000004/01.png")
    assert np.array_equal(draw(pipe, "a dog", 4), drawn)
    assert not np.array_equal(draw(combined(decoder_model, prior_model), "a dog", 4), drawn)
    few = {"height": 32, "width": 32, "num_inference_steps": 2, "prior_num_inference_steps": 2}  # for the CPU's sake
    assert pipe(prompt="a dog", negative_prompt="a cat", **few).images[0].size == (32, 32)


def test_checkpoint_loads_into_the_base_pipeline(trained, decoder_model, prior_model):
    folder, prior = trained("prior")
    last = PriorTransformer.from_pretrained(folder / "checkpoint-4" / "prior")
    assert torch.equal(output(last), output(prior))
    earlier = PriorTransformer.from_pretrained(folder / "checkpoint-2" / "prior")
    assert not torch.equal(output(earlier), output(prior))
    pipe = AutoPipelineForText2Image.from_pretrained(decoder_model, prior_prior=last)
    assert np.array_equal(draw(pipe, "a cat", 3), picture(folder / "validation/step-000004/00.png"))


@pytest.mark.parametrize("part", ["", "checkpoint-4"])
def test_adapters_load_with_todays_call(trained, base, decoder_model, part):
    folder, prior = trained("prior_lora")
    pipe = AutoPipelineForText2Image.from_pretrained(decoder_model)
    pipe.prior_prior.load_lora_adapter(folder / part, prefix=None, weight_name=ADAPTERS)
    assert torch.equal(output(pipe.prior_prior), output(prior))
    assert (output(prior) - output(base.prior)).abs().max() > 0.01
    assert np.array_equal(draw(pipe, "a cat", 4), picture(folder / "validation/step-000004/01.png"))


def test_adapters_are_what_was_added_to_the_base(trained, base):
    """W + B @ A by hand (arXiv:2106.09685), in the attention's matrices alone; fp32, with its configuration."""
    folder, prior = trained("prior_lora")
    adapters = load_file(folder / ADAPTERS)
    matrices = [f"transformer_blocks.{i}.attn1.{part}" for i in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert set(adapters) == {f"{name}.lora_{side}.weight" for name in matrices for side in "AB"}
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    for name in matrices:
        added = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
        assert added.abs().max() > 0
        base.prior.get_submodule(name).weight.data += added
    torch.testing.assert_close(output(prior), output(base.prior), rtol=1e-4, atol=1e-5)
    with safe_open(folder / ADAPTERS, "pt") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (facts["r"], facts["lora_alpha"]) == (4, 4)
    assert facts["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


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


def test_resolution_is_the_validation_pictures_and_nothing_else(finished, script):
    drawn = finished(script, resolution=48, **{**FLAGS[script], "max_train_steps": 1})
    assert picture(drawn / "validation/step-000001/00.png").shape == (48, 48, 3)
    weights = [load_file(finished(script, resolution=side) / SCRIPTS[script].trained) for side in (32, 64)]
    assert differ(*weights) == []


def test_validation_cadence(trained, script):
    """Epochs of three updates; every epoch for LoRA, every fifth for a full run."""
    folder, _ = trained(script)
    assert drawn_at(folder) == [f"step-00000{s}.png" for s in ((0, 4) if script == "prior" else (0, 3, 4))]


# ---------------------------------------------------------------------------------------------------------- the samples


@pytest.fixture
def sampler(script, command, base):
    """sampler(**changes): a function (epoch, index) -> sample, as loader workers make it for a run with these flags."""

    def make(**changes):
        module = load_script(script)
        frozen = [base.image_encoder, base.text_encoder, base.prior.clip_mean, base.prior.clip_std]
        samples = make_loader(module, module.parse_args(command(script, **changes)), base, frozen).dataset
        return lambda epoch, index: samples[epoch, index]

    return make


def write_captions(folder: Path, captions: list[str]) -> Path:
    tiny.make_pictures(folder, len(captions))
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CAPTIONS = ["", "a cat", "exactly14chars", "far more than fits into it", "a,b c!"]


def test_text_mask_is_the_tokenizers_attention_mask(sampler, base, tmp_path):
    """Also of an empty caption, of one that fills the sequence and of one that is cut."""
    sample = sampler(train_data_dir=write_captions(tmp_path / "data", CAPTIONS))
    for i, caption in enumerate(CAPTIONS):
        wanted = base.tokenizer(caption, max_length=16, padding="max_length", truncation=True, return_tensors="pt")
        assert torch.equal(sample(0, i)["input_ids"], wanted.input_ids[0])
        assert torch.equal(sample(0, i)["text_mask"], wanted.attention_mask[0].bool())
    assert [int(sample(0, i)["text_mask"].sum()) for i in range(4)] == [2, 6, 16, 16]
    base.tokenizer.pad_token = "!"  # as of the real prior: padding that is not the end token, and may be a letter
    for i, caption in enumerate(CAPTIONS):
        wanted = base.tokenizer(caption, max_length=16, padding="max_length", truncation=True, return_tensors="pt")
        assert torch.equal(sample(0, i)["input_ids"], wanted.input_ids[0])
        assert torch.equal(sample(0, i)["text_mask"], wanted.attention_mask[0].bool())


def test_pixels_are_the_image_processors(sampler, base, tmp_path, script):
    """Of an image that needs no resizing exactly; of a larger one to three levels of 255, by another resize."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (12, 15, 3)).astype(np.uint8)
    large = Image.fromarray(smooth).resize((150, 120), Image.Resampling.BICUBIC)
    folder = tiny.make_pictures(tmp_path / "data", 2)
    large.save(folder / "1.png")
    sample = sampler(train_data_dir=folder)
    for i, levels in ((0, 0), (1, 3)):
        with Image.open(folder / f"{i}.png") as image:
            wanted = base.image_processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]
        pixels = load_script(script).images.normalize_for_clip(sample(0, i)["clip_pixels"][None], torch.float32)[0]
        level = 1 / 255 / 0.26  # what one level is after the normalisation
        assert float((pixels - wanted).abs().max()) <= levels * level + 1e-5


def test_draws_of_a_sample(sampler):
    samples = [sampler(caption_dropout=0.5)(epoch, 1) for epoch in range(40)]
    assert len({int(sample["timesteps"]) for sample in samples}) > 30
    assert {0 <= int(sample["timesteps"]) < 1000 for sample in samples} == {True}
    noise = torch.stack([sample["noise"] for sample in samples])
    assert noise.shape == (40, 32)
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1
    dropped = sum(int(sample["text_mask"].sum()) == 2 for sample in samples)
    assert 8 < dropped < 32
    plain = sampler()(3, 1)
    assert int(plain["text_mask"].sum()) == 8
    for name in ("noise", "timesteps", "clip_pixels"):
        assert torch.equal(plain[name], samples[3][name])
    for sample in (plain, samples[3]):
        assert set(sample) == {"clip_pixels", "input_ids", "text_mask", "noise", "timesteps", "index"}
    assert torch.equal(plain["noise"], draws.normal(draws.generator(3, 3, 1, "noise"), (32,)))
    assert int(plain["timesteps"]) == draws.generator(3, 3, 1, "timestep").integers(1000)


def test_picture_and_caption_are_read_each_by_itself(script, base, pictures):
    """By the two functions that cached encodings stand between: nothing of theirs depends on the rest of a sample."""
    module, whole = load_script(script), picture(pictures / "2.png").transpose(2, 0, 1)
    for source in (str(pictures / "2.png"), (pictures / "2.png").read_bytes()):
        read = module.read_image(source, (32, 32), None, False)
        assert set(read) == {"clip_pixels"}
        assert np.array_equal(read["clip_pixels"].numpy(), whole[:, :, 4:36])
    read = module.read_caption("a cat", base.tokenizer)
    wanted = base.tokenizer("a cat", max_length=16, padding="max_length", return_tensors="pt")
    assert set(read) == {"input_ids", "text_mask"}
    assert torch.equal(read["input_ids"], wanted.input_ids[0])
    assert torch.equal(read["text_mask"], wanted.attention_mask[0].bool())


def test_dropped_caption_is_the_empty_one(finished, script, tmp_path):
    """A run whose captions are all dropped is the run on a data set without any."""
    empty = finished(script, train_data_dir=write_captions(tmp_path / "data", [""] * 6))
    dropped = finished(script, caption_dropout=0.9999)
    assert differ(load_file(dropped / SCRIPTS[script].trained), load_file(empty / SCRIPTS[script].trained)) == []
    assert differ(load_file(finished(script) / SCRIPTS[script].trained), load_file(empty / SCRIPTS[script].trained))


# -------------------------------------------------------------------------------------------------------- the objective


@pytest.fixture
def objective(script, command, sampler):
    """objective(**changes): (loss of one batch, the batch, the base pipeline with the prior, alpha_bar, the prior)."""

    def make(**changes):
        module = load_script(script)
        args = module.parse_args(command(script, **changes))
        accelerator = Accelerator()
        pipeline, prior, scheduler = module.load_models(args, accelerator)
        frozen = module.freeze(args, pipeline, accelerator)
        if script == "prior_lora":
            prior = lora.add_adapters(prior, args, args.seed, accelerator)
        sample = sampler(**changes)
        batch = torch.utils.data.default_collate([sample(0, index) for index in range(4)])
        batch |= module.encode(batch, *frozen)
        return module.compute_loss(prior, batch, scheduler, args), batch, prior

    return make


def squared_cosine_alpha_bar(timesteps) -> torch.Tensor:
    """Improved DDPM, arXiv:2102.09672 equation 17, in steps of which each removes at most 0.999."""
    level = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    alphas = [1 - min(1 - level[t + 1] / level[t], 0.999) for t in range(1000)]
    return torch.tensor(np.cumprod(alphas), dtype=torch.float32)[timesteps]


def test_encoded_batch(objective, base, pictures):
    """ImageInfo embeddings by the prior's own image processor and statistics, texts as its pipeline encodes them."""
    _, batch, _ = objective()
    photos = [Image.open(pictures / f"{i}.png").convert("RGB") for i in range(4)]
    with torch.no_grad():
        embeds = base.image_encoder(base.image_processor(photos, return_tensors="pt").pixel_values).image_embeds
        captions = [f"image {i}" for i in range(4)]
        text_embeds, text_states, mask = base._encode_prompt(captions, torch.device("cpu"), 1, False)
        normalised = (embeds - base.prior.clip_mean) / base.prior.clip_std
    torch.testing.assert_close(batch["image_embeds"], normalised, rtol=1e-4, atol=1e-5)
    assert (normalised - embeds).abs().max() > 0.1
    torch.testing.assert_close(batch["text_embeds"], text_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch["text_states"], text_states, rtol=1e-5, atol=1e-6)
    assert torch.equal(batch["text_mask"], mask)
    torch.testing.assert_close(base.prior.post_process_latents(batch["image_embeds"]), embeds, rtol=1e-4, atol=1e-5)


def test_encodings_of_pictures_and_captions(script, sampler, base):
    """Each from its own half of the batch alone; together they are `encode`'s."""
    module, sample = load_script(script), sampler()
    batch = torch.utils.data.default_collate([sample(0, index) for index in range(4)])
    statistics = base.prior.clip_mean.detach(), base.prior.clip_std.detach()
    with torch.no_grad():
        photos = module.encode_images({"clip_pixels": batch["clip_pixels"]}, base.image_encoder, *statistics)
        texts = {name: batch[name] for name in ("input_ids", "text_mask")}
        captions = module.encode_captions(texts, base.text_encoder)
    assert set(photos) == {"image_embeds"}
    assert set(captions) == {"text_embeds", "text_states", "text_mask"}
    both = module.encode(batch, base.image_encoder, base.text_encoder, *statistics)
    assert set(both) == {*photos, *captions}
    assert all(torch.equal(both[name], (photos | captions)[name]) for name in both)
    assert not any(tensor.requires_grad for tensor in both.values())
    assert torch.equal(both["text_mask"], batch["text_mask"])


def test_loss_by_hand(objective, base):
    """x0 is predicted from x_t; Min-SNR's weight for it is min(SNR, gamma), arXiv:2303.09556."""
    for gamma in (None, 0.5):
        loss, batch, _ = objective(snr_gamma=gamma)
        alpha_bar = squared_cosine_alpha_bar(batch["timesteps"])[:, None]
        noisy = alpha_bar.sqrt() * batch["image_embeds"] + (1 - alpha_bar).sqrt() * batch["noise"]
        with torch.no_grad():
            prediction = base.prior(
                noisy, batch["timesteps"], batch["text_embeds"], batch["text_states"], batch["text_mask"]
            ).predicted_image_embedding
        errors = (prediction - batch["image_embeds"]).square().mean(1)
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        weights = torch.ones(4) if gamma is None else snr.clamp(max=gamma)
        assert gamma is None or 0 < len(set(weights.tolist())) <= 4
        assert float(loss.detach()) == pytest.approx(float((weights * errors).mean()), rel=1e-4)


def test_gradient_checkpointing_recomputes_and_changes_nothing(objective):
    results = []
    for wanted in (False, True):
        calls = []
        loss, _, prior = objective(gradient_checkpointing=wanted)
        for block in prior.transformer_blocks:
            block.ff.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss.backward()
        gradients = {name: p.grad for name, p in prior.named_parameters() if p.requires_grad}
        results.append((loss.detach(), gradients))
        assert len(calls) == (2 if wanted else 0), "feed-forward layers computed again on the way back"
    assert torch.equal(results[0][0], results[1][0])
    assert set(results[0][1]) == set(results[1][1])
    assert differ(results[0][1], results[1][1]) == []
    assert any(gradient.abs().max() > 0 for gradient in results[0][1].values())


def test_gradient_checkpointing_of_a_run(finished, script):
    weights = [
        load_file(finished(script, gradient_checkpointing=wanted) / SCRIPTS[script].trained) for wanted in (False, True)
    ]
    assert differ(*weights) == []


# ------------------------------------------------------------------------------------------------ precision and average


def test_bf16_lora_keeps_adapters_and_optimizer_in_fp32(finished, command):
    tokens = command("prior_lora", mixed_precision="bf16", checkpointing_steps=4, **FLAGS["prior_lora"])
    with in_memory(PriorTransformer) as networks:
        load_script("prior_lora").main(tokens)
    folder, (prior,) = Path(tokens[tokens.index("--output_dir") + 1]), networks
    assert {p.dtype for p in prior.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in prior.parameters() if p.requires_grad} == {torch.float32}
    state = optimizer(folder / "checkpoint-4")["state"].values()
    assert len(state) == 16
    assert {entry[name].dtype for entry in state for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    adapters = load_file(folder / ADAPTERS)
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapters.values())
    assert column(folder, "loss") == pytest.approx(column(finished("prior_lora"), "loss"), rel=0.05)


def test_statistics_are_not_rounded_in_bf16(script, command, base):
    """They normalise the target; the pipeline will undo that with the unrounded ones."""
    module = load_script(script)
    args = module.parse_args(command(script, mixed_precision="bf16"))
    accelerator = lifecycle.start(args)
    try:
        pipeline, _, _ = module.load_models(args, accelerator)
        image_encoder, text_encoder, mean, std = module.freeze(args, pipeline, accelerator)
    finally:
        output_folder.unlock()
    assert (image_encoder.dtype, text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(mean, base.prior.clip_mean.detach())
    assert torch.equal(std, base.prior.clip_std.detach())


def test_bf16_exports_fp32(finished, prior_model):
    folder = finished("prior", mixed_precision="bf16", **FLAGS["prior"])
    weights = load_file(folder / SCRIPTS["prior"].trained)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    for part in ("image_encoder/model.safetensors", "text_encoder/model.safetensors"):
        assert differ(load_file(folder / part), load_file(prior_model / part)) == []


@pytest.mark.gpu
def test_fp16_trains_under_its_loss_scaler(finished, script):
    folder = finished(script, mixed_precision="fp16", max_train_steps=8, **FLAGS[script])
    weights = load_file(folder / SCRIPTS[script].trained)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(math.isfinite(loss) for loss in column(folder, "loss"))


def test_average_is_validated_and_exported(finished, base, decoder_model):
    """By hand: diffusers' EMAModel, stepped over the weights that every update left."""
    from diffusers.training_utils import EMAModel

    folder = finished("prior", use_ema=True, checkpointing_steps=1, **FLAGS["prior"])
    names = [name for name, _ in base.prior.named_parameters()]
    average = EMAModel(base.prior.parameters())
    for step in (1, 2, 3, 4):
        saved = load_file(folder / f"checkpoint-{step}" / SCRIPTS["prior"].trained)
        parameters = [torch.nn.Parameter(saved[n], requires_grad=n not in ("clip_mean", "clip_std")) for n in names]
        average.step(parameters)
    exported = load_file(folder / SCRIPTS["prior"].trained)
    assert differ({n: exported[n] for n in names}, dict(zip(names, average.shadow_params, strict=True))) == []
    stored = load_file(folder / "checkpoint-4/prior_ema/diffusion_pytorch_model.safetensors")
    assert differ(stored, exported) == []
    assert differ(exported, saved)
    drawn = picture(folder / "validation/step-000004/00.png")
    assert np.array_equal(draw(combined(decoder_model, folder), "a cat", 3), drawn)


# ------------------------------------------------------------------------------------------------------------ the flags


def test_rank(finished):
    adapters = load_file(finished("prior_lora", rank=2) / ADAPTERS)
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
    "prior": ["--rank=2", "--offload_ema", "--num_validation_images=2"],
    "prior_lora": ["--use_ema", "--validation_prompts=a", "--save_kohya"],
}
NOWHERE = [
    "--prediction_type=v_prediction", "--noise_offset=0.1", "--random_flip", "--center_crop", "--scale_lr",
    "--enable_xformers_memory_efficient_attention", "--image_embeds_dropout=0.1", "--pretrained_model_name_or_path=x",
]  # fmt: skip


def test_flags_that_would_do_nothing_are_refused(command, script, capsys):
    for flag in ELSEWHERE[script] + NOWHERE:
        with pytest.raises(SystemExit) as stop:
            load_script(script).parse_args([*command(script), flag])
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err


def test_missing_models_and_columns_are_named_in_one_line(command, script, tmp_path, capsys):
    for part in ("prior", "decoder"):
        flag = f"pretrained_{part}_model_name_or_path"
        with pytest.raises(SystemExit):
            load_script(script).parse_args(command(script, **{flag: tmp_path / "none"}))
        assert f"error: --{flag} {tmp_path}/none: there is no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for part in ("prior", "decoder"):
        tokens = command(script, **{f"pretrained_{part}_model_name_or_path": tmp_path / "empty"}, **FLAGS[script])
        with pytest.raises(SystemExit):
            load_script(script).main(tokens)
        said = f"error: --pretrained_{part}_model_name_or_path {tmp_path}/empty holds no model_index.json"
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        load_script(script).main(command(script, caption_column="words"))
    said = (
        "error: --caption_column 'words' is not a column; there are: image, text; did you mean --caption_column=text?"
    )
    assert error.value.code == said
