"""Tiny pipelines and data sets of the real classes, made on the fly."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = 6  # of make_pictures; not a multiple of the batch sizes used, so epochs end inside batches


def make_tokenizer(folder: Path):
    """A CLIPTokenizer over single bytes: any caption becomes tokens."""
    from transformers import CLIPTokenizer

    byte_symbols = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    byte_symbols += [chr(256 + i) for i in range(256 - len(byte_symbols))]
    symbols = byte_symbols + [symbol + "</w>" for symbol in byte_symbols] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16, pad_token="<|endoftext|>")


def make_stable_diffusion(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A Stable Diffusion of 60,000 parameters with random weights; images are 2 x latents."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, **ends,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False, prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def add_safety_checker(stable_diffusion: Path, folder: Path) -> Path:
    """A copy of that Stable Diffusion with one, and with a feature extractor; tensors have today's names."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(1)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    checker.concept_embeds_weights.data.fill_(-1.0)
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline = StableDiffusionPipeline.from_pretrained(
        stable_diffusion, safety_checker=checker, feature_extractor=extractor
    )
    pipeline.save_pretrained(folder)
    return folder


def make_smaller(stable_diffusion: Path, folder: Path) -> Path:
    """A copy of that Stable Diffusion whose UNet and VAE have fewer layers: cross-attention is in the middle alone."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    shutil.copytree(stable_diffusion, folder)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, mid_block_add_attention=False,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    return folder


def make_pictures(folder: Path, count: int = PICTURES) -> Path:
    """An ImageFolder of `count` captioned 40 x 32 PNG images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        colour = rng.integers(0, 256, 3)
        pixels = np.clip(colour + rng.integers(-40, 40, (32, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"image {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# Of about equal area; there are 5, 5, 5, 4 and 4 of `make_photographs` in them.
BUCKETS = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "32,32;40,24;24,40;16,64;64,16"}


def make_photographs(folder: Path) -> Path:
    """An ImageFolder of 23 captioned JPEGs of five shapes, smooth as photographs are, a third turned by EXIF data."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(23):
        size, turned = [(64, 64), (50, 90), (90, 50), (130, 31), (31, 130)][i % 5], i % 3 == 0
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[274] = 6 if turned else 1
        image = coarse.resize(size[::-1] if turned else size, Image.Resampling.BICUBIC)
        image.save(folder / f"{i:02d}.jpg", exif=exif, quality=95)
        rows.append({"file_name": f"{i:02d}.jpg", "text": f"photograph {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
