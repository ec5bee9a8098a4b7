"""Images of every kind come out upright, in RGB and with the right colours; squares are cut where the draw says."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, functional

from t2i_training.data import draws, images

VECTORIZED = {"bilinear", "bicubic", "lanczos"}  # where torch has them
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def stored(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(picture: Image.Image) -> list:
    assert picture.mode == "RGB"
    return np.asarray(picture).tolist()


def grey(*values) -> list:
    return [[[value] * 3 for value in values]]


def squared(values, resolution, interpolation="nearest", **options):
    """The red channel of images.fill, of a square, of a grey image, as rows."""
    array = np.repeat(np.array(values, np.uint8)[:, :, None], 3, axis=2)
    return images.fill(Image.fromarray(array), (resolution, resolution), interpolation, **options)[0].tolist()


# --- decode

UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, (9, 9, 9), (99, 50, 1)]], np.uint8)  # 2 rows, 3 columns
AS_STORED = {  # TIFF 6.0, tag 274: where the stored first row and column lie in the upright image
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", AS_STORED)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    file = stored(Image.fromarray(np.ascontiguousarray(AS_STORED[orientation])), exif=exif)
    assert pixels(images.decode(file)) == UPRIGHT.tolist()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"]
)
def test_damaged_exif_costs_no_picture(kind, exif):
    """It says nothing about the pixels: they are taken as they stand."""
    picture = Image.new("RGB", (64, 32), RED)
    decoded, size = images.decode_with_size(stored(picture, kind, exif=exif), min_shape=(4, 4))
    assert size == (64, 32)
    np.testing.assert_allclose(decoded.getpixel((3, 3)), RED, atol=3)


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


def with_chunks(file: bytes, *chunks: bytes, place: bytes = b"IDAT") -> bytes:
    """A PNG file with more chunks before its pixels, or before its end."""
    where = file.index(place) - 4
    return file[:where] + b"".join(chunks) + file[where:]


PACKED = zlib.compress(bytes(3 * 2**20))  # 3 KiB, of which Pillow would make more than it allows for metadata
METADATA = {  # of which no viewer minds any
    "a workflow": [chunk(b"iTXt", b"workflow\0\1\0\0\0" + PACKED)],
    "compressed text": [chunk(b"zTXt", b"parameters\0\0" + PACKED)],
    "70 MiB of text": [chunk(b"tEXt", b"p\0" + bytes(2**20))] * 70,
    "a large colour profile": [chunk(b"iCCP", b"wide\0\0" + PACKED)],
    "a large XMP packet": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + PACKED)],
    "text of an unknown compression": [chunk(b"zTXt", b"p\0\7x")],
    "a profile of an unknown compression": [chunk(b"iCCP", b"p\0\7x")],
    "a wrong checksum": [chunk(b"tEXt", b"a\0b", checksum=5)],
    "a wrong checksum of a chunk of its own": [chunk(b"prVt", b"a", checksum=5)],
    "a gamma cut short": [chunk(b"gAMA", b"a")],
    "a resolution cut short": [chunk(b"pHYs", b"a")],
    "an intent left out": [chunk(b"sRGB", b"")],
    "primaries cut short": [chunk(b"cHRM", b"abcde")],
    "an animation cut short": [chunk(b"acTL", b"a")],
}


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("case", METADATA)
def test_metadata_costs_no_picture(case, place, tmp_path):
    """Beyond a limit of Pillow's, or broken. It is not unpacked; how the image is turned is heeded as ever."""
    exif = Image.Exif()
    exif[274] = 6
    file = stored(Image.fromarray(np.ascontiguousarray(AS_STORED[6])), exif=exif)
    file = with_chunks(file, *METADATA[case], place=place)
    (tmp_path / "a.png").write_bytes(file)
    for source in (file, tmp_path / "a.png"):
        picture, size = images.decode_with_size(source, (8, 8))
        assert pixels(picture) == UPRIGHT.tolist()
        assert size == (3, 2)


def test_metadata_of_a_picture_with_transparency():
    file = stored(Image.new("L", (1, 1)), transparency=0)
    assert pixels(images.decode(with_chunks(file, *METADATA["a workflow"]))) == [[list(WHITE)]]


