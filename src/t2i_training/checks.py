"""From a command line to checked arguments, without importing torch: a usage error answers in a blink.

Everything that can be known before models and data are opened is checked here, and said in one line that names the
flag and the way out. A flag is never parsed and ignored: a combination that a script cannot honour is refused.
"""

import argparse
import glob
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from . import settings
from .cli import LR_SCHEDULERS, TRACKERS
from .settings import SECRETS

_POSITIVE = (
    "resolution", "train_batch_size", "num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "rank",
    "max_train_samples", "checkpointing_steps", "checkpoints_total_limit", "validation_epochs", "logging_steps",
    "snr_gamma", "adam_epsilon", "max_grad_norm", "cache_crops",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "lr_warmup_steps", "dataloader_num_workers", "noise_offset", "input_perturbation", "seed",
    "adam_weight_decay", "dream_detail_preservation", "num_validation_images",
)  # fmt: skip
_BELOW_ONE = ["adam_beta1", "adam_beta2", "caption_dropout", "image_embeds_dropout"]
_NEEDS = {  # flag -> the flag without which it would do nothing
    "offload_ema": "use_ema", "foreach_ema": "use_ema",
    "dataset_config_name": "dataset_name", "hub_token": "push_to_hub", "hub_model_id": "push_to_hub",
    "dream_detail_preservation": "dream_training", "encodings_dir": "cache_encodings", "cache_crops": "cache_encodings",
}  # fmt: skip
_PACKAGES = {  # flag -> the package that it needs
    "use_8bit_adam": "bitsandbytes", "enable_xformers_memory_efficient_attention": "xformers",
}  # fmt: skip
_ARCHIVES = {".zip", ".tar", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}  # what `datasets` looks into
_NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"


