"""Captioned pictures: opening and checking a data set, and what a sample is made of."""

import contextlib
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch

from . import folder, texts

ROW = 0  # a row's number in itself, under a key that no column has


class BadSample(Exception):
    """A sample that cannot be used; the message names row, file and reason."""


def open_dataset(args):
    """The training split as a `datasets.Dataset` whose pictures are left encoded. Exits with one line on an error."""
    import datasets

    where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    try:
        place = args.train_data_dir if args.dataset_name is None else args.dataset_name
        if args.dataset_name is not None and os.path.exists(os.path.join(place, "state.json")):  # of save_to_disk
            splits = {"train": datasets.load_from_disk(place)}
        elif args.dataset_name is not None and not os.path.exists(os.path.join(place, folder.METADATA)):
            splits = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, data_dir=args.train_data_dir
            )
        else:
            splits = {"train": folder.read(place)}
            if splits["train"] is None:
                # Not data_dir: with that, names of files and subfolders (steam_train.png) would become splits.
                files = {"train": os.path.join(place, "**")}
                splits = datasets.load_dataset("imagefolder", data_files=files, cache_dir=args.cache_dir)
    except Exception as error:  # datasets raises some twenty kinds here, for files, hub, formats and metadata
        raise SystemExit(f"error: {where}: {_one_line(error)}") from error
    if "train" not in splits:
        raise SystemExit(f"error: {where} has no split named train, only: {', '.join(splits)}")
    dataset = splits["train"]
    if len(dataset) == 0:
        raise SystemExit(f"error: {where} holds no samples")
    return _check_images(_select(dataset, args), args)


def _one_line(error: BaseException) -> str:
    reason = error.__cause__ or error
    return f"{type(reason).__name__}: {texts.reason(reason)}"


def _select(dataset, args):
    if args.max_train_samples is None:
        return dataset
    if args.max_train_samples > len(dataset):
        raise SystemExit(
            f"error: --max_train_samples {args.max_train_samples} is more than the {len(dataset)} samples there are"
        )
    return dataset.shuffle(seed=args.seed).select(range(args.max_train_samples))


def _check_images(dataset, args):
    import datasets

    _check_column(dataset, "image_column", args.image_column)
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        raise SystemExit(
            f"error: --image_column {args.image_column!r} holds {_kind(dataset, args.image_column)}, not pictures; "
            f"columns with pictures: {texts.printable(', '.join(_columns_of(dataset, datasets.Image))) or 'none'}"
        )
    # Left encoded: datasets would decode every picture in full, and in the main process.
    return dataset.cast_column(args.image_column, datasets.Image(decode=False))


def check_caption_column(dataset, column: str) -> None:
    """Exit with one line unless `column` is one of strings, or of lists of strings."""
    _check_column(dataset, "caption_column", column)
    kind = _kind(dataset, column).replace("large_string", "string")
    if kind not in ("string", "list of string"):
        raise SystemExit(f"error: --caption_column {column!r} holds {kind}; it must hold strings or lists of strings")


def _check_column(dataset, flag: str, column: str) -> None:
    if column not in dataset.column_names:
        names = ", ".join(name for name in dataset.column_names if name not in (folder.LINE, folder.FAULTS))
        raise SystemExit(f"error: --{flag} {column!r} is not a column; there are: {texts.printable(names)[:1000]}")


def _columns_of(dataset, feature) -> list[str]:
    return [name for name, kind in dataset.features.items() if isinstance(kind, feature)]


def _kind(dataset, column: str) -> str:
    feature = dataset.features[column]
    if hasattr(feature, "feature"):
        return f"list of {getattr(feature.feature, 'dtype', feature.feature)}"
    return texts.printable(str(getattr(feature, "dtype", feature)))[:100]


def pick_caption(caption: str | list[str], draw: Callable[[str], np.random.Generator], dropout: float) -> str:
    """The caption of this visit: one of several if there are several, and the empty one with probability `dropout`."""
    if dropout and draw("caption_dropout").random() < dropout:
        return ""  # arXiv:2207.12598: without such samples fine-tuning erodes classifier-free guidance
    return caption if isinstance(caption, str) else caption[draw("caption").integers(len(caption))]


def tokenize(tokenizer, caption: str) -> torch.Tensor:
    """(tokens,) int64, padded and cut to the tokenizer's length (77 for CLIP)."""
    options = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    return tokenizer(caption, **options, return_tensors="pt").input_ids[0]


def text_mask(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) bool: True up to and including the first end token, False on the padding after it."""
    ends = (input_ids == tokenizer.eos_token_id).cumsum(0)
    return ends - (input_ids == tokenizer.eos_token_id).long() < 1


@contextlib.contextmanager
def naming_the_sample(dataset, image_column: str, index: int):
    """Whatever goes wrong with a sample is a BadSample that says which one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL on harmless metadata; real faults raise
            yield
    except Exception as error:
        raise BadSample(f"{describe(dataset, image_column, index)}: {_one_line(error)}") from None


def picture_file(picture: dict) -> bytes | str:
    """What `images.decode` reads, of an image column's entry."""
    return picture["bytes"] or picture["path"]


def picture_source(row: dict, args) -> bytes | str | int:
    """What a script's `read_picture` reads of a row: its file, or, with cached encodings, the row's number."""
    return row[ROW] if args.cache_encodings else picture_file(row[args.image_column])


def all_captions(dataset, args) -> list[str]:
    """Every caption that `pick_caption` may pick, in an order of their own, which all processes find alike."""
    captions = dataset[args.caption_column]
    texts = {text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)}
    return sorted(texts | ({""} if args.caption_dropout else set()))


def describe(dataset, image_column: str, index: int) -> str:
    """Row number, counted from 0, and where the data set knows them, file name and line of a sample."""
    row = dataset[int(index)]
    known = [(row[image_column] or {}).get("path"), row.get(folder.LINE)]
    known = ", ".join(filter(None, known))
    return f"row {int(index)} ({texts.printable(known)})" if known else f"row {int(index)}"
