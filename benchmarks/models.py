"""Stable Diffusion 1.5 and Kandinsky 2.2 of the real classes with random weights, at the real size or scaled down."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import runs
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TOKENS = 77
ENDS = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # of make_tokenizer


@dataclass(frozen=True)
class Scale:
    """What the real networks are divided by: the width of all layers, and the number of layers."""

    width: int
    depth: int
    resolution: int  # of the images, in pixels; 512 is where the real ones are at home
    decoder_head: int  # channels of an attention head of the decoder's UNet; divides the channels of every level

    def channels(self, *real: int) -> tuple[int, ...]:
        return tuple(n // self.width for n in real)

    def layers(self, real: int) -> int:
        return max(1, real // self.depth)

    def clip(self, hidden: int, layers: int, heads: int, intermediate: int, projection: int) -> dict:
        """Heads are fewer, not narrower: the softmax then has the share of the work that it has in the real network."""
        return {
            "hidden_size": hidden // self.width, "num_hidden_layers": self.layers(layers),
            "num_attention_heads": max(1, heads // self.width), "intermediate_size": intermediate // self.width,
            "projection_dim": projection // self.width,
        }  # fmt: skip


SCALES = {"tiny": Scale(16, 8, 64, 12), "medium": Scale(4, 1, 256, 48), "full": Scale(1, 1, 512, 64)}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer over single bytes: no vocabulary has to be there, and captions are padded to 77 tokens alike."""
    byte_symbols = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    byte_symbols += [chr(256 + i) for i in range(256 - len(byte_symbols))]
    symbols = byte_symbols + [symbol + "</w>" for symbol in byte_symbols] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token="<|endoftext|>")


def stable_diffusion(scale: Scale) -> dict:
    """The networks of Stable Diffusion 1.5 by their names in the pipeline."""
    groups = 32 // scale.width
    text = scale.clip(768, 12, 12, 3072, 768)
    return {
        "unet": UNet2DConditionModel(
            sample_size=64, block_out_channels=scale.channels(320, 640, 1280, 1280), norm_num_groups=groups,
            layers_per_block=scale.layers(2), cross_attention_dim=768 // scale.width,
            attention_head_dim=max(1, 8 // scale.width),  # the number of heads, by an old misnomer of diffusers
        ),
        "vae": AutoencoderKL(
            block_out_channels=scale.channels(128, 256, 512, 512), norm_num_groups=groups,
            layers_per_block=scale.layers(2), latent_channels=4, sample_size=512,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, hidden_act="quick_gelu", **text, **ENDS)
        ),
    }  # fmt: skip


def prior(scale: Scale) -> dict:
    """The networks of the Kandinsky 2.2 prior by their names in the pipeline."""
    text = scale.clip(1280, 32, 20, 5120, 1280)
    return {
        "prior": PriorTransformer(
            num_attention_heads=32 // scale.width, attention_head_dim=64, num_layers=scale.layers(20),
            embedding_dim=1280 // scale.width, num_embeddings=TOKENS,
        ),
        "text_encoder": CLIPTextModelWithProjection(
            CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, hidden_act="gelu", **text, **ENDS)
        ),
        "image_encoder": image_encoder(scale, 224),
    }  # fmt: skip


def image_encoder(scale: Scale, side: int) -> CLIPVisionModelWithProjection:
    shape = scale.clip(1664, 48, 16, 8192, 1280)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=side, patch_size=14, hidden_act="gelu", **shape))


def decoder(scale: Scale) -> dict:
    """The networks of the Kandinsky 2.2 decoder by their names in the pipeline, and the image encoder.

    It reads images as much smaller than 224 px as the decoder's are smaller than 512 px: the work that it takes then
    stands to the decoder's as in the real networks.
    """
    return {
        "unet": UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=8, block_out_channels=scale.channels(384, 768, 1152, 1536),
            layers_per_block=scale.layers(3), attention_head_dim=scale.decoder_head,
            norm_num_groups=32 // scale.width, cross_attention_dim=768 // scale.width,
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            addition_embed_type="image", encoder_hid_dim=1280 // scale.width, encoder_hid_dim_type="image_proj",
            resnet_time_scale_shift="scale_shift",
        ),
        "movq": VQModel(
            # Its SpatialNorm has 32 groups whatever norm_num_groups says.
            block_out_channels=tuple(max(32, n) for n in scale.channels(128, 256, 256, 512)),
            layers_per_block=scale.layers(2), latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16384 // scale.width,
            down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
            norm_num_groups=32 // scale.width, norm_type="spatial",
        ),
        "image_encoder": image_encoder(scale, 224 * scale.resolution // 512),
    }  # fmt: skip


def build(folder: Path, size: str, names: set[str]) -> dict[str, Path]:
    """Folders of those of the pipelines "sd", "prior" and "decoder" that are named; built if they are not there yet."""
    made = {name: folder / size / name for name in sorted(names)}
    for name, target in made.items():
        if not (target / "model_index.json").exists():  # which is written last
            print(f"building {name}, {size}", flush=True)
            torch.manual_seed(0)
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                networks = BUILDERS[name](SCALES[size])
            SAVERS[name](target, networks)
            del networks
            torch.cuda.empty_cache()  # this process stays; what it holds the runs could not have
    return made


def stable_diffusion_pipeline(networks: dict, folder: Path) -> StableDiffusionPipeline:
    """The pipeline around these networks. `folder` is where the tokenizer's files go."""
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        **networks, tokenizer=make_tokenizer(folder / "tokenizer"), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def prior_pipeline(networks: dict, folder: Path) -> KandinskyV22PriorPipeline:
    """As above."""
    torch.nn.init.ones_(networks["prior"].clip_std)  # zero as it comes, and embeddings are divided by it
    return KandinskyV22PriorPipeline(
        **networks, tokenizer=make_tokenizer(folder / "tokenizer"), image_processor=CLIPImageProcessor(),
        scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000),
    )  # fmt: skip


def decoder_pipeline(networks: dict) -> KandinskyV22Pipeline:
    """Without the image encoder, which belongs to the prior's pipeline."""
    scheduler = DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
    )
    return KandinskyV22Pipeline(unet=networks["unet"], movq=networks["movq"], scheduler=scheduler)


def _save_decoder(target: Path, networks: dict) -> None:
    encoder = networks["image_encoder"]
    side = encoder.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    encoder.save_pretrained(target / runs.ENCODER / "image_encoder")
    processor.save_pretrained(target / runs.ENCODER / "image_processor")
    decoder_pipeline(networks).save_pretrained(target)


BUILDERS = {"sd": stable_diffusion, "prior": prior, "decoder": decoder}
SAVERS = {
    "sd": lambda target, networks: stable_diffusion_pipeline(networks, target).save_pretrained(target),
    "prior": lambda target, networks: prior_pipeline(networks, target).save_pretrained(target),
    "decoder": _save_decoder,
}


if __name__ == "__main__":  # models.py FOLDER SIZE NAMES...
    build(Path(sys.argv[1]), sys.argv[2], set(sys.argv[3:]))
