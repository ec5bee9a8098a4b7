"""Determines the kind of a model from its configuration files, before the data is opened and without torch.

A folder is checked with the flags, a hub repository right before the data set is opened: its configuration files are
small, while downloading its weights takes long.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import sanitize
from ..errors import RunError, Unfit
from ..log import logger
from . import names, original_files, stand_ins, weight_files

_NEEDS = {  # kind -> the parts of its pipeline, and its description for the user
    "model": (
        ("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
        "a Stable Diffusion 1.x or 2.x is needed: a VAE, one text encoder, and a UNet that reads its latents alone",
    ),
    "decoder": (
        ("unet", "movq", "scheduler"),
        "a decoder of Kandinsky 2.2 is needed: MoVQ, and a UNet that reads its latents and image embeddings alone",
    ),
    "prior": (
        ("prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor"),
        "a prior of Kandinsky 2.2 is needed: the prior with both CLIP encoders",
    ),
}


@dataclass(frozen=True)
class Trained:
    """What a script trains, and the types of weight files that it reads, in order of preference."""

    kind: str  # a key of _NEEDS
    weights: tuple[str, ...] = ("safetensors", "bin")


STABLE_DIFFUSION, PRIOR, DECODER = Trained("model"), Trained("prior"), Trained("decoder")
STABLE_DIFFUSION_IN_JAX = Trained("model", ("safetensors", "bin", "msgpack"))
_NETWORKS = ("unet", "vae", "movq", "prior", "text_encoder", "image_encoder")  # the parts with weights
_CONFIGURATIONS = {"scheduler": "scheduler_config.json", "image_processor": "preprocessor_config.json"}


def check_folders(parser, args, trained: Trained) -> None:
    """Refuse local models of another kind than the script trains. Reads only configuration files and headers."""
    if trained.kind == "model":
        _check_single_file(parser, args)
    for flag, kind in _models(args):
        folder = Path(getattr(args, flag))
        if os.path.isdir(folder):  # unlike Path.is_dir, it accepts names that are too long
            _refuse_revisions(parser, args, folder)
            try:
                _check_folder(folder, kind, args, trained)
            except Unfit as error:
                parser.error(f"--{flag} {folder} {sanitize.printable(str(error))}")
            except OSError as error:
                parser.error(f"--{flag} {folder} cannot be read: {error.strerror}")
    if all(os.path.isdir(getattr(args, flag)) for flag, _ in _models(args)):
        try:
            _check_pair(args)
        except Unfit as error:
            parser.error(str(error))


def check_hub(args, trained: Trained) -> None:
    """The same for hub names. Exits with one line."""
    for flag, kind in _models(args):
        name = getattr(args, flag)
        if os.path.exists(name) or not _is_used(args, flag, trained):
            continue
        try:
            _check_repository(args, flag, name, kind, trained)
        except Unfit as error:
            raise RunError(f"--{flag} {name} {sanitize.printable(str(error))}") from None


def _check_single_file(parser, args) -> None:
    file, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    if vae is not None and os.path.isfile(vae) and not vae.lower().endswith(original_files.SUFFIXES):
        parser.error(f"--pretrained_vae_model_name_or_path {vae} is no .safetensors or .ckpt")
    if not os.path.isfile(file):
        return
    for flag in ("revision", "non_ema_revision", "variant"):
        if getattr(args, flag, None):
            parser.error(f"--{flag} does nothing with a single file, {file}: leave it out")
    try:
        original_files.check(Path(file), needs_vae=vae is None, prediction_type=args.prediction_type)
    except Unfit as error:
        parser.error(f"--pretrained_model_name_or_path {file} {sanitize.printable(str(error))}")


def _models(args) -> list[tuple[str, str]]:
    """(flag, kind) of each model that a script takes."""
    return [(f, f.split("_")[1]) for f in vars(args) if re.fullmatch("pretrained_((prior|decoder)_)?model_.*", f)]


def _is_used(args, flag: str, trained: Trained) -> bool:
    """Whether the run loads this model: a prior's run needs a decoder only for validation."""
    return "decoder" not in flag or trained.kind == "decoder" or bool(args.validation_prompts)


