"""Captioned pictures: opening and checking a data set, and what a sample is made of."""

import contextlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from . import data_files, folder, images, model_kind, names, texts
from .log import logger

_COUNTED = 20_000  # captions whose tokens are counted: seconds
_WORD = re.compile(r"\w+")
ROW = 0  # a row's number in itself, under a key that no column has


class BadSample(Exception):
    """A sample that cannot be used; the message names row, file and reason."""


def open_dataset(args):
    """The training split as a `datasets.Dataset` whose pictures are left encoded. Exits with one line on an error.

    Both flags read a local folder alike; one line says which files, and which splits were left out.
    """
    model_kind.check_hub(args)
    where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    place = data_files.local_folder(args)
    try:
        dataset, said = _read_folder(place, args) if place else _read_splits(where, args.dataset_name, args)
    except Exception as error:  # datasets raises some twenty kinds here, for files, hub, formats and metadata
        hint = names.cache_hint(error, getattr(args, "cache_dir", None))
        if place and not isinstance(error, data_files.BadData):
            hint = hint or data_files.archives(data_files.list_files(place))
        raise SystemExit(f"error: {where}: {_one_line(error)}{hint}") from error
    if len(dataset) == 0:
        raise SystemExit(f"error: {where} holds no samples")
    logger.info(f"{where}: {len(dataset)} samples {said}")
    return _select(_check_images(dataset, args, place), args)


def _read_folder(place: str, args) -> tuple:
    """(samples, what was read)."""
    import datasets

    where = f"--{'train_data_dir' if args.dataset_name is None else 'dataset_name'} {place}"
    captions = getattr(args, "caption_column", None)
    if fault := data_files.refusal(place, captions=False):
        raise SystemExit(f"error: {where} {fault}")
    if any(os.path.exists(os.path.join(place, name)) for name in data_files.STORED):
        stored = datasets.load_from_disk(place)
        splits = stored if isinstance(stored, dict) else {"train": stored}
        return _training_split(where, splits, "save_to_disk")
    found = None if data_files.declares_configs(place) else folder.read(place, captions)
    return found or _read_splits(where, place, args)


def _read_splits(where: str, name: str, args) -> tuple:
    """(samples, what was read) of what `datasets` makes of a folder or a name on the hub."""
    import datasets

    options = {"data_dir": args.train_data_dir} if args.dataset_name == name else {}
    configuration = getattr(args, "dataset_config_name", None)
    splits = datasets.load_dataset(name, configuration, cache_dir=args.cache_dir, **options)
    return _training_split(where, splits, next(iter(splits.values())).builder_name)


def _training_split(where: str, splits: dict, form: str | None) -> tuple:
    if "train" not in splits:
        raise SystemExit(f"error: {where} has no split named train, only: {', '.join(splits)}")
    left_out = [f"{name} ({len(split)})" for name, split in splits.items() if name != "train"]
    said = "of the split train" + (f", read as {form}" if form else "")
    return splits["train"], said + (f"; left out as other splits: {', '.join(left_out)}" if left_out else "")


def check_dataset(dataset, args):
    """What `open_dataset` returns, of a data set that a script has opened in its own way.

    It is a `datasets.Dataset` with an image column, or a list of dictionaries with PIL images. Exits with one line on
    anything else. Images are left encoded.
    """
    import datasets

    if isinstance(dataset, list) and dataset and isinstance(dataset[0], dict):
        dataset = datasets.Dataset.from_list(dataset)
    if not isinstance(dataset, datasets.Dataset):
        way = "datasets.Dataset.from_generator makes one of dictionaries with a PIL image and a caption"
        if isinstance(dataset, dict):  # of splits
            way = f"choose one of its splits: {texts.printable(', '.join(map(str, dataset)))[:300]}"
        elif isinstance(dataset, datasets.IterableDataset):
            way = f"samples are read in random order: open it without streaming=True; or {way}"
        raise SystemExit(f"error: the data set is of the type {type(dataset).__name__}, not datasets.Dataset: {way}")
    if len(dataset) == 0:
        raise SystemExit("error: the data set holds no samples")
    if dataset.format["type"] == "custom":
        raise SystemExit("error: the data set's with_transform would not be used: change read_picture, or use map")
    return _check_images(dataset.with_format(None), args, None)


