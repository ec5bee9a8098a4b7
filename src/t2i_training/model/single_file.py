"""A whole Stable Diffusion 1.x or 2.x in one safetensors file, with the tensors' original names (github.com/CompVis):
what A1111, ComfyUI and model sites take. diffusers reads such files and writes none.

    python -m t2i_training.model.single_file my_model                          # a finished run's output folder
    python -m t2i_training.model.single_file my_model/checkpoint-500 --base stable-diffusion-v1-5/stable-diffusion-v1-5

writes single_file.safetensors into the folder that is given.
"""

import argparse
import json
import tempfile
from pathlib import Path

from .. import sanitize
from ..cli import flags
from ..errors import Unfit
from ..files import atomic_write
from ..library_errors import readable_errors
from ..log import logger
from ..sources import clip_vocabulary, families
from ..sources.original_files import CONFIGURATIONS
from . import base, tensor_file
from .original_names import PREFIXES, original_layout
from .tensor_file import Lazy

NAME = "single_file.safetensors"


def write(folder: Path, args) -> None:
    """Write a pipeline's folder, as a run has exported it, into one file in it, with --save_precision and --metadata_*.

    Reads one tensor at a time. A failure, e.g. a full disk, leaves the folder as it is, and a warning says so.
    """
    try:
        tensors, configurations = read_folder(folder)
        texts = _modelspec(configurations, args, args.resolution)
        write_tensors(folder / NAME, tensors, configurations, args.save_precision, texts)
    except (OSError, ValueError, Unfit) as error:
        (folder / NAME).unlink(missing_ok=True)
        logger.warning(
            f"{NAME} cannot be written ({sanitize.reason(error)[:200]}): the model's folder is complete; make the file "
            f"from it with: python -m t2i_training.model.single_file {args.output_dir}"
        )


def write_tensors(file: Path, tensors: dict[str, Lazy], configurations: dict, precision: str, texts: dict) -> None:
    """Write them with a header that says what the model is, and from which the scripts build it again."""
    texts = {"format": "pt", **texts, CONFIGURATIONS: json.dumps(configurations, sort_keys=True)}
    tensor_file.write(file, tensors, precision, lambda sha256: texts | {"modelspec.hash_sha256": f"0x{sha256}"})


def _modelspec(configurations: dict, args, resolution: int) -> dict[str, str]:
    is_v2 = configurations["text_encoder/config.json"].get("hidden_act") == "gelu"
    is_v = configurations["scheduler/scheduler_config.json"].get("prediction_type") == "v_prediction"
    return tensor_file.modelspec(args, resolution, is_v2, is_v)


def read_folder(folder: Path) -> tuple[dict[str, Lazy], dict]:
    """(tensors under their original names, configurations) of a pipeline's folder."""
    configurations = read_configurations(folder)
    return original_layout({part: _tensors(folder / part) for part in PREFIXES}, configurations), configurations


def read_configurations(folder: Path) -> dict:
    """A pipeline's *.json by name, without local paths; of the tokenizer all files, if its vocabulary is not CLIP's."""
    found = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in families.SD1}
    for config in found.values():
        config.pop("_name_or_path", None)
    return found | _vocabulary(folder / "tokenizer")


def _vocabulary(tokenizer: Path) -> dict[str, str]:
    """The files that hold a tokenizer's vocabulary, unless it is CLIP's."""
    if (tokenizer / "tokenizer.json").is_file():
        content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        content |= {"padding": None, "truncation": None}  # of the last call
        vocabulary, files = content["model"]["vocab"], {"tokenizer.json": json.dumps(content, ensure_ascii=False)}
    else:
        files = {name: (tokenizer / name).read_text(encoding="utf-8") for name in ("vocab.json", "merges.txt")}
        vocabulary = json.loads(files["vocab.json"])
    if vocabulary == clip_vocabulary.vocabulary():
        return {}
    return {f"tokenizer/{name}": text for name, text in files.items()}


