"""Opening and checking a data set of captioned images; naming its samples, and reading their files."""

import contextlib
import json
import os
import warnings

from .. import library_errors, sanitize
from ..errors import RunError
from ..log import logger
from ..sources import data_faults, data_files, names
from . import image_folder, images, repeats
from .image_folder import FAULTS, LINE

_OWN = (LINE, FAULTS, repeats.COLUMN)  # columns that no data set has of its own
# Keys under which a row carries its index, and the shape (H, W) to train it in; ints clash with no column's name.
ROW_INDEX, SHAPE = 0, 1


class BadSample(Exception):
    """A sample that cannot be used; the message names row, file and reason."""


def open_dataset(args, seed: int):
    """The training split as a `datasets.Dataset` whose images are left encoded. Exits with one line on an error.

    Both flags read a local folder alike; one line says which files, and which splits were left out. The `seed` chooses
    the samples where --max_train_samples are fewer than there are.
    """
    names.check_hub_dataset(args)
    where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    place = data_files.local_folder(args)
    try:
        dataset, said = _read_folder(place, args) if place else _read_splits(where, args.dataset_name, args)
    except Exception as error:  # datasets raises some twenty types, for files, hub, formats and metadata
        hint = library_errors.cache_hint(error, args.cache_dir)
        if place and not isinstance(error, data_files.BadData):
            hint = hint or data_files.archives(data_files.list_files(place))
        raise RunError(f"{where}: {_one_line(error)}{hint}") from error
    if len(dataset) == 0:
        raise RunError(f"{where} holds no samples")
    logger.info(f"{where}: {len(dataset)} samples {said}")
    dataset = _check_images(dataset, args, place)
    return _select(repeats.mark(dataset, args, place), args.max_train_samples, seed)


def _read_folder(place: str, args) -> tuple:
    """(samples, what was read)."""
    import datasets

    where = f"--{'train_data_dir' if args.dataset_name is None else 'dataset_name'} {place}"
    if fault := data_faults.refusal(place, args):
        raise RunError(f"{where} {fault}")
    if any(os.path.exists(os.path.join(place, name)) for name in data_files.STORED):
        stored = datasets.load_from_disk(place)
        splits = stored if isinstance(stored, dict) else {"train": stored}
        return _training_split(where, splits, "save_to_disk")
    found = None if data_files.declares_configs(place) else image_folder.read(place, args)
    return found or _read_splits(where, place, args)


def _read_splits(where: str, name: str, args) -> tuple:
    """(samples, what was read) of a folder or a hub name, as `datasets` opens it."""
    import datasets

    options = {"data_dir": args.train_data_dir} if args.dataset_name == name else {}
    splits = datasets.load_dataset(name, args.dataset_config_name, cache_dir=args.cache_dir, **options)
    return _training_split(where, splits, next(iter(splits.values())).builder_name)


def _training_split(where: str, splits: dict, form: str | None) -> tuple:
    if "train" not in splits:
        raise RunError(f"{where} has no split named train, only: {', '.join(splits)}")
    left_out = [f"{name} ({len(split)})" for name, split in splits.items() if name != "train"]
    said = "of the split train" + (f", read as {form}" if form else "")
    return splits["train"], said + (f"; left out as other splits: {', '.join(left_out)}" if left_out else "")


def check_dataset(dataset, args):
    """Check a data set that an edited script has opened, and return it in the form of `open_dataset`.

    Accepts a `datasets.Dataset` with an image column, or a list of dictionaries with PIL images. Exits with one line on
    anything else. Images are left encoded.
    """
    import datasets

    if isinstance(dataset, list) and dataset and isinstance(dataset[0], dict):
        dataset = datasets.Dataset.from_list(dataset)
    if not isinstance(dataset, datasets.Dataset):
        way = "datasets.Dataset.from_generator makes one of dictionaries with a PIL image and a caption"
        if isinstance(dataset, dict):  # of splits
            way = f"choose one of its splits: {sanitize.printable(', '.join(map(str, dataset)))[:300]}"
        elif isinstance(dataset, datasets.IterableDataset):
            way = f"samples are read in random order: open it without streaming=True; or {way}"
        raise RunError(f"the data set is of the type {type(dataset).__name__}, not datasets.Dataset: {way}")
    if len(dataset) == 0:
        raise RunError("the data set holds no samples")
    if dataset.format["type"] == "custom":
        raise RunError("the data set's with_transform would not be used: change read_image, or use map")
    return _check_images(dataset.with_format(None), args, None)


def _one_line(error: BaseException) -> str:
    if isinstance(error, data_files.BadData):
        return sanitize.reason(error)
    reason = error.__cause__ or error
    return f"{type(reason).__name__}: {sanitize.reason(reason)}"


