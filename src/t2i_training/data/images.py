"""Decodes image files of any kind, cuts out uint8 pixels of a shape, and normalises pixels for the networks."""

import contextlib
import errno
import functools
import io
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .. import sanitize
from ..sources import stand_ins
from . import image_kinds

with contextlib.suppress(ImportError):  # phones' HEIC, for those who have installed it
    import pillow_heif

    pillow_heif.register_heif_opener()
with contextlib.suppress(ImportError):  # JPEG XL
    import pillow_jxl  # noqa: F401

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # PIL's nearest samples pixel centres, which is what "exact" asks for
}

# Filters that torch has vectorised for uint8: 5 times as fast as Pillow's. The formulas are the same; about 1% of the
# values differ by one level of 255, none by more than two. Older torch lacks Lanczos. Without AVX Pillow's are used.
_VECTORIZED = {"bicubic", "bilinear"} | ({"lanczos"} if hasattr(torch.ops.aten, "_upsample_lanczos2d_aa") else set())
if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
    _VECTORIZED = set()

LONGEST = 32  # an image more elongated than 32:1 is cropped to its middle: enlarging all of it could take gigabytes

_TURNS = {  # TIFF 6.0, tag 274: from the stored image to the upright one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]

_SYSTEM_FAULTS = {  # faults of disk, network or process: the next attempt may succeed
    getattr(errno, name)
    for name in (
        "EIO", "ENOSPC", "EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "ECONNABORTED",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "EDQUOT", "EAGAIN", "EINTR",
    )
    if hasattr(errno, name)
}  # fmt: skip


class UnreadableImage(Exception):
    """An image file that cannot be used; the message tells the user why, the cause is the original exception."""


@contextlib.contextmanager
def naming_the_fault(source: bytes | str | Path):
    """Turn exceptions into UnreadableImage, except for faults of the disk and out of memory."""
    try:
        yield
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise many types on damaged files
        if is_system_fault(error):
            raise
        raise UnreadableImage(_reason(source, error)) from error


def is_system_fault(error: BaseException) -> bool:
    """Whether reading failed because of the system, not the file."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SYSTEM_FAULTS)


def _reason(source: bytes | str | Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if isinstance(source, bytes):
            return image_kinds.describe(source[:1000])
        with open(source, "rb") as file:
            return image_kinds.describe(file.read(1000))
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        size = f"{int(pixels[1]) / 1e6:.0f} million pixels" if pixels else "too many pixels"
        return (
            f"the image has {size}; above {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million Pillow takes it for a "
            "decompression bomb, which would fill the memory: make it smaller, e.g. "
            "`magick IMAGE -resize 4096x4096 NEW_IMAGE`"
        )
    if not isinstance(source, bytes) and (lost := stand_ins.link_to_nothing(source)):
        return f"it is {lost}"
    reason = f"{type(error).__name__}: {sanitize.reason(error)}"
    known_kind = isinstance(error, OSError | ValueError)
    return reason if known_kind else f"the file is damaged ({reason})"


def decode(source: bytes | str | Path, min_shape: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file, upright and in RGB.

    EXIF orientation is applied, transparency is composited over white, 16-bit and floating-point grey becomes 8-bit,
    CMYK and palettes become RGB, the first frame of an animation is taken. With `min_shape`, (height, width) in pixels,
    a JPEG may be decoded at 1/2, 1/4 or 1/8 scale as long as both sides stay at least twice as long: 3.5 to 5 times
    cheaper for a 12-megapixel photograph, with nothing lost by a later resize to that shape. Raises UnreadableImage.
    """
    return decode_with_size(source, min_shape)[0]


def decode_with_size(
    source: bytes | str | Path, min_shape: tuple[int, int] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, and the upright image's (width, height) in the file, whatever scale it was decoded at."""
    try:
        return _decode(source, min_shape)
    except UnreadableImage as fault:
        alone = _png_without_metadata(source)
        if alone is None:
            raise
        with contextlib.suppress(UnreadableImage):
            return _decode(alone, min_shape)
        raise fault from fault.__cause__


def _decode(source: bytes | str | Path, min_shape: tuple[int, int] | None) -> tuple[Image.Image, tuple[int, int]]:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with naming_the_fault(source), Image.open(file) as image:
        size = None
        if min_shape is not None and image.format in ("JPEG", "MPO"):  # the kinds that can be decoded at a scale
            on_its_side = _turn(image) in _ON_ITS_SIDE
            size = image.size[::-1] if on_its_side else image.size
            height, width = min_shape[::-1] if on_its_side else min_shape
            image.draft(None, (2 * width, 2 * height))
        image.load()
        turn = _turn(image)
        upright = _to_rgb(image if turn is None else image.transpose(turn))
        return upright, size or upright.size


_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TURNED = (b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0")  # text chunks that may hold it; XMP is not compressed
_LONGEST_TEXT = 2**16  # bytes


def _png_without_metadata(source: bytes | str | Path) -> bytes | None:
    """A PNG file without metadata but its orientation; None for another format, or if its chunks are incomplete.

    Pillow rejects an image whose metadata are damaged, or exceed 1 MiB when decompressed, as ComfyUI's workflows can;
    viewers do not. Chunks are as in the PNG specification, section 5.3. Nothing is decompressed.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not content.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place < len(content):
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        end = place + 12 + size
        if end > len(content):
            return None
        turned = size < _LONGEST_TEXT and content.startswith(_TURNED, place + 8)
        intact = zlib.crc32(memoryview(content)[place + 4 : end - 4]) == int.from_bytes(content[end - 4 : end], "big")
        if kind in _PIXELS or ((kind == b"eXIf" or turned) and intact):
            kept.append(content[place:end])
        place = len(content) if kind == b"IEND" else end
    return b"".join(kept)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the image upright, by its EXIF orientation; None if it is."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many types on damaged EXIF data, which says nothing about the pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip these to 8 bit instead of scaling
        values = np.asarray(image, dtype=np.float32)
        full_scale = 65535.0
        if not image.mode.startswith("I;16"):  # wider modes do not define white: use the brightest pixel
            if not np.isfinite(values).all():
                raise ValueError("it has pixels that are not finite")
            full_scale = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), values.max())
        return Image.fromarray(np.uint8(np.clip(values * (255.0 / full_scale), 0, 255) + 0.5)).convert("RGB")
    if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def covering(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which an image of that `size` (width, height) just covers a `shape` (H, W)."""
    (width, height), (H, W) = size, shape
    return (W, height * W // width) if height * W >= width * H else (width * H // height, H)


def fill(
    image: Image.Image, shape: tuple[int, int], interpolation: str, crop_draw=None, mirror: bool = False
) -> Tensor:
    """Resize the image so that it just covers `shape` (H, W), cut off the rest, mirror it if asked: (3, H, W) uint8.

    `crop_draw` is a NumPy generator for the place of the crop; None takes the centre crop.
    """
    short, (H, W) = min(image.size), shape
    if max(image.size) > LONGEST * short:
        width, height = (min(side, LONGEST * short) for side in image.size)
        image = ImageOps.fit(image, (width, height), Image.Resampling.NEAREST)  # crops without resizing
    width, height = covering(image.size, shape)
    pixels = _resize(image, width, height, interpolation)
    if crop_draw is None:
        left, top = (width - W) // 2, (height - H) // 2
    else:
        left, top = (int(crop_draw.integers(extra + 1)) for extra in (width - W, height - H))
    pixels = pixels[:, top : top + H, left : left + W]
    return (pixels.flip(2) if mirror else pixels).contiguous()


def _resize(image: Image.Image, width: int, height: int, interpolation: str) -> Tensor:
    """(3, height, width) uint8, not contiguous."""
    if interpolation not in _VECTORIZED:
        image = image.resize((width, height), RESAMPLING[interpolation], reducing_gap=3.0)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, (height, width), mode=interpolation, antialias=True)[0]


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalize_for_clip(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, S, S) uint8 in 0..255 to `dtype`, normalised with CLIP's training statistics (arXiv:2103.00020)."""
    mean, std = _clip_statistics(pixels.device)
    return ((pixels / 255 - mean) / std).to(dtype)


@functools.cache  # cached: made anew they would be copied to the device in every step
def _clip_statistics(device: torch.device) -> list[Tensor]:
    return [torch.tensor(values, device=device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD)]


def normalize(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) uint8 in 0..255 to `dtype` in -1..1. Runs on the device: uint8 is a quarter of float32's traffic."""
    return (pixels / 127.5 - 1).to(dtype)  # in fp32: bf16 would lose half a grey level
