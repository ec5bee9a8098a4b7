"""Names of models and data sets: a local folder, or a repository on the hub. Imports nothing heavy."""

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

_PATHS = (
    "network_weights",
    "output_dir",
    "cache_dir",
    "encodings_dir",
    "train_data_dir",
    "dataset_name",
    "resume_from_checkpoint",
)
_FILES = (  # endings of files, as opposed to repository names
    ".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".msgpack", ".onnx", ".gguf", ".zip", ".tar", ".gz", ".tgz", ".7z",
    ".rar", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".yaml", ".yml",
)  # fmt: skip
_READERS = {"imagefolder", "webdataset", "parquet", "arrow", "csv", "json", "text", "hdf5"}  # readers of `datasets`
_WEB = re.compile(r"^(?:hf:/|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co))/(?:datasets/)?([\w.-]+/[\w.-]+)")
SECONDS = 10  # seconds to wait for the hub; its client would retry six times, for half a minute


def expand_home(args) -> None:
    """Replace a leading ~, which the shell does not expand after `--flag=`."""
    for name, value in vars(args).items():
        if value and (name in _PATHS or name.startswith("pretrained_")):
            setattr(args, name, os.path.expanduser(value))


def check(parser, args) -> None:
    """Refuse models and data sets that are written as a path but do not exist."""
    for flag, value in vars(args).items():
        if not value or not (flag == "dataset_name" or flag.startswith("pretrained_")):
            continue
        if flag.startswith(("pretrained_prior", "pretrained_decoder")) and os.path.isfile(value):
            parser.error(f"--{flag} {value} is a file: for Kandinsky a folder or a hub name is needed")
        is_url = flag.startswith("pretrained_") and value.startswith(("http://", "https://"))
        if is_url and value.lower().partition("?")[0].endswith(_FILES):
            parser.error(f"--{flag} {value} is a URL: download the file and name it")
        if web := _WEB.match(value):
            parser.error(f"--{flag} {value} is a URL: use the hub's name, {web[1]}")
        if is_url:
            parser.error(f"--{flag} {value} is a URL of no hub: download the file that it leads to, and name that")
        if os.path.exists(value):
            continue
        if _looks_like_a_path(value):
            what = "file" if value.lower().endswith(_FILES) else "folder"
            parser.error(f"--{flag} {value}: there is no such {what}{_did_you_mean(value)}")
        here = "/" not in value or os.path.isdir(value.partition("/")[0])  # else the owner may be one on the hub
        if value not in _READERS and here and (near := _near(value)) and _digits(near) == _digits(value):
            parser.error(f"--{flag} {value}: there is no such folder; did you mean {sanitize.printable(near)}?")


def _looks_like_a_path(value: str) -> bool:
    return not is_hub_name(value) or value.lower().endswith(_FILES) or ".." in value


def _digits(name: str) -> list[str]:
    return re.findall(r"\d+", name)  # names that differ in digits are different things: stable-diffusion-v1-4 and v1-5


def _near(value: str) -> str | None:
    """An existing folder whose path is nearly `value`: the first part that does not exist is spelled differently."""
    path = Path(value)
    lineage = [path, *path.parents]
    missing = next((part for part, above in itertools.pairwise(lineage) if os.path.isdir(above)), path)
    with contextlib.suppress(OSError):  # no permission to list the folder
        there = {other.name.casefold(): other for other in missing.parent.iterdir() if other.is_dir()}
        for name in difflib.get_close_matches(missing.name.casefold(), there, 1, 0.75):
            whole = there[name] / path.relative_to(missing)
            return str(whole if whole.exists() else there[name])
    return None


def _did_you_mean(value: str) -> str:
    near = _near(value)
    return f"; did you mean {sanitize.printable(near)}?" if near else ""


def check_hub_dataset(args) -> None:
    """Ask the hub whether --dataset_name exists, unless it is a folder. Exits with one line if not."""
    name = args.dataset_name
    if name is None or name in _READERS or not is_hub_name(name):
        return
    from huggingface_hub import HfApi

    with hub_errors(args, "dataset_name", cached=_is_cached_dataset(args)):
        HfApi().dataset_info(name, timeout=SECONDS)


def _is_cached_dataset(args) -> bool:
    """Whether `datasets` has the data set in its cache, under this name."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE)
    *owner, name = args.dataset_name.split("/")
    return (folder / "___".join([*owner, camelcase_to_snakecase(name)])).is_dir()


@contextlib.contextmanager
def hub_errors(args, flag: str, cached: bool = False):
    """Turn errors of the hub, or its absence, into one line. Does nothing on errors if a copy is `cached`."""
    from huggingface_hub import constants, errors

    name = getattr(args, flag)
    try:
        yield
    except Exception as error:  # from the hub's client, its HTTP library, or the system
        kind = "data set" if flag == "dataset_name" else "model"
        if cached:  # also if the hub has it no longer
            return
        if isinstance(error, errors.GatedRepoError):
            reason = f"this {kind} needs you to accept its terms on its hub page, and then to run `hf auth login` here"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = "the hub has no such revision of it"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"there is no such folder, and no such {kind} on the hub (if it is private: `hf auth login`)"
        elif hint := cache_hint(error, args.cache_dir):
            reason = sanitize.reason(error)[:300] + hint
        elif constants.HF_HUB_OFFLINE:
            reason = "there is no such folder, and no copy in the cache; HF_HUB_OFFLINE forbids asking the hub"
        else:
            reason = f"there is no such folder, and the hub cannot be reached ({sanitize.reason(error)[:400]})"
        raise RunError(f"--{flag} {sanitize.printable(name)}: {reason}{_did_you_mean(name)}") from error


def cached_file(file: str, **source) -> str | None:
    """Path of a repository's file in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(filename=file, **source)
    return path if isinstance(path, str) else None


@functools.cache
def _list_files(name: str, revision: str | None) -> tuple[str, ...]:
    from huggingface_hub import HfApi

    return tuple(file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=SECONDS).siblings)


def remote_files(args, flag: str, revision: str | None = None) -> tuple[str, ...] | None:
    """The repository's files; None if the hub cannot be reached and the cache has a copy."""
    name = getattr(args, flag)
    cached = cached_file("model_index.json", repo_id=name, revision=revision, cache_dir=args.cache_dir)
    with hub_errors(args, flag, cached=cached is not None):
        return _list_files(name, revision)
    return None
