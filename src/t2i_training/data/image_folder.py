"""Reads a folder of images with metadata files line by line, and names file and line of every fault.

The reader in `datasets` fails at the first line that it cannot parse or whose caption has another type, does not say
where, and silently skips images without a line.
"""

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator

from .. import sanitize
from ..log import logger
from ..sources import data_files
from . import caption_files, metadata_files, near_names, text_files

METADATA = "metadata.jsonl"
LINE, FAULTS = "_line", "_faults"  # columns added here: file and line of a row; its faults by column, as JSON


class _ImageEntry(dict):
    """An image entry built from a checked file_name. A look-alike dictionary in a metadata file is not trusted."""


def read(folder: str, args) -> "tuple[datasets.Dataset, str] | None":  # noqa: F821
    """(samples, what was read) of the folder's metadata files or, without any, of its images and the caption files
    beside them; None for other formats.

    A line that cannot be used still becomes a row, without image or caption, with the reason in column FAULTS. A
    `file_name` is relative to its metadata file and must stay below that file's folder; nothing else is ever read.
    Raises BadData if a metadata file cannot be read at all.
    """
    listing = data_files.list_files(folder)
    if data_files.is_table(listing):
        return None
    if not listing.metadata() and not listing.images():
        data_files.add_zips(listing)
    names, left_out = data_files.training_files(listing.metadata())
    if not names and not left_out:
        return _images(listing, args)
    _refuse_two_of_a_kind(names)
    rows = [row for name in names for row in _read_file(listing, name)]
    if rows and not any(values for values, _, _ in rows):
        raise data_files.BadData(f"{rows[0][1]}: {next(iter(rows[0][2].values()))}")
    _refuse_other_keys(listing, rows, args.caption_column)
    _note_rows_without_names(rows)
    _warn_of_unlisted(listing, _find_files(listing, rows, left_out))
    said = f"of {_some(names)}"
    zips = sorted({path.rpartition("::")[2] for path in listing.files.values() if path.startswith("zip://")})
    if zips:
        said += f", with what {_some([data_files.relative(path, listing.root) for path in zips])} holds"
    if left_out:
        said += f"; left out as other splits: {_some(left_out)}"
    return _dataset(rows), said + _left_unread(listing, *names, *left_out, *listing.having(data_files.IMAGES))


def _some(names: list[str]) -> str:
    return sanitize.printable(", ".join(names[:5]) + (f", ... ({len(names)} files)" if len(names) > 5 else ""))


def _images(listing, args) -> "tuple[datasets.Dataset, str] | None":  # noqa: F821
    """Images without metadata: with the captions beside them, or alone where --caption_column has no value."""
    names, left_out = data_files.training_files(listing.images())
    if not names:
        return None
    said, captions, files = "from images without metadata", {}, []
    if args.caption_column is not None:
        captions, said, files = caption_files.read(listing, names, args)
    if left_out:
        splits = sorted({data_files.split_of(name) for name in left_out})
        said += f"; left out as other splits: {', '.join(splits)} ({len(left_out)} images)"
    if masks := listing.masks():
        said += f"; left out: {len(masks)} masks ({', '.join(data_files.MASKS)})"
    rows = []
    for name in names:
        values, place, fault = captions.get(name, ({}, None, None))
        image = _ImageEntry(bytes=None, path=listing.files[name])
        rows.append(({**values, "image": image}, place, {args.caption_column: fault} if fault else {}))
    return _dataset(rows), said + _left_unread(listing, *names, *left_out, *masks, *files)


def _left_unread(listing, *read: str) -> str:
    """The kinds of files that are no part of the data, as a clause; "" if there are none."""
    known = {*read, *(name for name in listing.files if listing.files[name] in listing.zips)}
    kinds = Counter(posixpath.splitext(name)[1] or "others" for name in listing.files if name not in known)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
    return f"; not read: {sanitize.printable(shown)}" if kinds else ""


def _dataset(rows):
    import datasets

    dataset = datasets.Dataset(datasets.table.InMemoryTable(_table(rows)))
    for column in {name for values, _, _ in rows for name, value in values.items() if isinstance(value, _ImageEntry)}:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _refuse_two_of_a_kind(names: list[str]) -> None:
    seen = {}
    for name in names:
        other = seen.setdefault(posixpath.dirname(name), name)
        if other != name:
            raise data_files.BadData(f"{other} and {posixpath.basename(name)} are in one folder: keep one of them")


# --- from a row's values to columns


