"""Loads a Stable Diffusion pipeline into Flax networks, and saves it so that diffusers can load it.

Tokenizer and sampler are those of diffusers and transformers. PyTorch's networks are built only for single files.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
from transformers import CLIPTokenizer

from ..model import base, spare_parts
from ..model.networks import fit_tokenizer
from . import networks
from .networks.weights import find_files

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
ALL_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "diffusion_flax_model", "flax_model")


@dataclass
class Pipeline:
    """The parts of a Stable Diffusion. The networks' weights are fp32 in host memory."""

    folder: Path  # or the single file
    tokenizer: CLIPTokenizer
    scheduler: diffusers.SchedulerMixin  # the sampler's
    unet: networks.UNet2DConditionModel
    vae: networks.AutoencoderKL
    text_encoder: networks.CLIPTextModel
    dtype: type  # dtype of the networks' arithmetic

    @property
    def vae_scale_factor(self) -> int:
        """How many times longer the sides of an image are than those of its latents."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)


def load(args, dtype) -> Pipeline:
    """The pipeline --pretrained_model_name_or_path; its networks compute in `dtype`."""
    if Path(args.pretrained_model_name_or_path).is_file():
        return _from_single_file(args, dtype)
    folder = local_folder(args)
    variants = {part: variant_of(folder / part, args.variant) for part in STEMS}
    if args.variant and not any(variants.values()):
        raise FileNotFoundError(f"there are no weights of --variant {args.variant}")
    files = [find_files(folder / part, stem, variants[part]) for part, stem in STEMS.items()]
    if args.from_pt and any(file.suffix == ".msgpack" for found in files for file in found):
        raise FileNotFoundError("there are Flax weights only: leave --from_pt out")
    scheduler_class = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    unet = networks.load_unet(
        folder / "unet", variant=variants["unet"], dtype=dtype, gradient_checkpointing=args.gradient_checkpointing
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = networks.load_text_encoder(folder / "text_encoder", variant=variants["text_encoder"], dtype=dtype)
    if args.pretrained_vae_model_name_or_path is None:
        vae = networks.load_vae(folder / "vae", variant=variants["vae"], dtype=dtype)
    else:
        vae = networks.from_torch(networks.AutoencoderKL, base.load_vae(args), dtype=dtype)
    fit_tokenizer(tokenizer, text_encoder.config["max_position_embeddings"])
    return Pipeline(
        folder,
        tokenizer,
        getattr(diffusers, scheduler_class.removeprefix("Flax")).from_pretrained(folder / "scheduler"),
        unet,
        vae,
        text_encoder,
        dtype,
    )


def _from_single_file(args, dtype) -> Pipeline:
    loaded = base.load_pipeline(args)
    unet = networks.from_torch(
        networks.UNet2DConditionModel, loaded.unet, dtype=dtype, gradient_checkpointing=args.gradient_checkpointing
    )
    vae = networks.from_torch(networks.AutoencoderKL, loaded.vae, dtype=dtype)
    text_encoder = networks.from_torch(networks.CLIPTextModel, loaded.text_encoder, dtype=dtype)
    file = Path(args.pretrained_model_name_or_path)
    return Pipeline(file, loaded.tokenizer, loaded.scheduler, unet, vae, text_encoder, dtype)


def variant_of(part: Path, variant: str | None) -> str | None:
    """The variant if this part has it, else None for its plain weights, as in diffusers."""
    return variant if variant and list(part.glob(f"*.{variant}*")) else None


def local_folder(args) -> Path:
    """The pipeline's folder. Of a hub repository, the necessary files are downloaded.

    Formats of weights are tried in turn until every network has weights, those of a variant first.
    """
    name, lacking = args.pretrained_model_name_or_path, ["*"]
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    for mark in [f".{args.variant}", ""] if args.variant else [""]:
        for kind in ("safetensors", "bin", "msgpack"):
            endings = [f"{stem}{mark}{shard}.{kind}" for stem in ALL_STEMS for shard in ("", "-?????-of-?????")]
            wanted = ["model_index.json", "*/*.json", "*/*.txt", *(f"{p}/{e}" for p in lacking for e in endings)]
            source = {"revision": args.revision, "cache_dir": args.cache_dir}
            folder = Path(snapshot_download(name, allow_patterns=wanted, **source))
            lacking = [part for part, stem in STEMS.items() if not _has_weights(folder / part, stem, args.variant)]
            if not lacking:
                return folder
    return folder


def _has_weights(part: Path, stem: str, variant: str | None) -> bool:
    try:
        return all(file.is_file() for file in find_files(part, stem, variant_of(part, variant)))
    except FileNotFoundError:
        return False


def frozen(pipeline: Pipeline, clip_skip: int) -> tuple:
    """VAE and text encoder as they are run: matrices in the dtype of their arithmetic, the text encoder up to the layer
    of --clip_skip. Vectors, e.g. of norms, stay float32.
    """
    dtype = pipeline.dtype
    both = (pipeline.vae, networks.skip_layers(pipeline.text_encoder, clip_skip))
    return jax.tree.map(lambda array: array.astype(dtype) if array.ndim > 1 else array, both)


def save(pipeline: Pipeline, unet, folder: Path, variant: str | None) -> None:
    """Write the pipeline with the trained `unet` in it, for StableDiffusionPipeline.from_pretrained."""
    for part, network in {"unet": unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}.items():
        networks.save(network, folder / part)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    spare_parts.carry_over(pipeline.folder, variant, folder)


@jax.jit
def encode_text(text_encoder, input_ids):
    """The states of captions (B, chunks, tokens), joined as in model/networks.encode_text."""
    count, chunks, tokens = input_ids.shape
    states = text_encoder(input_ids.reshape(-1, tokens)).reshape(count, chunks, tokens, -1)
    within = states[:, :, 1:-1].reshape(count, chunks * (tokens - 2), -1)
    return jnp.concatenate([states[:, 0, :1], within, states[:, -1, -1:]], axis=1)


@jax.jit
def predict_guided(unet, latents, timestep, text_states, scale):
    """Classifier-free guidance, arXiv:2207.12598 equation 6. `text_states`: empty caption, then prompt.

    (1, C, h, w) to (1, C, h, w) float32.
    """
    both = jnp.moveaxis(jnp.concatenate([latents, latents]), 1, -1)
    without, prompted = jnp.split(unet(both, jnp.full(2, timestep), text_states).astype(jnp.float32), 2)
    return jnp.moveaxis(without + scale * (prompted - without), -1, 1)


@jax.jit
def decode_latents(vae, latents):
    """Scaled latents (1, C, h, w) to pixels (H, W, 3) in 0..1."""
    pixels = vae.decode(jnp.moveaxis(latents, 1, -1) / vae.config["scaling_factor"])[0]
    return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)