def _reads_image_encoder_alone(kind: str, args, trained: Trained) -> bool:
    """Whether the run, a decoder's, loads only the image encoder of a prior."""
    return kind == "prior" and trained.kind == "decoder" and not args.validation_prompts


def _refuse_revisions(parser, args, folder: Path) -> None:
    for flag, value in vars(args).items():
        if flag.endswith("revision") and value is not None:
            parser.error(f"--{flag} names a revision on the hub, and {folder} is a folder here: leave --{flag} out")


# Folders


def _check_folder(folder: Path, kind: str, args, trained: Trained) -> None:
    if not (folder / "model_index.json").is_file():
        if _reads_image_encoder_alone(kind, args, trained) and (folder / "image_encoder" / "config.json").is_file():
            return
        raise Unfit(f"{_what_instead(folder, kind)}; {_NEEDS[kind][1]}")

    def read(name: str) -> dict | None:
        return _parse(folder / name) if (folder / name).is_file() else None

    index = read("model_index.json")
    _check_kind(index, read, kind, trained)
    files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    for part in _NEEDS[kind][0]:
        if not (folder / part).is_dir():
            raise Unfit(f"has no folder {part}, which its model_index.json names: it was not copied completely")
    _check_configurations(_NEEDS[kind][0], files)
    _check_weights(kind, files, folder, args, trained)


def _networks(kind: str) -> list[str]:
    return [part for part in _NETWORKS if part in _NEEDS[kind][0]]


def _check_weights(kind: str, files, folder: Path | None, args, trained: Trained) -> None:
    choose = trained.kind == "model"  # Kandinsky's scripts have no --variant; `source` chooses one
    variant = args.variant if choose else None
    weight_files.check(_networks(kind), files, folder, trained.weights, variant, choose)


def _check_configurations(parts, files) -> None:
    """Raise Unfit unless each part has its files besides weights."""
    for part in parts:
        if part == "tokenizer":
            old = {"tokenizer/vocab.json", "tokenizer/merges.txt"}
            if "tokenizer/tokenizer.json" not in files and not old.issubset(files):
                lacks = "neither tokenizer/tokenizer.json nor tokenizer/vocab.json with tokenizer/merges.txt"
                raise Unfit(f"has {lacks}: it was not copied completely")
        elif (file := f"{part}/{_CONFIGURATIONS.get(part, 'config.json')}") not in files:
            raise Unfit(f"has no {file}: it was not copied completely")


def _parse(file: Path) -> dict:
    where = "/".join(file.parts[-2:]) if file.name != "model_index.json" else file.name
    try:
        content = file.read_bytes()
        if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):  # diffusers rejects it too
            raise Unfit(f"holds a {where} that begins with a byte order mark: save it as UTF-8 without BOM")
        if instead := stand_ins.of_content(content[:1000]):
            raise Unfit(f"cannot be read: {where} is {instead}")
        found = json.loads(content)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {sanitize.reason(error)[:200]}"
        raise Unfit(f"holds a {where} that cannot be read ({reason})") from None
    if not isinstance(found, dict):
        raise Unfit(f"holds a {where} that is not a configuration")
    return found


