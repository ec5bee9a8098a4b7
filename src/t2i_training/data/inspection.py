"""Checks every image and caption once before training, so that none of them ends the run hours later.

Image files are read, hashed and decoded in threads: reading, hashing and Pillow release the GIL, and threads share the
memo, need no copy of the data set, and end at once when the run is stopped. The memo in the output folder lists the
good files, so that the next start compares only names, sizes and times.
"""

import functools
import hashlib
import json
import os
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from accelerate.utils import gather_object

from .. import distributed, files, sanitize
from ..bar import Bar
from ..errors import RunError
from ..log import logger
from ..sources import data_files
from . import images, repeats, workers
from .dataset import check_caption_column, check_dataset, describe, not_the_images_fault
from .image_folder import FAULTS, LINE

MEMO = ".inspected_pictures.json"
BAD, SKIPPED = "bad_samples.jsonl", "skipped_samples.jsonl"
SHOWN = 20  # bad samples on the terminal
_CHUNK = 128  # rows in memory at a time; they may hold image files


@dataclass(frozen=True)
class ImageInfo:
    """Facts about a row's image: hash of its file, upright size in pixels, and why it cannot be used, if so."""

    digest: str  # BLAKE2b of the file's bytes, 128 bits in hexadecimal
    width: int
    height: int
    error: str | None


def inspect(args, accelerator, dataset, caption_column: str | None = None):
    """(data set, list of `ImageInfo`), both of the usable rows alone, in order, and the same on every process. Rows
    that flags repeat are looked at once, and then stand there as often.

    Exits unless all rows are usable, or some are and --skip_bad_samples is given. All processes call it and check
    a share each. Captions are checked if a column is named. Rows count from 0, in `dataset` as given.
    """
    dataset = check_dataset(dataset, args)
    if caption_column is not None:
        check_caption_column(dataset, caption_column)
    began, memo = time.perf_counter(), Path(args.output_dir) / MEMO
    share = _inspect_share(args, accelerator, dataset, caption_column, _read_memo(memo))
    distributed.barrier(accelerator)
    found = gather_object(share)
    image_infos = [info for _, info, _ in found]
    bad = {row: reason for row, (_, _, reason) in enumerate(found) if reason}
    if accelerator.is_main_process:
        _write_memo(memo, found)
        logger.info(f"inspected {len(found)} samples in {time.perf_counter() - began:.1f} s")
        _report(args, dataset, bad)
    if bad and (not args.skip_bad_samples or len(bad) == len(found)):
        raise RunError(_last_line(args, dataset, bad)) if accelerator.is_main_process else SystemExit(1)
    if bad:
        good = [row for row in range(len(dataset)) if row not in bad]
        dataset, image_infos = dataset.select(good), [image_infos[row] for row in good]
    if accelerator.is_main_process:
        _warn_of_repeats(args, dataset, image_infos, caption_column)
    dataset = dataset.remove_columns([FAULTS] if FAULTS in dataset.column_names else [])
    return repeats.apply(dataset, image_infos)


def _inspect_share(args, accelerator, dataset, caption_column, known) -> list[tuple[str | None, ImageInfo, str | None]]:
    """(key in the memo, image, why the row cannot be used) of each row of this process's share."""
    rank, world_size, size = accelerator.process_index, accelerator.num_processes, len(dataset)
    first, end = size * rank // world_size, size * (rank + 1) // world_size
    columns = [name for name in (args.image_column, caption_column, FAULTS) if name in dataset.column_names]
    rows, stored, found = dataset.select_columns(columns).with_format("arrow"), _stored(dataset), []
    texts_alone = dataset.select_columns(columns[1:]).with_format("arrow") if columns[1:] else None
    PIL.Image.init()  # load all plugins now: done lazily, another thread's image may go unrecognised
    pool = ThreadPoolExecutor(workers.cores())
    bar = Bar(accelerator, total=end - first, desc="inspecting", unit="image", delay=1.0, leave=False)
    try:
        with bar, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL on harmless metadata; real faults raise
            for start in range(first, end, _CHUNK):
                chunk = range(start, min(start + _CHUNK, end))
                keys = [f"{stored}:{row}" if stored else None for row in chunk]
                # Known images within the data set's own files are not read again.
                if stored and known.keys() >= {*keys}:
                    looked_at = [(key, ImageInfo(*known[key], None)) for key in keys]
                    chunk = _rows(texts_alone, chunk)
                else:
                    chunk = _rows(rows, chunk)
                    entries = [row[args.image_column] for row in chunk]
                    looked_at = pool.map(functools.partial(_look, known=known), entries, keys)
                for row, (key, info) in zip(chunk, looked_at, strict=True):
                    fault = _metadata_fault(row.get(FAULTS), args.image_column, caption_column)
                    reason = fault or info.error or (caption_column and caption_fault(row[caption_column]))
                    found.append((key, info, reason or None))
                    bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a stop signal does not wait for the rest of the chunk
    return found


def _stored(dataset) -> str | None:
    """Fingerprint of a file-backed data set (files, sizes, times, selected rows); None if it is in memory."""
    stored = [(file["filename"], os.stat(file["filename"])) for file in dataset.cache_files]
    seen = [(name, status.st_size, status.st_mtime_ns) for name, status in stored]
    return hashlib.blake2b(repr((dataset._fingerprint, seen)).encode(), digest_size=16).hexdigest() if seen else None


