"""From a picture file of any kind to a square of uint8 pixels, and from pixels to what networks take."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # PIL's nearest samples pixel centres, which is what "exact" asks for
}

LONGEST = 32  # of a picture more elongated than 32:1 the middle is used: enlarging all of it could take gigabytes


def decode(source: bytes | str | Path, min_side: int | None = None) -> Image.Image:
    """Read a picture file, upright and in RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit and floating-point grey becomes 8-bit, CMYK and
    palettes become RGB, of an animation the first frame is taken. With `min_side` a JPEG may be decoded at 1/2, 1/4 or
    1/8 scale as long as both sides stay at least twice `min_side` pixels: 3.5 to 5 times cheaper for a 12-megapixel
    photograph, with nothing lost by a later resize to `min_side`. Raises what PIL raises on an unreadable file.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        if min_side is not None:
            picture.draft(None, (2 * min_side, 2 * min_side))
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # PIL would clip, not scale, these to 8 bit
        values = np.asarray(picture, dtype=np.float32)
        full_scale = 65535.0
        if not picture.mode.startswith("I;16"):  # wider modes do not say what white is; the brightest pixel does
            if not np.isfinite(values).all():
                raise ValueError("it has pixels that are not finite")
            full_scale = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), values.max())
        return Image.fromarray(np.uint8(np.clip(values * (255.0 / full_scale), 0, 255) + 0.5)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def square(picture: Image.Image, resolution: int, interpolation: str, crop_draw=None, mirror: bool = False) -> Tensor:
    """Resize the shorter side to `resolution`, cut out a square, mirror it if asked: (3, R, R) uint8.

    `crop_draw` is a NumPy generator for the place of the crop; None takes the centre.
    """
    short = min(picture.size)
    if max(picture.size) > LONGEST * short:
        width, height = (min(side, LONGEST * short) for side in picture.size)
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.NEAREST)  # same scale: cuts, resizes nothing
    width, height = (resolution * side // short for side in picture.size)
    picture = picture.resize((width, height), RESAMPLING[interpolation], reducing_gap=3.0)
    if crop_draw is None:
        left, top = (width - resolution) // 2, (height - resolution) // 2
    else:
        left, top = (int(crop_draw.integers(extra + 1)) for extra in (width - resolution, height - resolution))
    picture = picture.crop((left, top, left + resolution, top + resolution))
    if mirror:
        picture = ImageOps.mirror(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalize_for_clip(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, S, S) uint8 in 0..255 to `dtype`, by the statistics every CLIP was trained with (arXiv:2103.00020)."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels / 255 - mean) / std).to(dtype)


def normalize(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, R, R) uint8 in 0..255 to `dtype` in -1..1. Runs on the device: uint8 is a quarter of float32's traffic."""
    return (pixels / 127.5 - 1).to(dtype)  # in fp32: bf16 would lose half a grey level
