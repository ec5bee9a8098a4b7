"""Recognises files that Pillow cannot read as images by their first bytes, and says what to do."""

import re

from ..sources import stand_ins

_CONVERT = "convert it to PNG or JPEG"
_BRANDS = {  # brands of ISO media files (ISO/IEC 14496-12), which hold images or videos
    b"heic": "heif", b"heix": "heif", b"heim": "heif", b"heis": "heif", b"hevc": "heif", b"hevx": "heif",
    b"mif1": "heif", b"msf1": "heif", b"avif": "avif", b"avis": "avif", b"crx ": "raw",
}  # fmt: skip
_ISO = {
    "heif": f"a HEIC image, which Pillow reads with the package pillow-heif: pip install pillow-heif, or {_CONVERT}",
    "avif": f"an AVIF image, which this Pillow cannot read: pip install --upgrade pillow, or {_CONVERT}",
    "raw": f"a camera's raw file: {_CONVERT}",
}
_JXL = f"a JPEG XL image, which Pillow reads with a package: pip install pillow-jxl-plugin, or {_CONVERT}"
_STARTS = (  # the first match counts
    (b"%PDF", f"not an image but a PDF document: {_CONVERT}"),
    (b"\xff\x0a", _JXL),
    (b"\x00\x00\x00\x0cJXL ", _JXL),
    (b"PK\x03\x04", "not an image but a zip archive: unpack it"),
    (b"\x1f\x8b", "not an image but a gzip archive: unpack it"),
    (b"7z\xbc\xaf", "not an image but a 7z archive: unpack it"),
    (b"Rar!", "not an image but a RAR archive: unpack it"),
    (b"\x1a\x45\xdf\xa3", "not an image but a video (WebM or Matroska): take single images out of it"),
    (b"FLV", "not an image but a video (Flash): take single images out of it"),
    (b"FUJIFILM", _ISO["raw"]),
    (b"\x93NUMPY", f"not an image but a NumPy array: {_CONVERT}"),
    (b"\x80\x04\x95", f"not an image but a Python pickle: {_CONVERT}"),
    (b"\x89HDF", f"not an image but an HDF5 file: {_CONVERT}"),
)
_DOWNLOAD = "saved in place of the image, as servers send it with an error: download the image again"


def describe(head: bytes) -> str:
    """What a file is, as a clause for the user, from its first thousand bytes."""
    if not head:
        return "the file is empty"
    if not head.strip(b"\0"):
        return "it begins with zero bytes only, as after an incomplete copy or download: copy it again"
    if head[4:8] == b"ftyp":
        return _ISO.get(_BRANDS.get(head[8:12]), "not an image but a video: take single images out of it")
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "not an image but a video (AVI): take single images out of it"
    if stand_ins.is_pointer(head):
        return f"not an image but {stand_ins.POINTER}"
    for start, what in _STARTS:
        if head.startswith(start):
            return what
    return _describe_text(head) or "not an image, or of a format that Pillow cannot read"


def _describe_text(head: bytes) -> str | None:
    """What a text file is; None if it is not text."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, errors="ignore").strip()
    if not text or sum(c.isprintable() or c.isspace() for c in text) < len(text) or "\0" in text:
        return None
    start = text.lower()
    if re.search(r"<svg[\s>]", start) and start[0] == "<":
        return f"not an image but an SVG drawing, which Pillow cannot read: {_CONVERT}"
    if stand_ins.is_web_page(start):
        return f"not an image but an HTML page, {_DOWNLOAD}"
    if start[0] in "{[" or start.startswith("<?xml") or start.startswith("<error"):
        return f"not an image but {'a JSON' if start[0] in '{[' else 'an XML'} text, {_DOWNLOAD}"
    if start.startswith("data:image/"):
        return "not an image but a data: address that holds one: decode its base64 into a file"
    return f"not an image but a text that begins {' '.join(text.split())[:40]!r}"