@pytest.mark.parametrize("damage", [lambda f: f[:-40], lambda f: f.replace(b"IDAT", b"IDAX")])
def test_metadata_hides_no_damage(damage):
    """What is wrong with the pixels is said as without it."""
    file = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)))
    with pytest.raises(images.UnreadableImage) as plain:
        images.decode(damage(file))
    with pytest.raises(images.UnreadableImage) as fault:
        images.decode(damage(with_chunks(file, chunk(b"tEXt", b"a\0b"))))
    assert str(fault.value) == str(plain.value)


def test_orientation_and_scaled_decode_together():
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.new("RGB", (800, 400), RED)
    picture.paste(BLUE, (0, 0, 400, 400))  # stored left is upright top
    upright = images.decode(stored(picture, "JPEG", exif=exif, quality=95), min_shape=(50, 50))
    assert upright.size == (100, 200)
    np.testing.assert_allclose(upright.getpixel((50, 20)), BLUE, atol=3)
    np.testing.assert_allclose(upright.getpixel((50, 180)), RED, atol=3)


def test_cmyk_jpeg():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    np.testing.assert_allclose(images.decode(stored(cyan, "JPEG", quality=95)).getpixel((8, 8)), (0, 255, 255), atol=3)


def test_palette_with_transparency_lies_on_white():
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.putdata([0, 1, 2])
    assert pixels(images.decode(stored(picture, transparency=1))) == [[[*RED], [*WHITE], [*BLUE]]]
    assert pixels(images.decode(stored(picture))) == [[[*RED], [*GREEN], [*BLUE]]]


def test_rgba_lies_on_white():
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(*RED, 255), (*RED, 0), (0, 0, 0, 51)])  # opaque, invisible, one fifth of black
    assert pixels(images.decode(stored(picture))) == [[[*RED], [*WHITE], [204, 204, 204]]]


def test_grey_with_alpha_lies_on_white():
    picture = Image.new("LA", (3, 1))
    picture.putdata([(10, 255), (10, 0), (0, 51)])
    assert pixels(images.decode(stored(picture))) == grey(10, 255, 204)


def test_transparent_colour_of_an_rgb_png_lies_on_white():
    picture = Image.new("RGB", (2, 1), RED)
    picture.putpixel((1, 0), GREEN)
    assert pixels(images.decode(stored(picture, transparency=GREEN))) == [[[*RED], [*WHITE]]]


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32768, 65278, 65535]], np.uint16)
    assert pixels(images.decode(stored(Image.fromarray(values)))) == grey(0, 1, 128, 254, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), (0, 128, 255)),
        (np.array([[0.0, 100.0, 255.0]], np.float32), (0, 100, 255)),
        (np.array([[-5.0, 0.0, 200.0]], np.float32), (0, 0, 200)),
        (np.array([[0, 257, 65535]], np.int32), (0, 1, 255)),
        (np.array([[0, 600_000, 1_000_000]], np.int32), (0, 153, 255)),
        (np.array([[0, 0, 0]], np.int32), (0, 0, 0)),
    ],
)
def test_wide_grey_is_scaled_by_its_brightest_pixel(values, expected):
    assert pixels(images.decode(stored(Image.fromarray(values), "TIFF"))) == grey(*expected)


