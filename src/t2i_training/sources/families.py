"""Configurations of Stable Diffusion 1.x, 2.x base and 2.x v, as published: a single file holds weights alone."""

import json
from pathlib import Path

from . import clip_vocabulary

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"], "requires_safety_checker": False,
    "safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None],
}  # fmt: skip
_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
    "cross_attention_dim": 768,
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "scaling_factor": 0.18215,
}  # fmt: skip
_TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408,
    "max_position_embeddings": 77, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "hidden_act": "quick_gelu", "projection_dim": 768,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_SCHEDULER = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "prediction_type": "epsilon",
}  # fmt: skip
_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
}  # fmt: skip

VOCABULARY = ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt")  # of a tokenizer, as texts
SD1 = {
    "model_index.json": _INDEX, "unet/config.json": _UNET, "vae/config.json": _VAE,
    "text_encoder/config.json": _TEXT_ENCODER, "scheduler/scheduler_config.json": _SCHEDULER,
    "tokenizer/tokenizer_config.json": _TOKENIZER,
}  # fmt: skip
SD2 = SD1 | {
    "unet/config.json": _UNET
    | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "vae/config.json": _VAE | {"sample_size": 768},
    "text_encoder/config.json": _TEXT_ENCODER
    | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
        "hidden_act": "gelu", "projection_dim": 512,
    },
    "tokenizer/tokenizer_config.json": _TOKENIZER | {"pad_token": "!"},
}  # fmt: skip
SD2_V = SD2 | {  # upcast: its attention overflows in fp16
    "unet/config.json": SD2["unet/config.json"] | {"sample_size": 96, "upcast_attention": True},
    "model_index.json": _INDEX | {"scheduler": ["diffusers", "DDIMScheduler"]},
    "scheduler/scheduler_config.json": {name: value for name, value in _SCHEDULER.items() if name != "skip_prk_steps"}
    | {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"},
}


def write(configurations: dict[str, dict | str], folder: Path) -> None:
    """Write them as the files of a pipeline's folder, with CLIP's vocabulary unless they hold another."""
    for name, content in configurations.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (folder / name).write_text(text, encoding="utf-8")
    if not {*VOCABULARY} & configurations.keys():
        (folder / "tokenizer" / "vocab.json").write_text(
            json.dumps(clip_vocabulary.vocabulary(), ensure_ascii=False), encoding="utf-8"
        )
        text = "\n".join(["#version: 0.2", *clip_vocabulary.merges()]) + "\n"
        (folder / "tokenizer" / "merges.txt").write_text(text, encoding="utf-8")
