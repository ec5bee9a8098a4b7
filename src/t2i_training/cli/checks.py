"""Parses and checks the command line without importing torch, so that usage errors come at once.

Everything that can be checked before models and data are opened is checked here. A message names the flag and what to
do. No flag is parsed and then ignored: a combination that a script cannot honour is refused.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from ..errors import Unfit
from ..sources import data_faults, data_files, model_kind, names, weight_files
from . import config_file, packages
from .flags import LR_SCHEDULERS, TRACKERS

_NEEDS = {  # flag -> the flag without which it has no effect
    "offload_ema": "use_ema", "foreach_ema": "use_ema",
    "dataset_config_name": "dataset_name", "aspect_ratio_buckets": "use_aspect_ratio_buckets",
    "hub_token": "push_to_hub", "hub_model_id": "push_to_hub",
    "dream_detail_preservation": "dream_training", "encodings_dir": "cache_encodings", "cache_crops": "cache_encodings",
}  # fmt: skip
_WRITTEN = ("single_file.safetensors", "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors")
_NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, trained: model_kind.Trained) -> argparse.Namespace:
    """Parse and check; exits with status 2 and one line on stderr when something is wrong.

    The values of `--config FILE` come before those of the command line, so the command line wins; `--switch=false`
    turns off a switch that the file turns on. Nothing changes the arguments afterwards. Besides the flags they hold
    `typed`, the names of the flags that were given, and in every script `validation_prompts`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    tokens = config_file.switch_off(parser, config_file.tokens(parser, argv) + argv)
    args = parser.parse_args(tokens)
    if importlib.util.find_spec("fcntl") is None:
        parser.error("file locks (fcntl) and forked loader workers need Linux or macOS: on Windows, run it in WSL")
    args.typed = parser.typed(tokens)
    _normalize(args)
    packages.hide_unused(args)
    check(parser, args, trained)
    return args


def _normalize(args: argparse.Namespace) -> None:
    """Bring equivalent values into one form."""
    names.expand_home(args)
    args.report_to = ",".join(dict.fromkeys(name.strip() for name in args.report_to.split(",")))
    args.hub_token = args.hub_token and args.hub_token.strip()
    if getattr(args, "caption_extension", None):
        args.caption_extension = f".{args.caption_extension.lstrip('.')}"
    if hasattr(args, "validation_prompt"):  # several images of one prompt are treated as several prompts
        args.validation_prompts = (
            [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []
        )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, trained: model_kind.Trained) -> None:
    """Refuse what cannot work, by `parser.error`. Opens no model and no data set."""
    _check_texts(parser, args)
    _check_combinations(parser, args)
    _check_compiler(parser, args)
    _check_objective(parser, args)
    _check_reporting(parser, args)
    names.check(parser, args)
    _take_rank(parser, args)
    if hasattr(args, "dataset_name"):  # a script without flags.add_data_source_args opens its own data set
        _check_data_source(parser, args)
    _check_paths(parser, args)
    _check_resume(parser, args)
    model_kind.check_folders(parser, args, trained)


def _check_texts(parser, args):
    """Refuse characters that are invalid in paths, prompts or requests to the hub."""
    for name, value in vars(args).items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, str) and "\0" in item for item in items):
            parser.error(f"--{name} holds a null character")
        if name.startswith("validation_prompt") and re.search("[\ud800-\udfff]", " ".join(items if value else [])):
            parser.error(f"--{name} holds bytes that are not UTF-8")
        if value == "" and name != "validation_prompt":
            parser.error(f"--{name} is empty")
    if args.hub_token is not None and not re.fullmatch("[!-~]+", args.hub_token):
        parser.error("--hub_token holds characters that no token has")


def _check_combinations(parser, args):
    for name, needed in _NEEDS.items():
        value = getattr(args, name, None)
        is_set = value is not None and value is not False and value != parser.get_default(name)
        if is_set and not getattr(args, needed):
            parser.error(f"--{name} does nothing without --{needed}: add --{needed}, or leave --{name} out")
    if getattr(args, "center_crop", False) and getattr(args, "cache_crops", None) != parser.get_default("cache_crops"):
        parser.error("--cache_crops does nothing with --center_crop: leave one of them out")
    for package, name in packages.FLAGS.items():
        if getattr(args, name, False) and importlib.util.find_spec(package) is None:
            parser.error(f"--{name} needs the package {package}: pip install {package}, or leave the flag out")
    if getattr(args, "keep_tokens", 0) and not (args.shuffle_caption or args.caption_tag_dropout_rate):
        tags = "--shuffle_caption or --caption_tag_dropout_rate"
        parser.error(f"--keep_tokens does nothing without {tags}: add one of them, or leave --keep_tokens out")
    if getattr(args, "use_aspect_ratio_buckets", False) and not args.aspect_ratio_buckets and args.resolution < 256:
        parser.error(
            f"--use_aspect_ratio_buckets at --resolution {args.resolution}: its shapes are multiples of 64, too coarse "
            "below 256: name shapes with --aspect_ratio_buckets"
        )
    _check_tool_files(parser, args)
    _check_schedule(parser, args)