def test_pixels_that_are_no_numbers_are_an_error():
    with pytest.raises(images.UnreadableImage, match="not finite"):
        images.decode(stored(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF"))


def test_one_bit():
    picture = Image.new("1", (3, 1))
    picture.putdata([0, 255, 0])
    assert pixels(images.decode(stored(picture))) == grey(0, 255, 0)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    file = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(images.decode(file)) == [[[*RED]] * 4] * 4


def test_path_and_bytes_are_read_alike(tmp_path):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert pixels(images.decode(source)) == UPRIGHT.tolist()


def test_unreadable_files_raise(tmp_path):
    with pytest.raises(images.UnreadableImage, match="not an image but a text that begins 'no image'"):
        images.decode(b"no image")
    whole = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    with pytest.raises(images.UnreadableImage, match="OSError: image file is truncated"):
        images.decode(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("min_side", "size"), [(None, (1600, 1200)), (601, (1600, 1200)), (300, (800, 600)), (150, (400, 300))]
)
def test_jpeg_is_decoded_at_no_less_than_twice_the_size_needed(min_side, size):
    file = stored(Image.new("RGB", (1600, 1200)), "JPEG")
    assert images.decode(file, min_side and (min_side, min_side)).size == size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_size_in_the_file_is_told_at_any_scale(kind, orientation):
    """16 x 15 at a quarter is 4 x 4: the scaled image does not tell which way it was turned."""
    exif = Image.Exif()
    exif[274] = orientation
    upright = (15, 16) if orientation > 4 else (16, 15)
    file = stored(Image.new("RGB", (16, 15), RED), kind, exif=exif)
    assert images.decode_with_size(file, (1, 1))[1] == images.decode_with_size(file)[1] == upright


def test_scaled_decode_changes_next_to_nothing():
    """Mean difference below one level of 255, none above 12, on waves from 6 pixels up."""
    y, x = np.mgrid[:1200, :1600]
    waves = [np.sin(x / p + y / q) for p, q in ((40.0, 90.0), (7.0, 300.0), (55.0, -11.0))]
    picture = Image.fromarray(np.uint8(127.5 + 120 * np.stack(waves, axis=-1)))
    file = stored(picture, "JPEG", quality=92)
    full, scaled = (
        images.fill(images.decode(file, min_shape), (128, 128), "lanczos").int() for min_shape in (None, (128, 128))
    )  # fmt: skip
    assert images.decode(file, (128, 128)).size == (400, 300)
    difference = (full - scaled).abs().float()
    assert difference.mean() < 1
    assert difference.max() <= 12


# --- square


def test_square_is_channels_first_uint8():
    result = images.fill(Image.new("RGB", (40, 32), (1, 2, 3)), (16, 16), "lanczos")
    assert (result.shape, result.dtype, result.is_contiguous()) == ((3, 16, 16), torch.uint8, True)
    assert result[:, 5, 5].tolist() == [1, 2, 3]


def test_centre_crop():
    assert squared([[10, 20, 30, 40], [50, 60, 70, 80]], 2) == [[20, 30], [60, 70]]
    assert squared([[1, 2], [3, 4], [5, 6], [7, 8]], 2) == [[3, 4], [5, 6]]
    assert squared([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], 2) == [[2, 3], [7, 8]]  # an odd surplus: rounded down


def test_mirror_comes_after_the_crop():
    assert squared([[10, 20, 30, 40], [50, 60, 70, 80]], 2, mirror=True) == [[30, 20], [70, 60]]


@pytest.mark.parametrize("shape", [(2, 5), (5, 2)])
def test_every_crop_position_is_drawn(shape):
    values = np.arange(10).reshape(shape)
    seen = set()
    for index in range(60):
        draw = draws.generator(0, 0, index, "crop")
        seen.add(squared(values, 2, crop_draw=draw)[0][0])
    assert seen == ({0, 1, 2, 3} if shape == (2, 5) else {0, 2, 4, 6})


def test_crop_position_is_the_draw():
    """Left from the first number, top from the second; a square image has one position only."""
    wide = np.arange(18).reshape(2, 9)
    left = int(draws.generator(0, 0, 0, "crop").integers(8))
    assert squared(wide, 2, crop_draw=draws.generator(0, 0, 0, "crop")) == wide[:, left : left + 2].tolist()
    assert squared([[1, 2], [3, 4]], 2, crop_draw=draws.generator(0, 0, 0, "crop")) == [[1, 2], [3, 4]]


def test_small_pictures_are_enlarged():
    assert squared([[10, 20], [30, 40]], 4) == [[10, 10, 20, 20]] * 2 + [[30, 30, 40, 40]] * 2


def test_strip_is_cut_to_its_middle():
    """Enlarging all of it to 512 x 33,554,432 pixels would take 69 gigabytes."""
    strip = Image.new("RGB", (1, 65_536), RED)
    strip.paste(BLUE, (0, 32_768 - 16, 1, 32_768 + 16))
    for index in range(5):
        square = images.fill(strip, (512, 512), "nearest", draws.generator(0, 0, index, "crop"))
        assert (square == torch.tensor(BLUE)[:, None, None]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 1), (1, 2000), (2000, 1), (3, 7), (31, 33), (1999, 2001)])