def _select(dataset, count: int | None, seed: int):
    if count is None:
        return dataset
    if count > len(dataset):
        raise RunError(f"--max_train_samples {count} is more than the {len(dataset)} samples there are")
    return dataset.shuffle(seed=seed).select(range(count))


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
        raise RunError(
            f"--image_column {column!r} holds {_kind(dataset, column)}, not images; "
            f"columns with images: {sanitize.printable(', '.join(found)) or 'none'}"
        )
    # Left encoded: datasets would decode every image at full size, in the main process.
    return dataset.cast_column(column, datasets.Image(decode=False))


def _as_images(dataset, column: str, place: str | None):
    """The data set with `column` as images, if it holds bytes of files, pixels, or names of files below `place`."""
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return _named_images(dataset, column, place) if place else dataset
    try:
        dataset.select(range(1)).cast_column(column, datasets.Image())[0]
        return dataset.cast_column(column, datasets.Image(decode=False))
    except Exception:  # pyarrow, datasets and Pillow raise many types
        return dataset


def _holds_names(dataset, column: str) -> bool:
    return image_folder.names_files(dataset.select_columns([column])[:100][column])


def _named_images(dataset, column: str, place: str):
    import datasets

    if not _holds_names(dataset, column):
        return dataset
    entries, faults = image_folder.find(place, dataset[column][:])
    kinds = datasets.Features({column: datasets.Image(decode=False), FAULTS: datasets.Value("string")})
    faults = [json.dumps({column: fault}) if fault else None for fault in faults]
    found = datasets.Dataset.from_dict({column: entries, FAULTS: faults}, kinds)
    return datasets.concatenate_datasets([dataset.remove_columns(column), found], axis=1)


def check_caption_column(dataset, column: str) -> None:
    """Exit with one line unless `column` is one of strings, or of lists of strings."""
    own = [name for name in dataset.column_names if name not in _OWN]
    likely = image_folder.likely_captions([name for name in own if _is_text(dataset.features[name])])
    _check_column(dataset, "caption_column", column, likely)
    kind = _kind(dataset, column).replace("large_string", "string")
    if kind not in ("string", "list of string"):
        raise RunError(f"--caption_column {column!r} holds {kind}; it must hold strings or lists of strings")


def _is_text(kind) -> bool:
    return getattr(getattr(kind, "feature", kind), "dtype", None) in ("string", "large_string")


def _check_column(dataset, flag: str, column: str, likely: str | None) -> None:
    if column not in dataset.column_names:
        names = ", ".join(name for name in dataset.column_names if name not in _OWN)
        advice = f"; did you mean --{flag}={sanitize.printable(likely)[:100]}?" if likely else ""
        names = sanitize.printable(names)[:1000]
        raise RunError(f"--{flag} {column!r} is not a column; there are: {names}{advice}")


def _columns_of(dataset, feature) -> list[str]:
    return [name for name, kind in dataset.features.items() if isinstance(kind, feature)]


def _kind(dataset, column: str) -> str:
    feature = dataset.features[column]
    if hasattr(feature, "feature"):
        return f"list of {getattr(feature.feature, 'dtype', feature.feature)}"
    return sanitize.printable(str(getattr(feature, "dtype", feature)))[:100]


@contextlib.contextmanager
def naming_the_sample(dataset, image_column: str, index: int):
    """Turn an unreadable image into a BadSample that names it.

    A failure of disk or memory becomes a BadSample as well, which says that the image is not at fault. Any other
    exception is a bug: it gets a note with the sample, and propagates.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of harmless metadata; real faults raise
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
        error.add_note(f"raised while {sample} was prepared, which may not be the cause")
        raise


def not_the_images_fault(what: str, error: Exception) -> str:
    """The message for an image that could not be read although it is not at fault."""
    reason = f"{type(error).__name__}: {sanitize.reason(error)}" if str(error) else type(error).__name__
    return (
        f"{what} could not be read: {reason}; the fault is the machine's (disk, network or memory), not the image's: "
        "start again once it is fixed"
    )


def image_file(image: dict) -> bytes | str:
    """A path or bytes for `images.decode`, from an image column's entry. Raises images.UnreadableImage."""
    path = image["path"]
    return image_bytes(image) if path and path.startswith("zip://") else image["bytes"] or path


def image_bytes(image: dict) -> bytes:
    """The image file of an image column's entry. Raises images.UnreadableImage."""
    if image["bytes"]:
        return image["bytes"]
    with images.naming_the_fault(image["path"]):
        return data_files.read_bytes(image["path"])


def image_source(row: dict, args) -> bytes | str | int:
    """The input of a script's `load_image`: the image file of a row, or with cached encodings the row's index."""
    return row[ROW_INDEX] if args.cache_encodings else image_file(row[args.image_column])


def describe(dataset, image_column: str, index: int) -> str:
    """Row number, counted from 0, and where the data set knows them, file name and line of a sample."""
    row = dataset[int(index)]
    known = [(row[image_column] or {}).get("path"), row.get(LINE)]
    known = ", ".join(filter(None, known))
    return f"row {int(index)} ({sanitize.printable(known)})" if known else f"row {int(index)}"