def _read_file(listing, name: str) -> Iterator[tuple[dict, str, dict]]:
    """(columns, "metadata.jsonl line 3", faults by column) of each row of a metadata file."""
    folder = posixpath.dirname(os.path.join(listing.root, name))
    for values, place, faults in metadata_files.rows(text_files.read(listing.files[name], name), name):
        columns, wrong = _columns(values, folder, name)
        yield columns, place, wrong | faults


def _columns(values: dict, folder: str, metadata: str) -> tuple[dict, dict]:
    """(columns, faults by column): `*file_name` become image entries, whose files are not opened yet."""
    columns, faults = {}, {}
    for key, value in values.items():
        if metadata_files.is_name_column(key):
            column = key.removesuffix("file_name").removesuffix("_") or "image"
            if column in (LINE, FAULTS):
                continue
            path, fault = _inside(folder, value, posixpath.basename(metadata))
            columns[column] = _ImageEntry(bytes=None, path=path)
            faults |= {column: fault} if fault else {}
        elif key not in (LINE, FAULTS):
            columns.setdefault(key, value)
    return columns, faults


def _inside(folder: str, name, metadata: str) -> tuple[str | None, str | None]:
    """(path of the image, None) or (None, what is wrong with its name). Opens no file."""
    if not isinstance(name, str) or not name or not _is_text(name):
        return None, f"file_name is {_shown(name)}"
    plain, below = name.replace("\\", "/"), folder.rstrip(os.sep) + os.sep
    if re.match(r"\w+://", plain):
        return None, f"file_name {name!r:.300} is a URL: download the image, and name its file"
    path = os.path.normpath(os.path.join(folder, plain))
    real = os.path.realpath(folder).rstrip(os.sep) + os.sep
    # An absolute path, while the folder was named by a symbolic link.
    if plain.startswith("/") and path.startswith(real):
        path = below + path[len(real) :]
    if not path.startswith(below):
        absolute = plain.startswith("/") or plain[1:3] == ":/"
        what = "is an absolute path that leads" if absolute else "leads"
        advice = "put the image, or a link to its folder, there"
        where = f"outside of the folder of its {metadata}, so it is not read"
        return None, f"file_name {name!r:.300} {what} {where}: {advice}"
    return path, None


def _refuse_other_keys(listing, rows, captions: str | None) -> None:
    """Advise which column to rename if none is called file_name."""
    if not rows or any(isinstance(value, _ImageEntry) for values, _, _ in rows for value in values.values()):
        return
    names = list(dict.fromkeys(name for values, _, _ in rows for name in values))
    at_hand = {posixpath.basename(name) for name in listing.files}
    images = [name for name in names if names_files([values.get(name) for values, _, _ in rows], at_hand)]
    place = next(place for values, place, _ in rows if values)
    advice = f"rename {images[0]!r} to file_name" if images else "each line needs a file_name that names its image"
    if captions is not None and captions not in names:
        column = likely_captions([name for name in names if name not in images and _are_texts(name, rows)])
        advice += f", and pass --caption_column={column}" if column else ""
    shown = sanitize.printable(", ".join(names))[:300]
    raise data_files.BadData(sanitize.printable(f"{place} has no file_name, only: {shown}; {advice}"))


def _note_rows_without_names(rows) -> None:
    columns = {name for values, _, _ in rows for name, value in values.items() if isinstance(value, _ImageEntry)}
    for values, _, faults in rows:
        if values and not any(isinstance(value, _ImageEntry) for value in values.values()):
            shown = sanitize.printable(", ".join(values))[:300]
            faults.update(dict.fromkeys(columns, f"it has no image: no file_name, only: {shown}"))


def names_files(values: list, at_hand=frozenset()) -> bool:
    """Whether the first values of a column are names of image files."""
    seen = [value for value in values if isinstance(value, str) and value][:20]
    known = [
        value.lower().endswith(data_files.IMAGES) or posixpath.basename(value.replace("\\", "/")) in at_hand
        for value in seen
    ]
    return bool(seen) and all(known)


def _are_texts(name: str, rows) -> bool:
    return all(isinstance(values.get(name), str | list | None) for values, _, _ in rows[:20])


def likely_captions(columns: list[str]) -> str | None:
    """The text column that most likely holds captions."""
    words = ("text", "caption", "prompt", "description", "txt", "label", "title")
    found = [name for word in words for name in columns if word in name.lower()]
    return next(iter(found), columns[0] if len(columns) == 1 else None)


# --- the files that rows name