def _rows(dataset, numbers: range) -> list[dict]:
    """Rows of a data set in Arrow's format; empty rows if there is no data set."""
    return [{} for _ in numbers] if dataset is None else dataset[numbers.start : numbers.stop].to_pylist()


def _look(entry: dict | None, key: str | None, known: dict) -> tuple[str | None, ImageInfo]:
    """(key in the memo, ImageInfo) of an image column's entry. `key` is given for an image without a file of its own.

    Runs in a thread.
    """
    if not entry or (entry["bytes"] is None and not entry["path"]):
        return None, ImageInfo("", 0, 0, "it has no image")
    content, path, digest = entry["bytes"], entry["path"], ""
    try:
        with images.naming_the_fault(path):
            if content is None:
                key = data_files.stamped(path)
                if key not in known:
                    content = data_files.read_bytes(path)
        if key not in known:
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            key = key or digest
        if key in known:
            return key, ImageInfo(*known[key], None)
        _, (width, height) = images.decode_with_size(content, min_shape=(1, 1))
        return key, ImageInfo(digest, width, height, None)
    except images.UnreadableImage as error:
        return key, ImageInfo(digest, 0, 0, str(error))
    except (OSError, MemoryError) as error:
        line = not_the_images_fault(sanitize.printable(path or "an image within the data"), error)
        raise RunError(line) from error


def caption_fault(caption) -> str | None:
    """Why a caption cannot be used, or None. The empty string is valid: it is the unconditional prompt."""
    if isinstance(caption, str):
        return None
    if caption is None:
        return "it has no caption"
    if not caption:
        return "its list of captions is empty"
    return None if all(isinstance(text, str) for text in caption) else "its list of captions has an empty (null) entry"


def _metadata_fault(faults: str | None, image_column: str, caption_column: str | None) -> str | None:
    faults = json.loads(faults) if faults else {}
    return next((faults[column] for column in ("", image_column, caption_column) if column in faults), None)


def _read_memo(memo: Path) -> dict:
    """The good images of an earlier run with the same version of Pillow: (digest, width, height) by key."""
    try:
        stored = json.loads(memo.read_text(encoding="utf-8"))
        image_infos = stored["pictures"].items() if stored["pillow"] == PIL.__version__ else ()
        return {key: entry for key, entry in image_infos if _is_entry(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_entry(entry) -> bool:
    """Whether an entry is plausible. A damaged memo must not make a good image bad."""
    kinds = [type(value) for value in entry] if isinstance(entry, list) else []
    return kinds == [str, int, int] and bool(re.fullmatch("[0-9a-f]{32}", entry[0])) and min(entry[1:]) > 0


def _write_memo(memo: Path, found) -> None:
    # Bad images are not remembered but read again: the disk or the network may have been at fault.
    image_infos = {key: (p.digest, p.width, p.height) for key, p, _ in found if key and p.error is None}
    files.write_text(memo, json.dumps({"pillow": PIL.__version__, "pictures": image_infos}))


def _report(args, dataset, bad: dict[int, str]) -> None:
    """Log the first bad samples, and list all of them in a file in the output folder in place of an earlier list."""
    output_dir = Path(args.output_dir)
    for name in (BAD, SKIPPED):
        (output_dir / name).unlink(missing_ok=True)
    if not bad:
        return
    lines = []
    for row, reason in bad.items():
        sample = dataset[row]
        place = {"row": row, "file": (sample[args.image_column] or {}).get("path"), "line": sample.get(LINE)}
        lines.append(json.dumps(place | {"reason": reason}, ensure_ascii=False) + "\n")
        if len(lines) <= SHOWN:
            logger.warning(f"{describe(dataset, args.image_column, row)}: {reason}")
    listed = output_dir / (SKIPPED if args.skip_bad_samples else BAD)
    files.write_text(listed, "".join(lines))
    if len(bad) > SHOWN:
        logger.warning(f"and {len(bad) - SHOWN} more, all in {listed}")
    if args.skip_bad_samples:
        logger.warning(
            f"{len(bad)} of {len(dataset)} samples are left out (--skip_bad_samples), listed in {listed}; "
            "from here on rows count without them"
        )


def _last_line(args, dataset, bad: dict[int, str]) -> str:
    first = next(iter(bad))
    example = f"{describe(dataset, args.image_column, first)}: {bad[first]}"
    if args.skip_bad_samples:
        return f"none of the {len(bad)} samples can be used; {example}"
    return (
        f"{len(bad)} of {len(dataset)} samples cannot be used; {example}; all in "
        f"{Path(args.output_dir) / BAD}: fix or remove them, or leave them out with --skip_bad_samples"
    )


def _warn_of_repeats(args, dataset, image_infos: list[ImageInfo], caption_column: str | None) -> None:
    """Equal images with equal captions weigh more in training than the user may think."""
    counts = Counter(info.digest for info in image_infos)
    rows = [row for row, info in enumerate(image_infos) if counts[info.digest] > 1]
    if not rows:
        return
    captions = [None] * len(rows)
    if caption_column is not None:
        captions = list(dataset.select(rows)[caption_column])
    seen, repeats = {}, []
    for row, caption in zip(rows, captions):
        first = seen.setdefault((image_infos[row].digest, str(caption)), row)
        repeats += [(row, first)] if first != row else []
    if repeats:
        row, first = (describe(dataset, args.image_column, index) for index in repeats[0])
        what = f"{len(repeats)} samples repeat an earlier one, image and caption"
        logger.warning(f"{what}; the first: {row} as {first}")
