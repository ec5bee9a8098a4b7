"""What a flag calls a model or a data set: a folder here, or a repository of the hub. Imports nothing heavy."""

import contextlib
import difflib
import functools
import itertools
import os
import re
from pathlib import Path

from .. import sanitize
from ..errors import RunError
from ..library_errors import cache_hint
from ..sanitize import is_hub_name

_PATHS = ("output_dir", "cache_dir", "encodings_dir", "train_data_dir", "dataset_name", "resume_from_checkpoint")
_FILES = (  # endings of what is a file, and no name of a repository
    ".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".msgpack", ".onnx", ".gguf", ".zip", ".tar", ".gz", ".tgz", ".7z",
    ".rar", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".yaml", ".yml",
)  # fmt: skip
_READERS = {"imagefolder", "webdataset", "parquet", "arrow", "csv", "json", "text", "hdf5"}  # names that `datasets` has
_WEB = re.compile(r"^(?:hf:/|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co))/(?:datasets/)?([\w.-]+/[\w.-]+)")
SECONDS = 10  # to wait for an answer of the hub; its client would ask six times, for half a minute


def expand_home(args) -> None:
    """Replace a leading ~, which the shell leaves alone behind `--flag=`."""
    for name, value in vars(args).items():
        if value and (name in _PATHS or name.startswith("pretrained_")):
            setattr(args, name, os.path.expanduser(value))


def check(parser, args) -> None:
    """Refuse models and data sets that are written like a path, and are none."""
    for flag, value in vars(args).items():
        if not value or not (flag == "dataset_name" or flag.startswith("pretrained_")):
            continue
        if flag.startswith("pretrained_") and os.path.isfile(value):
            parser.error(
                f"--{flag} {value} is a file; what is needed is the folder that diffusers' "
                "from_single_file(...).save_pretrained(folder) makes of it"
            )
        if web := _WEB.match(value):
            parser.error(f"--{flag} {value} is an address; the hub's name for it is {web[1]}")
        if os.path.exists(value):
            continue
        if _looks_like_a_path(value):
            parser.error(f"--{flag} {value}: there is no such folder{_did_you_mean(value)}")
        here = "/" not in value or os.path.isdir(value.partition("/")[0])  # or else its owner is the hub's
        if value not in _READERS and here and (near := _near(value)) and _digits(near) == _digits(value):
            parser.error(f"--{flag} {value}: there is no such folder; did you mean {sanitize.printable(near)}?")


def _looks_like_a_path(value: str) -> bool:
    return not is_hub_name(value) or value.lower().endswith(_FILES) or ".." in value


def _digits(name: str) -> list[str]:
    return re.findall(r"\d+", name)  # names that differ in these are of two things: stable-diffusion-v1-4 and v1-5


def _near(value: str) -> str | None:
    """A folder here whose path is nearly `value`: its first part that does not exist, spelled in another way."""
    path = Path(value)
    lineage = [path, *path.parents]
    missing = next((part for part, above in itertools.pairwise(lineage) if os.path.isdir(above)), path)
    with contextlib.suppress(OSError):  # a folder that may not be listed
        there = {other.name.casefold(): other for other in missing.parent.iterdir() if other.is_dir()}
        for name in difflib.get_close_matches(missing.name.casefold(), there, 1, 0.75):
            whole = there[name] / path.relative_to(missing)
            return str(whole if whole.exists() else there[name])
    return None


def _did_you_mean(value: str) -> str:
    near = _near(value)
    return f"; did you mean {sanitize.printable(near)}?" if near else ""


def check_hub_dataset(args) -> None:
    """Ask the hub whether it has --dataset_name, where that is no folder: exits with one line if not."""
    name = args.dataset_name
    if name is None or name in _READERS or not is_hub_name(name):
        return
    from huggingface_hub import HfApi

    with hub_errors(args, "dataset_name", cached=_is_cached_dataset(args)):
        HfApi().dataset_info(name, timeout=SECONDS)


def _is_cached_dataset(args) -> bool:
    """Whether `datasets` would take a copy of its own: it looks for it under this name."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE)
    *owner, name = args.dataset_name.split("/")
    return (folder / "___".join([*owner, camelcase_to_snakecase(name)])).is_dir()


@contextlib.contextmanager
def hub_errors(args, flag: str, cached: bool = False):
    """What the hub says against a name, or that there is no hub, in one line; in silence where a copy is `cached`."""
    from huggingface_hub import constants, errors

    name = getattr(args, flag)
    try:
        yield
    except Exception as error:  # of the hub's client, of the one for HTTP below it, of the system
        kind = "data set" if flag == "dataset_name" else "model"
        if cached:  # also of what the hub has no more
            return
        if isinstance(error, errors.GatedRepoError):
            reason = f"this {kind} of the hub wants its terms accepted on its page, and then `hf auth login` here"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = "the hub has no such revision of it"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"there is no such folder, and no such {kind} on the hub (if it is private: `hf auth login`)"
        elif hint := cache_hint(error, args.cache_dir):
            reason = sanitize.reason(error)[:300] + hint
        elif constants.HF_HUB_OFFLINE:
            reason = "there is no such folder, and no copy in the cache; HF_HUB_OFFLINE keeps from asking the hub"
        else:
            reason = f"there is no such folder, and the hub cannot be asked ({sanitize.reason(error)[:400]})"
        raise RunError(f"--{flag} {sanitize.printable(name)}: {reason}{_did_you_mean(name)}") from error


def cached_file(file: str, **source) -> str | None:
    """Where the cache has a repository's file, if it has it."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(filename=file, **source)
    return path if isinstance(path, str) else None


@functools.cache
def _list_files(name: str, revision: str | None) -> tuple[str, ...]:
    from huggingface_hub import HfApi

    return tuple(file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=SECONDS).siblings)


def remote_files(args, flag: str, revision: str | None = None) -> tuple[str, ...] | None:
    """The repository's files; None where the hub cannot be asked, and the cache has a copy."""
    name = getattr(args, flag)
    cached = cached_file("model_index.json", repo_id=name, revision=revision, cache_dir=args.cache_dir)
    with hub_errors(args, flag, cached=cached is not None):
        return _list_files(name, revision)
    return None
