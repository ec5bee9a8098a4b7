"""A folder of pictures with metadata.jsonl files, read line by line: every fault in them has its file and line.

The reader in `datasets` gives up on all of them at the first line that it cannot parse or whose caption is of another
type, does not say where, and leaves out pictures without a line in silence.
"""

import json
import os
from collections.abc import Iterator

from . import texts
from .runtime import logger

METADATA = "metadata.jsonl"
LINE, FAULTS = "_line", "_faults"  # columns of ours: where a row stands; a JSON object, what is wrong by column
SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class _Picture(dict):
    """An entry of a picture column: not what a metadata.jsonl may hold, whose paths are looked at first."""


def read(folder) -> "datasets.Dataset | None":  # noqa: F821
    """The samples that the folder's metadata.jsonl files list, or None if there are none, or other metadata as well.

    A line that cannot be used becomes a row all the same, without a picture or caption, its reason in column FAULTS.
    A `file_name` leads from its metadata.jsonl to below that file's folder; elsewhere nothing is ever read.
    """
    import datasets

    root = os.path.abspath(folder)
    paths = list(_walk(root))
    names = {os.path.basename(path) for path in paths}
    if METADATA not in names or names & {"metadata.csv", "metadata.parquet"}:
        return None
    rows = [row for path in paths if os.path.basename(path) == METADATA for row in _read_lines(path, root)]
    if rows and not any(values for values, _, _ in rows):
        raise ValueError(f"{rows[0][1]}: {next(iter(rows[0][2].values()))}")
    _warn_of_unlisted(root, paths, rows)
    dataset = datasets.Dataset(datasets.table.InMemoryTable(_table(rows)))
    for column in {name for values, _, _ in rows for name, value in values.items() if isinstance(value, _Picture)}:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _walk(root: str) -> Iterator[str]:
    """All files below, in a fixed order, links followed, hidden ones left out."""
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith((".", "__")))
        seen.add(real)
        yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))


def _read_lines(path: str, root: str) -> Iterator[tuple[dict, str, dict]]:
    """(columns, "metadata.jsonl line 3", faults by column) of each line that is not blank."""
    name = os.path.relpath(path, root)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                if line.startswith(_UTF16):
                    raise ValueError(f"{name} is UTF-16: save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse(line, os.path.dirname(path), f"{name} line {number}")


def _parse(line: bytes, folder: str, place: str) -> tuple[dict, str, dict]:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return {}, place, {"": f"the line is no JSON: {' '.join(str(error).split())}"}
    if not isinstance(values, dict):
        return {}, place, {"": "the line is no JSON object"}
    columns, faults = {}, {}
    for key, value in values.items():
        if key == "file_name" or key.endswith("_file_name"):
            column = key.removesuffix("file_name").removesuffix("_") or "image"
            if column in (LINE, FAULTS):
                continue
            path, fault = _inside(folder, value)
            columns[column] = _Picture(bytes=None, path=path)
            faults |= {column: fault} if fault else {}
        else:
            columns.setdefault(key, value)
    return columns, place, faults


def _inside(folder: str, name) -> tuple[str | None, str | None]:
    """(path of the picture, None) or (None, what is wrong with its name). Looks at no file."""
    if not isinstance(name, str) or not name or not _is_text(name):
        return None, f"file_name is {_shown(name)}"
    path = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
    if name.startswith(("/", "\\")) or not path.startswith(folder.rstrip(os.sep) + os.sep):
        return None, f"file_name {name!r:.300} leads outside of the folder of its {METADATA}, so it is not read"
    return path, None


def _table(rows):
    """The rows as an Arrow table; what does not fit a column is left empty and noted as a fault."""
    import pyarrow

    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {}
    for name in dict.fromkeys(name for values, _, _ in rows for name in values):
        column = [values.get(name) for values, _, _ in rows]
        if any(isinstance(value, _Picture) for value in column):
            column = [value if isinstance(value, _Picture) else None for value in column]
            columns[name] = pyarrow.array(column, image)
            continue
        try:
            columns[name] = pyarrow.array(column)
        except (pyarrow.ArrowException, ValueError, OverflowError):  # of several types, or not writable as UTF-8
            columns[name] = pyarrow.array(_texts(name, column, rows))
    columns[LINE] = pyarrow.array([place for _, place, _ in rows], pyarrow.string())
    faults = [json.dumps(found) if found else None for _, _, found in rows]
    columns[FAULTS] = pyarrow.array(faults, pyarrow.string())
    return pyarrow.table(columns)


def _texts(name: str, column: list, rows) -> list:
    """A column of strings, or of lists of strings if some are; what is neither becomes None and a fault of its row."""
    lists = any(isinstance(value, list) for value in column)
    result = []
    for value, (_, _, faults) in zip(column, rows):
        strings = value if isinstance(value, list) else [value]
        if not all(text is None or (isinstance(text, str) and _is_text(text)) for text in strings):
            faults[name] = f"{texts.printable(name)[:100]} is {_shown(value)}"
            value = None
        result.append([value] if lists and isinstance(value, str) else value)
    return result


def _is_text(text: str) -> bool:
    try:
        return text.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _shown(value) -> str:
    if isinstance(value, str) and not _is_text(value):
        return f"no Unicode text: {ascii(value)[:60]}"
    return "missing" if value is None else f"not a text: {ascii(value)[:60]}" if value != "" else "empty"


def _warn_of_unlisted(root: str, paths: list[str], rows) -> None:
    listed = {value["path"] for values, _, _ in rows for value in values.values() if isinstance(value, _Picture)}
    left = [path for path in paths if path not in listed and path.lower().endswith(SUFFIXES)]
    if left:
        shown = [texts.printable(os.path.relpath(path, root)) for path in left[:5]]
        first = ", ".join(shown) + (", ..." if len(left) > 5 else "")
        logger.logger.warning(f"{len(left)} pictures in {root} have no line in {METADATA} and are left out: {first}")