def _check_tool_files(parser, args):
    """Refuse flags for a file that is not written."""
    switch = next((name for name in ("save_single_file", "save_kohya") if hasattr(args, name)), None)
    if switch is None or getattr(args, switch):
        return
    for name in ("save_precision", "metadata_title", "metadata_license", "metadata_trigger_phrase"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} does nothing without --{switch}: add --{switch}, or leave --{name} out")


def _take_rank(parser, args):
    """With --network_weights the rank is the file's."""
    file = getattr(args, "network_weights", None)
    if file is None:
        return
    if not Path(file).is_file():
        kind = "a folder: name the file in it" if Path(file).is_dir() else "no file"
        parser.error(f"--network_weights {file} is {kind}")
    try:
        rank = weight_files.lora_rank(Path(file))
    except Unfit as error:
        parser.error(f"--network_weights {file} {error}")
    if "rank" in args.typed and args.rank != rank:
        parser.error(f"--rank {args.rank}: --network_weights {file} has adapters of rank {rank}: leave --rank out")
    args.rank = rank


def _check_schedule(parser, args):
    name = args.lr_scheduler.partition(":")[0]
    if name in ("constant", "piecewise_constant") and args.lr_warmup_steps not in (
        0, parser.get_default("lr_warmup_steps"),
    ):  # fmt: skip
        parser.error(
            f"--lr_warmup_steps does nothing with --lr_scheduler {name}: take constant_with_warmup, or leave it out"
        )
    if name == "piecewise_constant":
        if not re.fullmatch(rf"piecewise_constant:({_NUMBER}:\d+,)+{_NUMBER}", args.lr_scheduler):
            parser.error(
                "--lr_scheduler piecewise_constant takes its rules after a colon, e.g. "
                "piecewise_constant:1:1000,0.1:2000,0.01 (factor:until_step, ..., last factor)"
            )
    elif args.lr_scheduler not in LR_SCHEDULERS:
        parser.error(f"--lr_scheduler must be one of {', '.join(LR_SCHEDULERS)}, not {args.lr_scheduler!r}")


def _check_compiler(parser, args):
    """Check what torch.compile needs besides torch; it would fail in the first step, with hundreds of lines."""
    if not getattr(args, "torch_compile", None):
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++").split()[0]
    torch = Path(importlib.util.find_spec("torch").origin).parent
    if shutil.which(compiler) is None:
        lacks = f"a C++ compiler, and there is no {compiler}: install it, name another in CXX"
    elif not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        lacks = "Python.h, which comes with Python's development files: install those (python3-dev)"
    elif (torch / "lib" / "libtorch_cuda.so").exists() and importlib.util.find_spec("triton") is None:
        lacks = "the package triton: pip install triton"
    else:
        return
    parser.error(f"--torch_compile needs {lacks}, or leave the flag out")


def _check_objective(parser, args):
    if not hasattr(args, "prediction_type"):
        return
    if args.prediction_type not in (None, "epsilon", "v_prediction"):
        parser.error(f"--prediction_type must be epsilon or v_prediction, not {args.prediction_type!r}")
    prediction_type = args.prediction_type or _local_prediction_type(args.pretrained_model_name_or_path)
    if getattr(args, "dream_training", False) and prediction_type == "v_prediction":
        parser.error("--dream_training needs epsilon prediction, and this is a v_prediction run: leave the flag out")


def _local_prediction_type(model: str) -> str | None:
    try:
        return json.loads((Path(model) / "scheduler" / "scheduler_config.json").read_text()).get("prediction_type")
    except (OSError, ValueError):  # a hub model: the script checks again once it is loaded
        return None


def _check_reporting(parser, args):
    trackers = args.report_to.split(",")
    for tracker in trackers:  # each named as its package
        if tracker not in TRACKERS:
            parser.error(f"--report_to must be one of {', '.join(TRACKERS)}, not {tracker!r}")
        if tracker in ("all", "none") and len(trackers) > 1:
            parser.error(f"--report_to {tracker} stands alone, not in {args.report_to!r}")
        if tracker not in ("all", "none") and importlib.util.find_spec(tracker) is None:
            parser.error(f"--report_to {tracker} needs the package {tracker}: pip install {tracker}")
    if not {"tensorboard", "none"}.issuperset(trackers) and args.hub_token is not None:
        parser.error(
            f"--report_to {args.report_to} together with --hub_token could publish the token; "
            "log in with `hf auth login` and leave --hub_token out"
        )


