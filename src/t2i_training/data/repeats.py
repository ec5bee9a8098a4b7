"""Repeats: a sample that is in the data set several times draws for itself each time, and is encoded once."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.compute

from ..errors import RunError
from ..log import logger
from ..sources import data_files

COLUMN = "_repeats"  # of each row, until it has been inspected


def mark(dataset, args, place: str | None):
    """The data set with how often its rows are to be repeated, by --num_repeats and --repeats_from_folders.

    `place` is its local folder, if it has one. Exits with one line where folders cannot say it.
    """
    counts = np.full(len(dataset), args.num_repeats)
    folders = _folders(dataset, args.image_column, place) if place else []
    if args.repeats_from_folders:
        counts *= _counts(folders)
    elif name := next((folder[1] for folder in folders if folder), None):
        logger.info(f"folders such as {name} name repeats: with --repeats_from_folders their images are repeated")
    if (counts == 1).all():
        return dataset
    logger.info(f"{counts.sum()} samples with repeats")
    return dataset.add_column(COLUMN, counts)


def _folders(dataset, column: str, place: str) -> Iterator[tuple[int, str] | None]:
    """(repeats, folder) of each row's image, or None. Leaves images that the data set itself holds where they are."""
    root = os.path.abspath(place)
    for batch in dataset.select_columns([column]).with_format("arrow").iter(10_000):
        for path in pyarrow.compute.struct_field(batch[column], "path").to_pylist():
            yield data_files.repeated_folder(data_files.below(path or "", root))


def _counts(folders: Iterable[tuple[int, str] | None]) -> np.ndarray:
    found = list(folders)
    if not any(found):
        raise RunError("--repeats_from_folders finds no folder named as `10_zwx dog` below the data's: leave it out")
    groups = Counter(folder for folder in found if folder)
    shown = [f"{name} {count} times ({number} images)" for (count, name), number in sorted(groups.items())]
    alone = found.count(None)
    logger.info(f"repeats: {', '.join(shown[:20])}" + (f"; {alone} images of other folders once" if alone else ""))
    return np.array([folder[0] if folder else 1 for folder in found])


def apply(dataset, image_infos: list) -> tuple:
    """(data set, image_infos) with each row as often as it is marked; equal rows follow each other."""
    if COLUMN not in dataset.column_names:
        return dataset, image_infos
    rows = np.repeat(np.arange(len(dataset)), dataset[COLUMN][:])
    return dataset.remove_columns(COLUMN).select(rows), [image_infos[row] for row in rows]