def _what_instead(folder: Path, kind: str) -> str:
    """What a folder without model_index.json is, for the message."""
    inside = {path.name for path in folder.iterdir()}
    below = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/model_index.json"))
    if below:
        return f"holds no model_index.json, but {below[0]} does: give that"
    if "manifest.json" in inside or {"optimizer.bin", "scheduler.bin"} & inside:
        return "is a checkpoint of a training run, for --resume_from_checkpoint, and not a whole pipeline"
    if "adapter_config.json" in inside or any(re.search("lora|adapter_model", name) for name in inside):
        train_on = f", and to train them on: --output_dir={folder} --resume_from_checkpoint=latest"
        has_checkpoints = any(re.fullmatch(r"checkpoint-\d+", name) for name in inside)
        base = "give the base that they were trained on"
        return f"holds LoRA adapters, and no model: {base}{train_on if has_checkpoints else ''}"
    whole = f": give {folder.parent}" if (folder.parent / "model_index.json").is_file() else ""
    if "config.json" in inside:
        config = _parse(folder / "config.json")
        name = config.get("_class_name") or (config.get("architectures") or [None])[0] or config.get("model_type")
        return f"is one network ({name}), and not a whole pipeline{whole}"
    if whole:
        return f"is a part of a pipeline{whole}"
    if any(re.fullmatch(r"checkpoint-\d+", name) for name in inside):
        return "is the output folder of a training run that has not come to its end"
    single = sorted(name for name in inside if name.lower().endswith(original_files.SUFFIXES))
    if kind == "model" and single:
        return f"holds no model_index.json: give the single file itself, {folder / single[0]}"
    parts = sorted(inside & {*_NETWORKS, "tokenizer", "scheduler"})
    found = f" (but {', '.join(parts)})" if parts else ""
    return f"holds no model_index.json{found}: it is no pipeline of diffusers"


# Repositories


def _check_repository(args, flag: str, name: str, kind: str, trained: Trained) -> None:
    from huggingface_hub import hf_hub_download

    revision = args.revision if trained.kind == "model" else None  # Kandinsky's scripts have no --variant
    source = {"repo_id": name, "revision": revision, "cache_dir": args.cache_dir}
    files = names.remote_files(args, flag, revision)

    def read(file: str) -> dict | None:
        if files is None:
            path = names.cached_file(file, **source)
        elif file in files:
            with names.hub_errors(args, flag):
                path = hf_hub_download(filename=file, **source)
        else:
            path = None
        return _parse(Path(path)) if path else None

    if files is not None and "model_index.json" not in files:
        if _reads_image_encoder_alone(kind, args, trained) and "image_encoder/config.json" in files:
            return
        adapters = any("lora" in file or "adapter_" in file for file in files)
        what = "holds LoRA adapters, and no model" if adapters else "holds no model_index.json"
        single = sorted(file for file in files if "/" not in file and file.lower().endswith(original_files.SUFFIXES))
        if kind == "model" and single and not adapters:
            raise Unfit(
                f"is no pipeline, but holds single files: download one, {single[0]} perhaps, and name that file"
            )
        raise Unfit(f"{what}; {_NEEDS[kind][1]}")
    index = read("model_index.json")
    _check_kind(index, read, kind, trained)
    if files is not None:
        _check_weights(kind, files, None, args, trained)


# Kinds


def _check_kind(index: dict, read: Callable[[str], dict | None], kind: str, trained: Trained) -> None:
    """Raise Unfit unless these configuration files are those of a pipeline of that kind."""
    name = index.get("_class_name") or "pipeline without a name"
    reason = _other_parts(index, name, kind, is_flax="msgpack" in trained.weights)
    if reason is None:
        reason = _quantised(read, kind) or (_other_unet(read, kind) if kind != "prior" else None)
    if reason:
        raise Unfit(f"is a {name}: {reason}; {_NEEDS[kind][1]}")


def _parts(index: dict) -> set[str]:
    """The names of a pipeline's parts, without empty ones."""
    return {part for part, entry in index.items() if isinstance(entry, list) and entry and entry[-1] is not None}


