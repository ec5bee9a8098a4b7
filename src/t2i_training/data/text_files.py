"""Text files as people save them. For one that is not UTF-8, or no text, BadData says what it is and what to do."""

import posixpath
import zipfile
import zlib

from .. import sanitize
from ..sources import data_files, stand_ins

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read(path: str, name: str) -> bytes:
    """The content of a file that messages call `name`."""
    try:
        return data_files.read_bytes(path)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or sanitize.reason(error)
        raise data_files.BadData(f"{name} is {stand_ins.link_to_nothing(path) or f'not readable: {reason}'}") from error


def without_mark(content: bytes, name: str) -> bytes:
    """The content after its byte order mark, if it has one."""
    if instead := stand_ins.of_content(content[:1000]):
        raise data_files.BadData(f"{name} is {instead}")
    if content.startswith(_UTF16) or b"\0" in content[:4]:
        raise data_files.BadData(f"{name} is UTF-16: save it as UTF-8")
    return content.removeprefix(b"\xef\xbb\xbf")


def decode(content: bytes, name: str, remedy: str = ": save it as UTF-8") -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = len(content[: error.start + 1].splitlines())
        base, suffix = posixpath.basename(name), posixpath.splitext(name)[1]
        raise data_files.BadData(
            f"{name} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}), most likely Windows-1252{remedy}, "
            f"or make a new one with `iconv -f WINDOWS-1252 -t UTF-8 {base} > new{suffix}`"
        ) from None