def convert(args) -> tuple[Path, Path]:
    """Write the single file of an exported folder, or of a checkpoint with the rest of its base.

    Returns its path, and the folder of the UNet in it: of a checkpoint the average's, if there is one.
    """
    folder = trained = Path(args.folder)
    if (folder / "model_index.json").is_file():
        if args.pretrained_model_name_or_path is not None:
            raise Unfit("is a whole pipeline: leave --base out")
        tensors, configurations = read_folder(folder)
    elif (folder / "unet" / "config.json").is_file():
        if args.pretrained_model_name_or_path is None:
            raise Unfit("is a checkpoint, which has no VAE and no text encoder: add --base, the model it began with")
        trained = folder / ("unet_ema" if (folder / "unet_ema").is_dir() else "unet")
        configurations, parts = _rest_of(args)
        configurations["unet/config.json"] = json.loads((trained / "config.json").read_text(encoding="utf-8"))
        tensors = original_layout({"unet": _tensors(trained), **parts}, configurations)
    else:
        raise Unfit("holds neither a pipeline nor a checkpoint with a UNet; LoRA adapters are a file of their own")
    side = configurations["vae/config.json"].get("sample_size", 512)
    with atomic_write(folder / NAME) as partial:
        texts = _modelspec(configurations, args, side)
        write_tensors(partial, tensors, configurations, args.save_precision, texts)
    return folder / NAME, trained


def _tensors(part: Path) -> dict[str, Lazy]:
    files = list(part.glob("*model.safetensors"))
    if len(files) != 1:
        raise Unfit(f"has no {part.name}/ with its weights in one .safetensors")
    return tensor_file.tensors(files[0])


def _rest_of(args) -> tuple[dict, dict[str, dict[str, Lazy]]]:
    """(configurations, tensors of VAE and text encoder) of the base."""
    pipeline = base.load_pipeline(args, unet=None)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_config(folder)
        pipeline.vae.save_config(Path(folder, "vae"))
        pipeline.text_encoder.config.save_pretrained(Path(folder, "text_encoder"))
        pipeline.scheduler.save_pretrained(Path(folder, "scheduler"))
        pipeline.tokenizer.save_pretrained(Path(folder, "tokenizer"))
        Path(folder, "unet").mkdir()
        Path(folder, "unet", "config.json").write_text("{}")
        configurations = read_configurations(Path(folder))
    if args.prediction_type is not None:
        configurations["scheduler/scheduler_config.json"]["prediction_type"] = args.prediction_type
    parts = {part: getattr(pipeline, part).state_dict() for part in ("vae", "text_encoder")}
    return configurations, {
        part: {name: tensor_file.of(tensor) for name, tensor in tensors.items()} for part, tensors in parts.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m t2i_training.model.single_file", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="Output folder of a finished run, or one of its checkpoints.")
    text = "For a checkpoint: the model that the run began with (folder, hub name or single file)."
    names = ("--base", "--pretrained_model_name_or_path")  # the scripts' own name, which messages have
    parser.add_argument(*names, dest="pretrained_model_name_or_path", metavar="MODEL", help=text)
    parser.add_argument("--revision", help="Its branch, tag or commit on the hub.")
    parser.add_argument("--variant", help="Variant of its weight files, e.g. fp16.")
    parser.add_argument("--cache_dir", help="Folder where downloaded models are kept.")
    parser.add_argument(
        "--pretrained_vae_model_name_or_path", metavar="VAE", help="For a checkpoint: the VAE that the run was given."
    )
    text = "For a checkpoint: what the run was told to predict."
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], help=text)
    flags.add_tool_file_args(parser)
    args = parser.parse_args(argv)
    with readable_errors("folder", args.folder):
        file, trained = convert(args)
    print(f"{file} ({file.stat().st_size / 2**30:.2f} GiB, {args.save_precision}), the UNet from {trained}")


if __name__ == "__main__":
    main()
