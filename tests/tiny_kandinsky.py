"""Tiny Kandinsky 2.2 prior and decoder pipelines of the real classes, with random weights."""

from pathlib import Path

import tiny

EMBEDDING = 32  # size of the CLIP image embedding


def make_prior(folder: Path, seed: int = 0) -> Path:
    import torch
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(seed)
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    shape = {
        "hidden_size": EMBEDDING, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "projection_dim": EMBEDDING,
    }  # fmt: skip
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=514, max_position_embeddings=16, **shape, **ends)
    )
    image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=8, **shape))
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=EMBEDDING, num_embeddings=16, num_layers=2
    )
    prior.clip_mean.data.normal_(std=0.2)
    prior.clip_std.data.uniform_(0.5, 1.5)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    KandinskyV22PriorPipeline(
        prior=prior, image_encoder=image_encoder, text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000),
        image_processor=CLIPImageProcessor(**size),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_decoder(folder: Path, prior: Path, seed: int = 0) -> Path:
    import torch
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=EMBEDDING, encoder_hid_dim_type="image_proj",
        cross_attention_dim=EMBEDDING, attention_head_dim=4, resnet_time_scale_shift="scale_shift", norm_num_groups=8,
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, layers_per_block=1,
        norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range",
        prediction_type="epsilon",
    )  # fmt: skip
    KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nprior:\n- {prior}\n---\n")
    return folder