class DefaultSeed(int):
    """A seed that nobody has typed: that of a checkpoint comes before it."""


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check; exits with status 2 and one line on stderr when something is wrong.

    With `--config FILE` the file's values stand in front of the command line's, so the command line wins; what the file
    turns on, `--switch=false` turns off.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(settings.switch_off(parser, settings.tokens(parser, argv) + argv))
    check(parser, args)
    if hasattr(args, "validation_prompt"):  # several pictures of one prompt are validated like several prompts
        args.validation_prompts = (
            [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []
        )
    return args


def public_config(args: argparse.Namespace) -> dict:
    """The arguments as a plain dictionary, without secrets, such as may be written down and shown."""
    left_out = {*SECRETS, "config", "validation_prompts" if hasattr(args, "validation_prompt") else ""}
    return {name: value for name, value in sorted(vars(args).items()) if name not in left_out}


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work, through `parser.error`. Opens no model and no data set."""
    _check_texts(parser, args)
    _check_numbers(parser, args)
    _check_combinations(parser, args)
    _check_compiler(parser, args)
    _check_objective(parser, args)
    _check_reporting(parser, args)
    _check_paths(parser, args)


def _check_texts(parser, args):
    """Characters that no path can hold, no tokenizer reads, and no request to the hub may carry."""
    for name, value in vars(args).items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, str) and "\0" in item for item in items):
            parser.error(f"--{name} holds a null character")
        if name.startswith("validation_prompt") and re.search("[\ud800-\udfff]", " ".join(items if value else [])):
            parser.error(f"--{name} holds bytes that are not UTF-8")
        if value == "" and name != "validation_prompt":
            parser.error(f"--{name} is empty")
    if args.hub_token is not None:
        args.hub_token = args.hub_token.strip()
        if not re.fullmatch("[!-~]+", args.hub_token):
            parser.error("--hub_token holds characters that no token has")


def _check_numbers(parser, args):
    flags = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    for name in _POSITIVE:
        if name in flags and not flags[name] > 0:
            parser.error(f"--{name} must be positive, not {flags[name]}")
    for name in _NOT_NEGATIVE:
        if name in flags and not 0 <= flags[name] < math.inf:
            parser.error(f"--{name} must be finite and not negative, not {flags[name]}")
    for name in _BELOW_ONE:
        if name in flags and not 0 <= flags[name] < 1:
            parser.error(f"--{name} must be at least 0 and below 1, not {flags[name]}")
    if flags.get("resolution", 8) % 8:
        nearest = max(8, round(args.resolution / 8) * 8)
        parser.error(f"--resolution must be a multiple of 8, not {args.resolution}; the nearest is {nearest}")
    if flags.get("seed", 0) >= 2**63:
        parser.error("--seed must be below 2**63")


def _check_combinations(parser, args):
    for name, needed in _NEEDS.items():
        value = getattr(args, name, None)
        is_set = value is not None and value is not False and value != parser.get_default(name)
        if is_set and not getattr(args, needed):
            parser.error(f"--{name} does nothing without --{needed}: add --{needed}, or leave --{name} out")
    if getattr(args, "center_crop", False) and getattr(args, "cache_crops", None) != parser.get_default("cache_crops"):
        parser.error("--cache_crops does nothing with --center_crop: leave one of them out")
    for name, package in _PACKAGES.items():
        if getattr(args, name, False) and importlib.util.find_spec(package) is None:
            parser.error(f"--{name} needs the package {package}: pip install {package}, or leave the flag out")
    _check_schedule(parser, args)


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
                "--lr_scheduler piecewise_constant takes its rules behind a colon, e.g. "
                "piecewise_constant:1:1000,0.1:2000,0.01 (factor:until_step, ..., last factor)"
            )
    elif args.lr_scheduler not in LR_SCHEDULERS:
        parser.error(f"--lr_scheduler must be one of {', '.join(LR_SCHEDULERS)}, not {args.lr_scheduler!r}")


def _check_compiler(parser, args):
    """What torch.compile needs besides torch: it would find out in the first step, and say so in hundreds of lines."""
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
        parser.error("--dream_training is defined for epsilon prediction only, and this is a v_prediction run")


def _local_prediction_type(model: str) -> str | None:
    try:
        return json.loads((Path(model) / "scheduler" / "scheduler_config.json").read_text()).get("prediction_type")
    except (OSError, ValueError):  # a hub model: the script checks again once it is loaded
        return None


def _check_reporting(parser, args):
    if args.report_to not in TRACKERS:
        parser.error(f"--report_to must be one of {', '.join(TRACKERS)}, not {args.report_to!r}")
    package = args.report_to  # the trackers bear the names of their packages
    if package not in ("all", "none") and importlib.util.find_spec(package) is None:
        parser.error(f"--report_to {package} needs the package {package}: pip install {package}")
    if args.report_to not in ("tensorboard", "none") and args.hub_token is not None:
        parser.error(
            f"--report_to {args.report_to} together with --hub_token could publish the token; "
            "log in with `hf auth login` and leave --hub_token out"
        )


def _check_folder(parser, args):
    """Whether --train_data_dir can be a folder of captioned pictures: a look at names alone."""
    folder = Path(args.train_data_dir)
    if not folder.is_dir():
        fault = " is a file" if folder.exists() else ": there is no such folder"
        parser.error(f"--train_data_dir {folder}{fault}")
    names = {f"metadata.{kind}" for kind in ("jsonl", "csv", "parquet")}
    if args.caption_column is None or any((folder / name).is_file() for name in names):
        return
    below = map(Path, glob.iglob(os.path.join(glob.escape(args.train_data_dir), "**", "*"), recursive=True))
    if not any(path.name in names or path.suffix.lower() in _ARCHIVES for path in below):
        parser.error(
            f"--train_data_dir {folder} holds no metadata.jsonl, with a line for each picture such as "
            '{"file_name": "0001.jpg", "text": "a red fox"}; data sets of other forms are for --dataset_name'
        )


def _check_paths(parser, args):
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("no data: give --dataset_name, or --train_data_dir with a folder of captioned pictures")
    if args.dataset_name is None:
        _check_folder(parser, args)
    for name, value in vars(args).items():
        is_path = name == "dataset_name" or name.startswith("pretrained_")
        if name.startswith("pretrained_") and value and Path(value).is_file():
            parser.error(
                f"--{name} {value} is a file; what is needed is the folder that diffusers' "
                "from_single_file(...).save_pretrained(folder) makes of it"
            )
        if is_path and value and value.startswith(("/", "./", "../", "~")) and not Path(value).exists():
            parser.error(f"--{name} {value}: there is no such folder")
    kinds = {"metadata.jsonl": "folder of captioned pictures", "state.json": "data set of save_to_disk"}
    for kind in [kinds[name] for name in kinds if args.dataset_name and Path(args.dataset_name, name).is_file()]:
        for name in ("train_data_dir", "dataset_config_name"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} does nothing here: {args.dataset_name} is read as a {kind}")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        parser.error(f"--output_dir {output_dir} is a file")
    source = "train_data_dir" if args.dataset_name is None else "dataset_name"
    data = Path(getattr(args, source)).resolve()
    if data.is_dir() and output_dir.resolve().is_relative_to(data):
        parser.error(f"--output_dir {output_dir} is inside --{source}: its pictures would become training data")
    for name, value in vars(args).items():
        is_model = name.startswith("pretrained_") and value and Path(value).is_dir()
        if is_model and output_dir.resolve() == Path(value).resolve():
            parser.error(f"--output_dir {output_dir} is the model of --{name}, which would be overwritten")
    wanted = args.resume_from_checkpoint
    if wanted not in (None, "latest") and not (output_dir / wanted).is_dir() and not Path(wanted).is_dir():
        parser.error(f"--resume_from_checkpoint {wanted}: no such checkpoint, in {output_dir} or as a path")
    if wanted is None and list(output_dir.glob("checkpoint-*/manifest.json")):
        parser.error(
            f"--output_dir {output_dir} holds checkpoints of an earlier run: "
            "continue it with --resume_from_checkpoint latest, or choose another folder"
        )