def _one_line(error: BaseException) -> str:
    if isinstance(error, data_files.BadData):
        return texts.reason(error)
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


def _check_images(dataset, args, place: str | None):
    import datasets

    column = args.image_column
    found = _columns_of(dataset, datasets.Image)
    likely = (
        found
        or [name for name in dataset.column_names if place and _holds_names(dataset, name)]
        or [name for name in dataset.column_names if _kind(dataset, name) in ("binary", "large_binary")]
    )
    _check_column(dataset, "image_column", column, likely[0] if len(likely) == 1 else None)
    dataset = _as_images(dataset, column, place)
    if not isinstance(dataset.features[column], datasets.Image):
        raise SystemExit(
            f"error: --image_column {column!r} holds {_kind(dataset, column)}, not pictures; "
            f"columns with pictures: {texts.printable(', '.join(found)) or 'none'}"
        )
    # Left encoded: datasets would decode every picture in full, and in the main process.
    return dataset.cast_column(column, datasets.Image(decode=False))


def _as_images(dataset, column: str, place: str | None):
    """The data set with images in place of what stands for them: files' bytes, pixels, names of files below `place`."""
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return _named_images(dataset, column, place) if place else dataset
    try:
        dataset.select(range(1)).cast_column(column, datasets.Image())[0]
        return dataset.cast_column(column, datasets.Image(decode=False))
    except Exception:  # pyarrow, datasets and Pillow raise all kinds at what is no image
        return dataset


def _holds_names(dataset, column: str) -> bool:
    return folder.names_files(dataset.select_columns([column])[:100][column])


def _named_images(dataset, column: str, place: str):
    import datasets

    if not _holds_names(dataset, column):
        return dataset
    entries, faults = folder.find(place, dataset[column][:])
    kinds = datasets.Features({column: datasets.Image(decode=False), folder.FAULTS: datasets.Value("string")})
    faults = [json.dumps({column: fault}) if fault else None for fault in faults]
    found = datasets.Dataset.from_dict({column: entries, folder.FAULTS: faults}, kinds)
    return datasets.concatenate_datasets([dataset.remove_columns(column), found], axis=1)


def check_caption_column(dataset, column: str) -> None:
    """Exit with one line unless `column` is one of strings, or of lists of strings."""
    own = [name for name in dataset.column_names if name not in (folder.LINE, folder.FAULTS)]
    likely = folder.likely_captions([name for name in own if _is_text(dataset.features[name])])
    _check_column(dataset, "caption_column", column, likely)
    kind = _kind(dataset, column).replace("large_string", "string")
    if kind not in ("string", "list of string"):
        raise SystemExit(f"error: --caption_column {column!r} holds {kind}; it must hold strings or lists of strings")


def _is_text(kind) -> bool:
    return getattr(getattr(kind, "feature", kind), "dtype", None) in ("string", "large_string")


def _check_column(dataset, flag: str, column: str, likely: str | None) -> None:
    if column not in dataset.column_names:
        names = ", ".join(name for name in dataset.column_names if name not in (folder.LINE, folder.FAULTS))
        advice = f"; did you mean --{flag}={texts.printable(likely)[:100]}?" if likely else ""
        names = texts.printable(names)[:1000]
        raise SystemExit(f"error: --{flag} {column!r} is not a column; there are: {names}{advice}")


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


def fit_tokenizer(tokenizer, positions: int, needed: int | None = None) -> None:
    """Give a tokenizer the length that its text encoder has `positions` for, where it states none, or a greater one.

    `needed` is the number of tokens that a network behind the encoder reads, no more and no fewer: Kandinsky's prior.
    """
    length = needed or min(tokenizer.model_max_length, positions)
    if length > positions:
        raise ValueError(f"the prior reads {length} tokens, and its text encoder has positions for {positions}")
    if length != tokenizer.model_max_length:
        stated = tokenizer.model_max_length
        stated = stated if stated < 1e9 else "no length"  # transformers' stand-in for none is 1e30
        logger.warning(f"the tokenizer states {stated}: captions are cut to the {length} tokens that are read")
        tokenizer.model_max_length = length
    tokenize(tokenizer, "")  # what fails here is no caption's fault