@pytest.mark.parametrize("crop_draw", [None, "drawn"])
def test_every_shape_gives_a_square(size, crop_draw):
    crop_draw = crop_draw and draws.generator(0, 0, 0, "crop")
    result = images.fill(Image.new("RGB", size, (1, 2, 3)), (32, 32), "lanczos", crop_draw)
    assert torch.equal(result, torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 32, 32))


@pytest.mark.parametrize("name", images.RESAMPLING)
@pytest.mark.parametrize("resolution", [16, 48])
def test_interpolation_modes_are_torchvisions(name, resolution):
    """Resize by the shorter side, centre crop, as torchvision does it to a PIL image: to the bit, or nearly so where
    torch's own filter takes the place of PIL's."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    mode = InterpolationMode(name.replace("_", "-"))
    expected = functional.center_crop(functional.resize(Image.fromarray(noise), resolution, mode), resolution)
    actual = images.fill(Image.fromarray(noise), (resolution, resolution), name)
    difference = (actual.int() - functional.pil_to_tensor(expected).int()).abs()
    assert difference.max() <= (1 if name in VECTORIZED else 0)
    assert difference.float().mean() < 0.01


@pytest.mark.parametrize("name", sorted(VECTORIZED))
@pytest.mark.parametrize("size", [(1152, 864), (333, 1999), (2048, 2048), (100, 130)])
def test_without_torchs_filters_next_to_nothing_changes(name, size, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    here = images.fill(noise, (512, 512), name).int()
    monkeypatch.setattr(images, "_VECTORIZED", set())
    difference = (here - images.fill(noise, (512, 512), name).int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.02


@pytest.mark.parametrize("name", images.RESAMPLING)
@pytest.mark.parametrize("size", [(1152, 864), (700, 511), (513, 4000), (2, 2)])
def test_white_stays_white(name, size):
    assert (images.fill(Image.new("RGB", size, WHITE), (512, 512), name) == 255).all()


def test_interpolation_modes_differ():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    results = {images.fill(noise, (20, 20), name).numpy().tobytes() for name in images.RESAMPLING}
    assert len(results) == 6  # of seven names; nearest and nearest_exact are one filter


@pytest.mark.parametrize("size", [(1712, 3103), (3103, 1712), (640, 427)])
def test_resized_side_is_torchvisions(size):
    """The longer side is rounded down from the exact quotient, not from a product of rounded floats."""
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, max(size)).astype(np.uint8).reshape((1, -1) if size[0] > size[1] else (-1, 1))
    picture = Image.fromarray(ramp)
    resized = functional.resize(picture, 64, InterpolationMode.NEAREST)
    left, top = ((side - 64) // 2 for side in resized.size)
    expected = functional.pil_to_tensor(resized.crop((left, top, left + 64, top + 64)))
    assert torch.equal(images.fill(picture, (64, 64), "nearest"), expected)


def test_normalize():
    result = images.normalize(torch.tensor([0, 51, 255], dtype=torch.uint8), torch.float32)
    assert result.tolist() == pytest.approx([-1, -0.6, 1])
    assert images.normalize(torch.tensor([0, 255], dtype=torch.uint8), torch.bfloat16).tolist() == [-1, 1]


def test_normalize_for_clip_by_the_published_statistics():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    result = images.normalize_for_clip(pixels, torch.float32)[0, :, 0]
    expected = [[-1.79226, 1.93034], [-1.75210, 2.07488], [-1.48022, 2.14590]]
    assert result.tolist() == [pytest.approx(row, abs=1e-4) for row in expected]


def test_constants_are_copied_to_the_device_once(monkeypatch):
    pixels = torch.zeros((1, 3, 2, 2), dtype=torch.uint8)
    before = images.normalize_for_clip(pixels, torch.float32)
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(images.normalize_for_clip(pixels, torch.float32), before)
