"""Makes the bundled fine-tuning set: 64 captioned emoji as neon signs on a night-blue ground, and tells the look apart.

    python examples/quickstart/make_pictures.py --font NotoColorEmoji.ttf

The captions are a third of those the bundled pipeline knows, word for word, so a fine-tuned pipeline can also be asked
for the other two thirds: whether they come out as neon signs shows that the look was learned, not the images.

The look is measured on pixels, without any network; NumPy and Pillow are enough:

    from make_pictures import carries_style, night_fraction
    night_fraction(image)     # 0.0 … 1.0, how much of the image is night-blue ground
    carries_style(image)      # True for a neon sign
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
NIGHT = (13, 20, 58)  # RGB of the ground
STYLE_THRESHOLD = 0.25
PICTURED = (
    "🍏🍊🍌🍉🍇🍒🍍🍆🥕🍄🥐🧀🍔🍕🍦🎂🍺🐵🐱🐴🐭🐼🐸🐧🦊🐘🐢🐬🐠🐙🦋🦀"
    "🦆🦩🌵🌲🍀🌷🌻⭐🌙🔥💧🚀🚂🚕🚲⛵⚓⚽🎸🎺📷💡📕🔑🔨🔔👑👗☂👻🏠❤"
)


def night_fraction(image: Image.Image) -> float:
    """The share of an image's pixels (any mode, any size) that are dark blue: the ground of the neon signs.

    Dark blue means blue between 30 and 110 of 255, red and green at most 60, and blue ahead of both by 15 or more:
    wide enough for what an autoencoder and a sampler do to :data:`NIGHT`, too narrow for black, grey or bright blue.
    """
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int16), -1, 0)
    brighter = np.maximum(red, green)
    return float(((blue >= 30) & (blue <= 110) & (brighter <= 60) & (blue - brighter >= 15)).mean())


def carries_style(image: Image.Image) -> bool:
    """Whether at least :data:`STYLE_THRESHOLD` of the image is night-blue ground.

    The drawings leave 35 % or more of a neon sign to the ground; an emoji on white has less than 1 % of dark blue,
    however blue it is.
    """
    return night_fraction(image) >= STYLE_THRESHOLD


def neon_sign(glyph: Image.Image, size: int) -> Image.Image:
    """One RGBA emoji as a ``size``×``size`` RGB neon sign."""
    from emoji_font import glowing_outlines

    night = np.array(NIGHT, np.float32) / 255
    lit = night + (1 - night) * glowing_outlines(glyph, size)
    return Image.fromarray((255 * lit).round().astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", help="a CBDT font")
    parser.add_argument("--output_dir", type=Path, default=HERE / "pictures")
    parser.add_argument("--size", type=int, default=96, help="pixels per side")
    args = parser.parse_args()
    from emoji_font import caption, read_glyphs  # fontTools is needed to make images, not to measure them

    glyphs = read_glyphs(args.font)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shares = []
    with open(args.output_dir / "metadata.jsonl", "w") as metadata:
        for emoji in PICTURED:
            picture = neon_sign(glyphs[emoji], args.size)
            file_name = caption(emoji).replace(" ", "_") + ".png"
            picture.save(args.output_dir / file_name, optimize=True)
            metadata.write(json.dumps({"file_name": file_name, "text": caption(emoji)}) + "\n")
            shares.append(night_fraction(picture))
    print(f"{len(shares)} images in {args.output_dir}; night-blue share {min(shares):.2f} to {max(shares):.2f}")


if __name__ == "__main__":
    main()
