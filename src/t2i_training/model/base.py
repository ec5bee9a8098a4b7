"""Loads the Stable Diffusion to fine-tune: a folder, a hub repository or a single file, perhaps with another VAE."""

import contextlib
import os
import pickle
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from ..errors import RunError, Unfit
from ..library_errors import readable_errors
from ..log import logger
from ..sources import families, original_files
from . import networks, original_names, spare_parts


def load_pipeline(args, exported: bool = False, **parts) -> StableDiffusionPipeline:
    """The pipeline --pretrained_model_name_or_path, in fp32 on the CPU, with the VAE of
    --pretrained_vae_model_name_or_path if that is given.

    If all of it will be `exported`, what only the export needs is downloaded now. `parts` replace the pipeline's own;
    one that is None is not loaded.
    """
    name = args.pretrained_model_name_or_path
    with readable_errors("--pretrained_model_name_or_path", name):
        if exported:
            spare_parts.fetch(args)
        if args.pretrained_vae_model_name_or_path is not None:
            parts["vae"] = load_vae(args)
        if os.path.isfile(name):
            pipeline = _from_single_file(Path(name), args, parts)
        else:
            source = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
            pipeline = StableDiffusionPipeline.from_pretrained(name, **source, **spare_parts.NOT_LOADED | parts)
        networks.standardize(pipeline)
    if pipeline.unet is not None and pipeline.vae.config.latent_channels != pipeline.unet.config.in_channels:
        raise RunError(
            f"--pretrained_vae_model_name_or_path {args.pretrained_vae_model_name_or_path}: its latents have "
            f"{pipeline.vae.config.latent_channels} channels, and the model reads {pipeline.unet.config.in_channels}"
        )
    return pipeline


def _from_single_file(file: Path, args, parts: dict) -> StableDiffusionPipeline:
    """By diffusers, with configurations from here: by itself it would fetch them from the hub."""
    tensors, texts = _contents(file)
    found = original_files.identify(file, tensors, texts, "vae" not in parts, args.prediction_type)
    needed = [part for part in original_names.PREFIXES if part not in parts]
    if lacking := original_names.lacking(tensors, found.configurations, needed):
        more = f" and {len(lacking) - 1} more tensors" if lacking[1:] else ""
        raise Unfit(f"lacks {lacking[0]}{more}: download it again")
    logger.info(f"{file.name}: {found.description}")
    with _with_configurations(file, found.configurations) as (link, config):
        return StableDiffusionPipeline.from_single_file(link, config=config, local_files_only=True, **parts)


@contextlib.contextmanager
def _with_configurations(file: Path, configurations: dict):
    """Yields, for `from_single_file`, the file's path and that of a folder with the configurations."""
    with tempfile.TemporaryDirectory() as folder:
        families.write(configurations, Path(folder))
        link = Path(folder, f"model{file.suffix.lower()}")  # diffusers goes by the suffix, in small letters
        link.symlink_to(file.resolve())
        yield str(link), folder


def _contents(file: Path) -> tuple[dict[str, tuple], dict[str, str]]:
    """The tensors' shapes by name, and the texts in the header. Unfit for a .ckpt with anything that could run code."""
    if file.suffix.lower() == ".safetensors":
        return original_files.read(file)
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        raise Unfit(
            "holds Python objects besides tensors, which could run any code: "
            "take the model's .safetensors, or convert it on a machine that you can lose"
        ) from None
    while isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return {name: tuple(value.shape) for name, value in content.items() if isinstance(value, torch.Tensor)}, {}


def load_non_ema_unet(args) -> UNet2DConditionModel:
    """The UNet of --non_ema_revision, in fp32."""
    name, source = args.pretrained_model_name_or_path, {"variant": args.variant, "cache_dir": args.cache_dir}
    with readable_errors("--non_ema_revision", args.non_ema_revision):
        return UNet2DConditionModel.from_pretrained(
            name, subfolder="unet", revision=args.non_ema_revision, **source
        ).float()


def load_vae(args) -> AutoencoderKL:
    """--pretrained_vae_model_name_or_path: a VAE's or a pipeline's folder or hub name, or a single file."""
    name = args.pretrained_vae_model_name_or_path
    with readable_errors("--pretrained_vae_model_name_or_path", name):
        if os.path.isfile(name):
            # Of files by others: the configuration of every Stable Diffusion 1.x and 2.x.
            configurations = original_files.stated_configurations(_contents(Path(name))[1]) or families.SD1
            with _with_configurations(Path(name), configurations) as (link, config):
                vae = AutoencoderKL.from_single_file(link, config=config, subfolder="vae", local_files_only=True)
        else:
            vae = AutoencoderKL.from_pretrained(name, subfolder=_vae_subfolder(name, args), cache_dir=args.cache_dir)
        return networks.to_whole(vae, "it", torch.float32)


def _vae_subfolder(name: str, args) -> str | None:
    """vae for a whole pipeline."""
    if os.path.isdir(name):
        return None if Path(name, "config.json").is_file() else "vae"
    try:
        AutoencoderKL.load_config(name, cache_dir=args.cache_dir)
    except OSError:  # of a pipeline; if the hub cannot be reached, what follows says so
        return "vae"
    return None