def tokenize(tokenizer, caption: str) -> torch.Tensor:
    """(tokens,) int64, padded and cut to the tokenizer's length (77 for CLIP)."""
    options = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    return tokenizer(caption, **options, return_tensors="pt").input_ids[0]


def report_cuts(tokenizer, dataset, args, accelerator):
    """`tokenizer`, after one line of the main process on how many captions are longer than it reads, if any are.

    A caption of fewer bytes than that is short enough, of more words too long; others are counted out, up to _COUNTED.
    """
    limit = tokenizer.model_max_length
    if not accelerator.is_main_process or limit > 1_000_000:
        return tokenizer
    counts, rows = Counter(), {}
    for row, caption in enumerate(dataset[args.caption_column]):
        for text in [caption] if isinstance(caption, str) else caption:
            counts[text] += 1
            rows.setdefault(text, row)
    room = limit - tokenizer.num_special_tokens_to_add()
    long = [text for text in counts if len(text.encode(errors="replace")) > room]
    cut = [text for text in long if len(_WORD.findall(text)) > room]
    known = set(cut)
    unsure = [text for text in long if text not in known]
    for first in range(0, min(len(unsure), _COUNTED), 1000):
        batch = unsure[first : first + 1000]
        cut += [text for text, ids in zip(batch, _token_ids(tokenizer, batch)) if len(ids) > limit]
    if cut:
        first = min(cut, key=rows.get)
        (ids,) = _token_ids(tokenizer, [first[: 20 * limit]])
        tail = texts.printable(tokenizer.decode(ids[: limit - 1], skip_special_tokens=True))[-40:]
        least = "at least " if len(unsure) > _COUNTED else ""
        number = f"{least}{sum(counts[text] for text in cut)} of {counts.total()} captions"
        logger.warning(
            f"{number} are longer than the {limit} tokens that the text encoder reads; the rest of them is cut off, "
            f"e.g. of {describe(dataset, args.image_column, rows[first])} what follows '...{tail}'"
        )
    return tokenizer


def _token_ids(tokenizer, captions: list[str]) -> list[list[int]]:
    return tokenizer(captions, verbose=False).input_ids


def text_mask(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) bool: True up to and including the first end token, False on the padding after it."""
    ends = (input_ids == tokenizer.eos_token_id).cumsum(0)
    return ends - (input_ids == tokenizer.eos_token_id).long() < 1


@contextlib.contextmanager
def naming_the_sample(dataset, image_column: str, index: int):
    """An image that cannot be read is a BadSample that says which one.

    So is a fault of the disk or the memory, which says that it is none of the image's. Any other error is the code's:
    it goes its way, with a note on what was at hand.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL on harmless metadata; real faults raise
            yield
    except images.UnreadableImage as error:
        raise BadSample(f"{describe(dataset, image_column, index)}: {error}") from None
    except Exception as error:
        try:
            sample = describe(dataset, image_column, index)
        except Exception:  # the data set itself cannot be read
            sample = f"row {int(index)}"
        if images.is_system_fault(error):
            raise BadSample(not_the_images_fault(sample, error)) from None
        error.add_note(f"raised while {sample} was prepared; it may have nothing to do with it")
        raise


def not_the_images_fault(what: str, error: Exception) -> str:
    """One line on an image that could not be read for another reason."""
    reason = f"{type(error).__name__}: {texts.reason(error)}" if str(error) else type(error).__name__
    return (
        f"{what} could not be read: {reason}; the fault is the machine's (disk, network or memory), not the image's: "
        "start again once it is mended"
    )


def picture_file(picture: dict) -> bytes | str:
    """What `images.decode` reads, of an image column's entry: a path, or bytes. Raises images.UnreadableImage."""
    path = picture["path"]
    return picture_bytes(picture) if path and path.startswith("zip://") else picture["bytes"] or path


def picture_bytes(picture: dict) -> bytes:
    """The image file of an image column's entry. Raises images.UnreadableImage."""
    if picture["bytes"]:
        return picture["bytes"]
    with images.naming_the_fault(picture["path"]):
        return data_files.read_bytes(picture["path"])


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
