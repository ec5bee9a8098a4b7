"""Seventy-odd bad or odd samples, each with its expected outcome.

    python tests/bad_samples.py      # builds them, inspects them, prints a line for each

`build(folder)` makes a folder of images with metadata.jsonl files. In `CASES` an outcome is TRAINS, or words of the
reason for which the sample is refused; `PIXELS` holds what the odd good ones look like.
"""

import io
import json
import logging
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

TRAINS = "trains"
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
UPRIGHT = [[RED, GREEN, BLUE], [WHITE, (9, 9, 9), (99, 50, 1)]]  # 2 rows, 3 columns
_NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def data_args(**changes) -> SimpleNamespace:
    """What opening and inspecting a data set reads of a run's flags."""
    defaults = {
        "dataset_name": None, "dataset_config_name": None, "train_data_dir": None, "cache_dir": None,
        "image_column": "image", "caption_column": "text", "max_train_samples": None, "skip_bad_samples": False,
        "caption_prefix": None, "caption_suffix": None, "validation_prompts": [],
        "caption_extension": None, "caption_dropout": 0.0, "repeats_from_folders": False, "num_repeats": 1,
    }  # fmt: skip
    return SimpleNamespace(**defaults | changes)


def _stored(picture: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
    picture.save(file, kind, **options)
    return file.getvalue()


def _pixels(mode: str, *values) -> Image.Image:
    picture = Image.new(mode, (len(values), 1))
    picture.putdata(values)
    return picture


def _palette() -> Image.Image:
    picture = _pixels("P", 0, 1, 2)
    picture.putpalette([*RED, *GREEN, *BLUE])
    return picture


def _animation(kind: str, **options) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    return _stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def _turned(orientation: int, kind: str = "PNG") -> bytes:
    """UPRIGHT as a camera held another way stores it (TIFF 6.0, tag 274)."""
    upright = np.array(UPRIGHT, np.uint8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    return _stored(stored, kind, exif=exif)


def _bomb() -> bytes:
    """A PNG of a hundred bytes that claims to be 50,000 x 50,000 pixels."""
    file = _stored(Image.new("RGB", (1, 1)))
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + file[24:29]
    return file[:12] + header + struct.pack(">I", zlib.crc32(header)) + file[33:]


def _flipped(file: bytes, share: float) -> bytes:
    place = int(len(file) * share)
    return file[:place] + bytes([file[place] ^ 0xFF]) + file[place + 1 :]


_PNG, _JPEG, _PLAIN = _stored(_NOISE), _stored(_NOISE, "JPEG"), _stored(Image.new("RGB", (8, 8), RED))
NAN = np.array([[0.0, np.nan]], np.float32)
FILES = {  # name of an image file -> (its bytes or None for no file, expected)
    "plain.png": (_PNG, TRAINS),
    "plain.jpg": (_JPEG, TRAINS),
    "truncated.jpg": (_JPEG[: len(_JPEG) // 2], "image file is truncated"),
    "truncated.png": (_PNG[: len(_PNG) // 2], "image file is truncated"),
    "truncated_end_marker.jpg": (_JPEG[:-2], "image file is truncated"),
    "truncated_header.jpg": (_JPEG[:10], "Truncated File Read"),
    "zero_bytes.jpg": (b"", "the file is empty"),
    "text.jpg": (b"this is no image\n", "not an image"),
    "error_page.png": (b"<!DOCTYPE html><title>404 Not Found</title>", "not an image"),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "png_content.jpg": (_PLAIN, TRAINS),
    "no_suffix": (_PLAIN, TRAINS),
    "flipped_bit.png": (_flipped(_PNG, 0.5), "broken"),
    "flipped_bit_in_pixels.jpg": (_flipped(_JPEG, 0.7), TRAINS),  # JPEG has no checksum: it decodes, a little wrong
    "flipped_signature.jpg": (_flipped(_JPEG, 0.0), "not an image"),
    "missing.png": (None, "No such file"),
    "cmyk.jpg": (_stored(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95), TRAINS),
    "grey_16_bit.png": (_stored(np.array([[0, 32768, 65535]], np.uint16)), TRAINS),
    "floating_point.tiff": (_stored(np.array([[0.0, 0.5, 1.0]], np.float32), "TIFF"), TRAINS),
    "not_a_number.tiff": (_stored(NAN, "TIFF"), "pixels that are not finite"),
    "one_bit.png": (_stored(_pixels("1", 0, 255)), TRAINS),
    "palette.png": (_stored(_palette()), TRAINS),
    "palette_transparent.png": (_stored(_palette(), transparency=1), TRAINS),
    "rgba.png": (_stored(_pixels("RGBA", (*RED, 255), (*RED, 0), (0, 0, 0, 51))), TRAINS),
    "grey_alpha.png": (_stored(_pixels("LA", (10, 255), (10, 0), (0, 51))), TRAINS),
    "transparent_colour.png": (_stored(_pixels("RGB", RED, GREEN), transparency=GREEN), TRAINS),
    "rgba.webp": (_stored(_pixels("RGBA", (*RED, 255), (*RED, 0)), "WEBP", lossless=True, exact=True), TRAINS),
    "animated.gif": (_animation("GIF"), TRAINS),
    "animated.webp": (_animation("WEBP", lossless=True), TRAINS),
    "animated.png": (_animation("PNG"), TRAINS),
    **{f"turned_{orientation}.png": (_turned(orientation), TRAINS) for orientation in range(1, 9)},
    "turned_6.webp": (_turned(6, "WEBP"), TRAINS),
    "damaged_exif.png": (_stored(np.array(UPRIGHT, np.uint8), exif=b"Exif\0\0" + b"\x49\x49\x2a"), TRAINS),
    "one_pixel.png": (_stored(Image.new("RGB", (1, 1), BLUE)), TRAINS),
    "strip.png": (_stored(Image.new("RGB", (20_000, 10), GREEN)), TRAINS),
    "decompression_bomb.png": (_bomb(), "decompression bomb"),
}
PIXELS = {  # file -> rows of the decoded image; one pixel stands for an image of one colour
    "cmyk.jpg": [[(0, 255, 255)]],
    "grey_16_bit.png": [[(0,) * 3, (128,) * 3, (255,) * 3]],
    "floating_point.tiff": [[(0,) * 3, (128,) * 3, (255,) * 3]],
    "one_bit.png": [[BLACK, WHITE]],
    "palette.png": [[RED, GREEN, BLUE]],
    "palette_transparent.png": [[RED, WHITE, BLUE]],
    "rgba.png": [[RED, WHITE, (204, 204, 204)]],
    "grey_alpha.png": [[(10, 10, 10), WHITE, (204, 204, 204)]],
    "transparent_colour.png": [[RED, WHITE]],
    "rgba.webp": [[RED, WHITE]],
    "animated.gif": [[RED]],
    "animated.webp": [[RED]],
    "animated.png": [[RED]],
    **{f"turned_{orientation}.png": UPRIGHT for orientation in range(1, 9)},
    "damaged_exif.png": UPRIGHT,
    "png_content.jpg": [[RED]],
    "no_suffix": [[RED]],
    "one_pixel.png": [[BLUE]],
    "strip.png": [[GREEN]],
}
CAPTIONS = {  # name -> (the line's "text", expected); ... leaves it out
    "empty": ("", TRAINS),  # the unconditional prompt
    "blank": ("  \t ", TRAINS),
    "null": (None, "no caption"),
    "left out": (..., "no caption"),
    "a number": (7, "text is not a text: 7"),
    "true": (True, "text is not a text: True"),
    "an object": ({"en": "a cat"}, "text is not a text: {'en': 'a cat'}"),
    "a list": (["a cat", "a tabby"], TRAINS),
    "a list of one": (["a cat"], TRAINS),
    "an empty list": ([], "list of captions is empty"),
    "a list with null": (["a cat", None], "empty (null) entry"),
    "a list with a number": (["a cat", 7], "text is not a text: ['a cat', 7]"),
    "10,000 characters": ("long " * 2000, TRAINS),
    "control characters": ("a\x01\x1b[31mcat\x7f\u202e", TRAINS),
    "NUL": ("a\x00cat", TRAINS),
    "emoji": ("\N{CAT FACE}\N{ZERO WIDTH JOINER}\N{FIRE}", TRAINS),
    "half a surrogate pair": ("a \ud83d cat", "not valid Unicode"),
}
NAMES = {  # name -> (the line's "file_name", expected)
    "left out": (..., "it has no image"),
    "null": (None, "file_name is missing"),
    "empty": ("", "file_name is empty"),
    "a number": (12, "file_name is not a text: 12"),
    "a list": (["plain.png"], "file_name is not a text: ['plain.png']"),
    "half a surrogate pair": ("\ud83d.png", "file_name is not valid Unicode"),
    "with NUL": ("a\x00.png", "No such file"),
    "of a folder": ("bom", "Is a directory"),
    "outside": ("../outside.png", "leads outside of the folder"),
    "outside, deep": ("bom/../../outside.png", "leads outside of the folder"),
    "outside, absolute": ("/outside.png", "leads outside of the folder"),
    "outside, backslash": ("..\\outside.png", "leads outside of the folder"),
    "an address": ("https://example.com/cat.png", "is a URL: download the image"),
    "roundabout, inside": ("bom/../plain.png", TRAINS),
    "duplicate row": ("plain.png", TRAINS),
}
_LINE = b'{"file_name": "a.png", "text": "a red square"}'
METADATA = {  # folder with its own metadata.jsonl -> (its bytes, expected line by line)
    "blank_lines": (b"\n" + _LINE + b"\n\n \n", {2: TRAINS}),
    "bom": (b"\xef\xbb\xbf" + _LINE + b"\n", {1: TRAINS}),
    "broken": (
        b"\n".join([_LINE, _LINE[:20], b"[1, 2]", b"null", b'{"file_name": "a.png", "text": "caf\xe9"}', b"[" * 9999]),
        {1: TRAINS, 2: "not JSON", 3: "not a JSON object", 4: "not a JSON object", 5: "it is not UTF-8", 6: "not JSON"},
    ),
    "crlf": (_LINE + b"\r\n" + _LINE + b"\r\n", {1: TRAINS, 2: TRAINS}),
    "given_path": (b'{"image": {"bytes": null, "path": "/outside.png"}, "text": "b"}', {1: "it has no image"}),
    "no_last_newline": (_LINE, {1: TRAINS}),
}


def build(folder: Path) -> dict[str, tuple[str, str]]:
    """Fill the folder; gives (injected, expected) by place, e.g. "metadata.jsonl line 3", in the order of the rows."""
    folder.mkdir(parents=True)
    (folder.parent / "outside.png").write_bytes(_PLAIN)  # readable, for whoever looks outside
    cases, lines = {}, []

    def add(injected: str, expected: str, **line) -> None:
        lines.append(json.dumps({name: value for name, value in line.items() if value is not ...}))
        cases[f"metadata.jsonl line {len(lines)}"] = injected, expected

    for name, (content, expected) in FILES.items():
        if content is not None:
            (folder / name).write_bytes(content)
        add(f"image {name}", expected, file_name=name, text=f"an image, {name}")
    for name, (text, expected) in CAPTIONS.items():
        add(f"caption: {name}", expected, file_name="plain.png", text=text)
    for name, (file_name, expected) in NAMES.items():
        text = "an image, plain.png" if name == "duplicate row" else f"file name {name}"
        add(f"file name: {name}", expected, file_name=file_name, text=text)
    (folder / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    for name, (content, expected) in METADATA.items():
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(_PLAIN)
        (folder / name / "metadata.jsonl").write_bytes(content)
        for line, outcome in expected.items():
            cases[f"{name}/metadata.jsonl line {line}"] = f"metadata: {name}, line {line}", outcome
    return cases


def bad(cases: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Place and expected reason of those that cannot be used."""
    return {place: expected for place, (_, expected) in cases.items() if expected != TRAINS}


def main() -> int:
    from t2i_training.data import inspection
    from t2i_training.data.dataset import open_dataset

    logging.disable()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate import Accelerator

    with tempfile.TemporaryDirectory() as root:
        cases = build(Path(root, "pictures"))
        args = data_args(train_data_dir=f"{root}/pictures", output_dir=root, skip_bad_samples=True)
        dataset, _ = inspection.inspect(args, Accelerator(), open_dataset(args, seed=0), "text")
        seen = dict.fromkeys(dataset["_line"], TRAINS)
        for line in Path(root, inspection.SKIPPED).read_text().splitlines():
            sample = json.loads(line)
            seen[sample["line"]] = sample["reason"].replace(root, "...")
    wrong = 0
    print(f"{'injected':44} {'expected':40} seen")
    for place, (injected, expected) in cases.items():
        fits = expected in seen[place]
        wrong += not fits
        print(f"{injected:44} {expected:40} {seen[place][:100]}{'' if fits else '   <-- NOT AS EXPECTED'}")
    print(f"{len(cases)} cases, {len(bad(cases))} to be refused, {wrong} not as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