def _other_parts(index: dict, name: str, kind: str, is_flax: bool) -> str | None:
    has = _parts(index)
    classes = {str(index[part][-1]) for part in has}
    if kind == "model" and not is_flax and any(each.startswith("Flax") for each in classes):
        return "its networks are Flax's, which train_text_to_image_flax.py reads"
    if name == "KandinskyV22CombinedPipeline" and kind == "prior":
        return "take it apart with prior_pipe.save_pretrained(folder) and decoder_pipe.save_pretrained(folder)"
    missing = [part for part in _NEEDS[kind][0] if part not in has]
    if missing:
        other = [each for each, (parts, _) in _NEEDS.items() if has.issuperset(parts) and "model" not in (each, kind)]
        to = f", and is for --pretrained_{other[0]}_model_name_or_path" if other else ""
        return f"it has no {' and no '.join(missing)}{to}"
    if kind == "prior":
        return "it is of Kandinsky 2.1" if name == "KandinskyPriorPipeline" else None
    if "text_encoder_2" in has:
        return "it has two text encoders"
    if "AutoencoderTiny" in classes:
        return "its VAE is an AutoencoderTiny, which gives no distribution of latents"
    unet = str(index["unet"][-1])
    return None if unet.removeprefix("Flax") == "UNet2DConditionModel" else f"its UNet is a {unet}"


def _quantised(read, kind: str) -> str | None:
    for part in _networks(kind):
        if found := (read(f"{part}/config.json") or {}).get("quantization_config"):
            method = found.get("quant_method") if isinstance(found, dict) else None
            return f"its {part} is quantised ({method or 'by its config.json'}), which cannot be trained on or from"
    return None


def _other_unet(read, kind: str) -> str | None:
    """Refuse UNets with inputs besides latents, timestep, and text states or, for Kandinsky, image embeddings."""
    unet, vae = read("unet/config.json"), read("vae/config.json" if kind == "model" else "movq/config.json")
    if unet is None or vae is None:
        return None  # loading will report it
    added, wanted = unet.get("addition_embed_type"), {"model": None, "decoder": "image"}[kind]
    if added != wanted:
        known = {"text_time": " (SDXL's)", "text_image": " (Kandinsky 2.1's)", "image_hint": " (a ControlNet's)"}
        return f"its UNet reads {added or 'no'} conditions{known.get(added, '')} besides"
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        return "its UNet reads class labels besides"
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        known = {9: ", as for inpainting", 5: ", as with depth", 8: ", as for editing", 7: ", as for upscaling"}
        return f"its UNet has {channels} input channels{known.get(channels, '')}, and its latents have {latents}"
    text = (read("text_encoder/config.json") or {}).get("hidden_size") if kind == "model" else None
    width = unet.get("cross_attention_dim", 1280)
    if text and isinstance(width, int) and width != text:
        return f"its UNet reads text states of {width} numbers, and its text encoder gives {text}"
    return None


def _check_pair(args) -> None:
    """Refuse a prior and a decoder whose image embeddings differ in size."""
    flags = {kind: flag for flag, kind in _models(args)}
    if "decoder" not in flags:
        return
    given = Path(getattr(args, flags["prior"]), "image_encoder", "config.json")
    read = Path(getattr(args, flags["decoder"]), "unet", "config.json")
    sizes = [_parse(file).get(key) for file, key in ((given, "projection_dim"), (read, "encoder_hid_dim"))]
    if None not in sizes and sizes[0] != sizes[1]:
        raise Unfit(
            f"--{flags['prior']} gives image embeddings of {sizes[0]} numbers, "
            f"and --{flags['decoder']} expects {sizes[1]}: they do not belong together"
        )


# Weights


def source(args, flag: str, part: str | None = None) -> dict:
    """Options for `from_pretrained` of a Kandinsky model: without plain weights, a variant's are chosen."""
    name = getattr(args, flag)
    files = [path.relative_to(name).as_posix() for path in Path(name).glob("*/*")]
    if not Path(name).is_dir():
        files = names.remote_files(args, flag) or ()
    parts = [part] if part else _NETWORKS
    variants = {min(there) for each in parts if (there := weight_files.variants(files, each))} - {""}
    if not variants:
        return {"cache_dir": args.cache_dir}
    logger.info(f"--{flag} {name} has only weights of the variant {min(variants)}: these are used")
    return {"cache_dir": args.cache_dir, "variant": min(variants)}