def _find_files(listing, rows, left_out: list[str]) -> list[str]:
    """Replace the paths in the rows by paths to open. A missing file is a fault, with the name that was probably meant.

    Returns the images that no row names, except those of splits whose metadata is `left_out`.
    """
    image_rows = [
        (image, column, faults)
        for values, _, faults in rows
        for column, image in values.items()
        if isinstance(image, _ImageEntry) and image["path"]
    ]
    missing = [entry for entry in image_rows if not _find(listing, entry[0])]
    if missing and listing.zips and not any(path.startswith("zip://") for path in listing.files.values()):
        data_files.add_zips(listing)
        missing = [entry for entry in missing if not _find(listing, entry[0])]
    listed = {image["path"] for image, _, _ in image_rows}
    splits = {data_files.split_of(name) for name in left_out}
    left = [
        name for name in listing.having(data_files.IMAGES)
        if listing.files[name] not in listed and data_files.split_of(name) not in splits
    ]  # fmt: skip
    names = [data_files.relative(image["path"], listing.root) for image, _, _ in missing]
    unpack = data_files.archives(listing) if missing else ""
    for (_, column, faults), name, meant in zip(missing, names, near_names.did_you_mean(names, left), strict=True):
        advice = f"; did you mean {meant}?" if meant else unpack
        faults.setdefault(column, sanitize.printable(f"No such file: {name}{advice}")[:900])
    return left


def _warn_of_unlisted(listing, left: list[str]) -> None:
    if left:
        shown = ", ".join(map(sanitize.printable, left[:5])) + (", ..." if len(left) > 5 else "")
        kinds = " or ".join(sorted({posixpath.basename(name) for name in listing.metadata()}))
        logger.warning(f"{len(left)} images in {listing.root} have no line in {kinds} and are left out: {shown}")


def _find(listing, image: _ImageEntry) -> bool:
    """Whether the file exists; sets the path to open in `image`."""
    path = image["path"]
    name = data_files.relative(path, listing.root)
    found = listing.files.get(name)
    if (found is None or not name.isascii()) and os.path.exists(path):  # hidden, or one of two names that look alike
        return True
    image["path"] = found or path
    return found is not None


def find(folder: str, names: list) -> tuple[list, list[str | None]]:
    """(image entries, fault or None of each) for a column with names of files below a folder."""
    listing = data_files.list_files(folder)
    rows = []
    for name in names:
        columns, faults = _columns({"file_name": name}, listing.root, "data")
        rows.append((columns, "", faults))
    image_rows = [row for row in rows if row[0]["image"]["path"]]
    _find_files(listing, image_rows, [])
    entries = [dict(columns["image"]) if columns["image"]["path"] else None for columns, _, _ in rows]
    return entries, [faults.get("image") for _, _, faults in rows]


# --- the table


def _table(rows):
    """The rows as an Arrow table. A value that does not fit its column becomes null and a fault."""
    import pyarrow

    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {}
    for name in dict.fromkeys(name for values, _, _ in rows for name in values):
        column = [values.get(name) for values, _, _ in rows]
        if any(isinstance(value, _ImageEntry) for value in column):
            column = [value if isinstance(value, _ImageEntry) else None for value in column]
            columns[name] = pyarrow.array(column, image)
            continue
        try:
            columns[name] = pyarrow.array(column)
        except (pyarrow.ArrowException, ValueError, OverflowError):  # several types, or not valid UTF-8
            columns[name] = pyarrow.array(_texts(name, column, rows))
    columns[LINE] = pyarrow.array([place for _, place, _ in rows], pyarrow.string())
    faults = [json.dumps(found) if found else None for _, _, found in rows]
    columns[FAULTS] = pyarrow.array(faults, pyarrow.string())
    return pyarrow.table(columns)


def _texts(name: str, column: list, rows) -> list:
    """A column of strings, or of lists of strings if some are lists. Other values become None and a fault."""
    lists = any(isinstance(value, list) for value in column)
    result = []
    for value, (_, _, faults) in zip(column, rows):
        strings = value if isinstance(value, list) else [value]
        if not all(text is None or (isinstance(text, str) and _is_text(text)) for text in strings):
            faults[name] = f"{sanitize.printable(name)[:100]} is {_shown(value)}"
            value = None
        result.append([value] if lists and isinstance(value, str) else value)
    return result


def _is_text(text: str) -> bool:
    try:
        return text.encode() is not None
    except UnicodeEncodeError:  # an unpaired surrogate
        return False


def _shown(value) -> str:
    if isinstance(value, str) and not _is_text(value):
        return f"not valid Unicode: {ascii(value)[:60]}"
    return "missing" if value is None else f"not a text: {ascii(value)[:60]}" if value != "" else "empty"