def _check_folder(parser, args):
    """Check by file names that a data folder holds images, and captions if the script needs them."""
    if args.dataset_name is None and not Path(args.train_data_dir).is_dir():
        fault = " is a file" if Path(args.train_data_dir).exists() else ": there is no such folder"
        parser.error(f"--train_data_dir {args.train_data_dir}{fault}")
    place = data_files.local_folder(args)
    if place is not None and (fault := data_faults.refusal(place, args)):
        flag = "train_data_dir" if args.dataset_name is None else "dataset_name"
        parser.error(f"--{flag} {place} {fault}")


def _check_data_source(parser, args):
    """Check the flags that `open_dataset` reads."""
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error(
            "no data: give --dataset_name, or --train_data_dir with a folder of captioned images "
            "(a script that opens a data set of its own leaves out flags.add_data_source_args)"
        )
    if args.caption_extension and (args.caption_column is None or data_files.local_folder(args) is None):
        where = "a folder of images and captions, by --train_data_dir"
        parser.error(f"--caption_extension does nothing here: it is for {where}: leave it out")
    _check_folder(parser, args)
    kinds = {"metadata.jsonl": "folder of captioned images", "state.json": "data set of save_to_disk"}
    for kind in [kinds[name] for name in kinds if args.dataset_name and Path(args.dataset_name, name).is_file()]:
        for name in ("train_data_dir", "dataset_config_name"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} does nothing here: {args.dataset_name} is read as a {kind}")
    source = "train_data_dir" if args.dataset_name is None else "dataset_name"
    data = Path(getattr(args, source)).resolve()
    if data.is_dir() and Path(args.output_dir).resolve().is_relative_to(data):
        parser.error(f"--output_dir {args.output_dir} is inside --{source}: its images would become training data")


def _check_paths(parser, args):
    if args.log_file is not None and Path(args.log_file).is_dir():
        parser.error(f"--log_file {args.log_file} is a folder: name a file in it")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        parser.error(f"--output_dir {output_dir} is a file")
    sources = [name for name in vars(args) if name.startswith("pretrained_") or name == "network_weights"]
    for name, source in ((name, Path(getattr(args, name))) for name in sources if getattr(args, name)):
        if source.is_dir() and output_dir.resolve() == source.resolve():
            parser.error(f"--output_dir {output_dir} is the model of --{name}, which would be overwritten")
        if source.name in _WRITTEN and output_dir.resolve() == source.resolve().parent:
            parser.error(f"--output_dir {output_dir} holds {source} of --{name}, which would be overwritten")


def _check_resume(parser, args):
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted not in (None, "latest") and not (output_dir / wanted).is_dir() and not Path(wanted).is_dir():
        parser.error(f"--resume_from_checkpoint {wanted}: no such checkpoint, in {output_dir} or as a path")
    if wanted is None and list(output_dir.glob("checkpoint-*/manifest.json")):
        parser.error(
            f"--output_dir {output_dir} holds checkpoints of an earlier run: "
            "continue it with --resume_from_checkpoint latest, or choose another folder"
        )
    if wanted == "latest":  # refuse if another script's checkpoint is newer than ours
        found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        ours = [path for path in found if (path / "manifest.json").is_file()]
        other = max(filter(_is_of_another_script, found), key=_number, default=None)
        newest = max(map(_number, ours), default=-1)
        if other and _number(other) > newest:
            instead = "to continue from the last checkpoint of these scripts" if ours else "to start from the beginning"
            parser.error(f"--resume_from_checkpoint latest: {_not_ours(other)}, {instead}{_its_weights(other)}")
    elif wanted is not None:
        folder = output_dir / wanted if (output_dir / wanted).is_dir() else Path(wanted)
        if _is_of_another_script(folder):
            parser.error(f"--resume_from_checkpoint {wanted}: {_not_ours(folder)}{_its_weights(folder)}")


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _is_of_another_script(folder: Path) -> bool:
    """Whether the folder was written by accelerate's `save_state`. One of ours without a manifest is damaged."""
    written = ("random_states_*.pkl", "scheduler.bin", "model*.safetensors", "pytorch_model*")
    return not (folder / "manifest.json").is_file() and any(any(folder.glob(name)) for name in written)


def _not_ours(folder: Path) -> str:
    return (
        f"{folder} has no manifest.json: another script wrote it, whose optimizer and position "
        "cannot be continued here; move it away"
    )


def _its_weights(folder: Path) -> str:
    for part in ("unet", "prior"):
        if (folder / part / "config.json").is_file():
            return f"; to start from its weights, copy its {part}/ over that in a copy of the base model's folder"
    return ""
