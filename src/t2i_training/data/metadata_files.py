"""Reads the rows of metadata files: (values by column, place in the file, faults by column).

A missing or surplus value is a fault of its row; the key "" holds faults of the whole row. A file that cannot be read
at all raises BadData, with one line that says where and what to do.
"""

import csv
import io
import json
from collections.abc import Iterator

from .. import sanitize
from ..sources import data_files
from . import text_files

Rows = Iterator[tuple[dict, str, dict]]
_DELIMITERS = ",;\t|"


def rows(content: bytes, name: str) -> Rows:
    """The rows of a metadata.jsonl, .csv or .parquet; a place is e.g. "metadata.jsonl line 3"."""
    if name.endswith(".parquet"):
        return _parquet_rows(content, name)
    content = text_files.without_mark(content, name)
    return _csv_rows(content, name) if name.endswith(".csv") else _json_rows(content, name)


def is_name_column(column: str) -> bool:
    """Whether the column's values are names of image files."""
    return column == "file_name" or column.endswith("_file_name")


def _json_rows(content: bytes, name: str) -> Rows:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            values, faults = _parse(line)
            yield values, f"{name} line {number}", faults


def _parse(line: bytes) -> tuple[dict, dict]:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return {}, {"": f"the line is not JSON: it is not UTF-8 ({error}): save the file as UTF-8"}
    except (ValueError, RecursionError) as error:
        whole = "; an object, {...}, must stand on one line" if line.strip() in (b"{", b"[", b"[{") else ""
        return {}, {"": f"the line is not JSON: {' '.join(str(error).split())}{whole}"}
    if isinstance(values, dict):
        return values, {}
    of_objects = isinstance(values, list) and any(isinstance(value, dict) for value in values)
    advice = " but a list of them: write each on a line of its own" if of_objects else ""
    return {}, {"": f"the line is not a JSON object{advice}"}


def _csv_rows(content: bytes, name: str) -> Rows:
    """Values are text (NA is a word); an empty field is no value."""
    text = text_files.decode(content, name, ", as spreadsheets write it: save it as 'CSV UTF-8'")
    first = 0
    if text[:4].lower() == "sep=" and text[5:6] in "\r\n":  # tells Excel the delimiter
        first, text = 1, text.partition("\n")[2]
    delimiter = _delimiter(text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    header = None
    while True:
        place = f"{name} line {first + lines.line_num + 1}"
        try:
            fields = next(lines, None)
        except csv.Error as error:
            until = first + lines.line_num
            backslash = '; a double quote within quotes is written twice, "", and not \\"' if '\\"' in text else ""
            reason = f"{error} (read until line {until}; is a quote not closed?){backslash}"
            yield {}, place, {"": f"the line is not CSV: {reason}"}
            continue
        if fields is None:
            return
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            header, top = _header(fields, place), place
        elif len(header) == 1 < len(fields) and not is_name_column(header[0]):
            raise data_files.BadData(f"{top} names no columns: the header must stand there, e.g. file_name,text")
        else:
            yield _record(header, fields, place, delimiter)


def _delimiter(text: str) -> str:
    """The delimiter with which the first line has a file_name column, or else the most columns."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    headers = {mark: [name.strip().strip('"').strip() for name in line.split(mark)] for mark in _DELIMITERS}
    named = [mark for mark, names in headers.items() if any(is_name_column(name) for name in names)]
    return max(named or _DELIMITERS, key=lambda mark: len(headers[mark]))


def _header(fields: list[str], place: str) -> list[str]:
    header = [field.strip() for field in fields]
    while header and not header[-1]:
        header.pop()
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise data_files.BadData(f"{place} names the column {sanitize.printable(twice)!r:.100} twice")
    if any(field.lower().endswith(data_files.IMAGES) for field in header):
        raise data_files.BadData(f"{place} holds values: the first line must name the columns, e.g. file_name,text")
    return header


def _record(header: list[str], fields: list[str], place: str, delimiter: str) -> tuple[dict, str, dict]:
    while len(fields) > len(header) and not fields[-1].strip():
        fields = fields[:-1]
    count = f"the line has {len(fields)} fields, the header {len(header)}".replace(" 1 fields", " 1 field")
    if len(fields) > len(header):
        return {}, place, {"": f"{count}: a caption that holds {delimiter!r} must stand in double quotes"}
    values = {name: field or None for name, field in zip(header, fields) if name}
    missing = header[len(fields) :]
    faults = {("image" if is_name_column(name) else name): count for name in missing}
    return dict.fromkeys(missing) | values, place, faults


def _parquet_rows(content: bytes, name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise data_files.BadData(f"{name} cannot be read as Parquet: {sanitize.reason(error)}") from None
    for number, values in enumerate(rows, 1):
        yield values, f"{name} row {number}", {}
