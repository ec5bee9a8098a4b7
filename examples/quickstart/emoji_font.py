"""Read emoji images and their captions from a CBDT colour-bitmap font (Noto Color Emoji).

>>> glyphs = read_glyphs("NotoColorEmoji.ttf")      # {"🍎": RGBA image, ...}
>>> image = on_ground(glyphs["🍎"], size=128)     # 128×128 RGB, white ground
>>> caption("🍎")                                   # "red apple"
"""

import io
import unicodedata

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageFilter

# What the bundled pipeline learns: one emoji of each kind, told apart at 64 pixels by outline and colour.
# No people, flags, skin tones, clocks, written signs, nor two drawings of one thing.
CORPUS = (
    "🍎🍏🍊🍋🍌🍉🍇🍓🍒🍍🥝🍅🍆🥑🥦🥕🌽🌶🍄🌰🍞🥐🥨🧀🍗🥩🍔🍟🍕🌭🍳🍿🍙🍣🍦🍩🍪🎂🧁🍭☕🍺🍷"
    "🐵🐶🐱🦁🐯🐴🦄🐮🐷🐭🐰🐻🐨🐼🐸🐔🐧🐤🦉🦊🐺🐘🐪🦒🐢🐍🐳🐬🐠🐡🦈🐙🐌🦋🐝🐞🕷🦀🦞🐓🦆🦜🦩🦇🦔"
    "🌵🌲🌳🌴🌱🍀🍁🌷🌹🌻🌸⛄☁⭐🌙🌈🔥💧❄⚡🌋🪐"
    "🚀✈🚁🚂🚌🚑🚒🚕🚗🚜🚲⛵🛸🎈⚓"
    "⚽🏀🏈⚾🎾🎳🎯🎲🎸🎺🎻🥁🎧📷📺📱💻☎💡📕✂📎🔑🔒🔨🔧⚙🧲🔔🎁🎀👑🎩👕👖👗👟👠🧢🧤🧦🎒☂🛡💣💎💍🏆"
    "🎃🎄👻🤖👽💀🏠🏰⛺🚪🛁🧸🧩🪁❤💰"
)

# Unicode's name where nobody would type it.
SPOKEN = {
    "☕": "cup of coffee",
    "⭐": "yellow star",
    "❤": "red heart",
    "☎": "red telephone",
    "⚡": "lightning",
    "⛄": "snowman",
    "🌰": "chestnut",
    "🌶": "red chili pepper",
    "🌽": "ear of corn",
    "🍆": "eggplant",
    "🍕": "slice of pizza",
    "🍗": "chicken leg",
    "🍙": "rice ball",
    "🍳": "fried egg",
    "🎃": "pumpkin lantern",
    "🎧": "headphones",
    "🎯": "dartboard",
    "🎲": "dice",
    "🎳": "bowling pins",
    "🎾": "tennis racket",
    "🎒": "school bag",
    "🏀": "basketball",
    "🏠": "house",
    "🏰": "castle",
    "🐠": "tropical fish",
    "🐪": "camel",
    "🐳": "blue whale",
    "🐞": "ladybug",
    "👕": "blue shirt",
    "👟": "running shoe",
    "👠": "red high heel",
    "👽": "alien",
    "💎": "diamond",
    "💡": "light bulb",
    "💧": "drop of water",
    "💻": "laptop computer",
    "📕": "red book",
    "🚂": "steam train",
    "🚗": "red car",
    "🥁": "drum",
    "🥩": "steak",
    "🧀": "cheese",
    "🧢": "blue cap",
    "🪐": "planet with rings",
    "🍞": "loaf of bread",
    "🎁": "gift box",
    "🎀": "pink bow",
    "🍦": "ice cream cone",
    "🎄": "christmas tree",
    "🛸": "flying saucer",
    "🧩": "puzzle piece",
    "✂": "scissors",
    "☁": "cloud",
}


def caption(emoji: str) -> str:
    """The lower-case English name of one single-codepoint emoji, e.g. ``"red apple"``, ``"tiger face"``.

    Raises:
        ValueError: the codepoint has no Unicode name in this Python's database.
    """
    return SPOKEN.get(emoji) or unicodedata.name(emoji).lower().replace("-", " ")


def read_glyphs(font_path) -> dict[str, Image.Image]:
    """All single-codepoint images of a CBDT font: emoji → RGBA image at the font's own size (136×128 in Noto).

    Flags and skin-tone variants are sequences of codepoints in Unicode, so they never appear here.

    Raises:
        ValueError: the font holds no CBDT bitmaps (newer Noto releases are vector, COLRv1).
    """
    font = TTFont(font_path)
    if "CBDT" not in font:
        raise ValueError(f"{font_path} has no CBDT table; take the bitmap build of Noto Color Emoji")
    bitmaps = font["CBDT"].strikeData[0]
    glyphs = {}
    for codepoint, name in sorted(font.getBestCmap().items()):
        emoji = chr(codepoint)
        if codepoint < 0x2600 or unicodedata.category(emoji) != "So" or 0x1F1E6 <= codepoint <= 0x1F1FF:
            continue  # digits, letters, arrows; the 26 letters that flags are spelled with
        if name in bitmaps:
            glyphs[emoji] = Image.open(io.BytesIO(bitmaps[name].imageData)).convert("RGBA")
    return glyphs


def fitted(glyph: Image.Image, size: int, margin: float = 0.05) -> Image.Image:
    """Trims transparent borders, then scales the drawing to fill a transparent square, less margins."""
    drawing = glyph.crop(glyph.getchannel("A").getbbox())
    scale = size * (1 - 2 * margin) / max(drawing.size)
    # Premultiplied while resampling: the colour stored under transparent pixels would bleed into the outline.
    drawing = drawing.convert("RGBa").resize([max(1, round(side * scale)) for side in drawing.size], Image.LANCZOS)
    square = Image.new("RGBa", (size, size))
    square.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return square.convert("RGBA")


def on_ground(glyph: Image.Image, size: int, ground=(255, 255, 255)) -> Image.Image:
    """The emoji on a plain ground of one RGB colour (0–255), as a ``size``×``size`` RGB image."""
    picture = Image.new("RGBA", (size, size), (*ground, 255))
    picture.alpha_composite(fitted(glyph, size))
    return picture.convert("RGB")


def glowing_outlines(glyph: Image.Image, size: int) -> np.ndarray:
    """The emoji as neon tubes: light along its outlines, in its own colours, with a halo; black elsewhere.

    Returns:
        ``(size, size, 3)`` float32 in 0…1, to be added to a dark ground.
    """
    work = 2 * size  # drawn at twice the size, so that lines come out smooth
    drawing = fitted(glyph, work, margin=0.08)
    flat = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    flat.alpha_composite(drawing)
    smooth = np.asarray(flat.convert("RGB").filter(ImageFilter.GaussianBlur(work / 90)), np.float32) / 255
    alpha = np.asarray(drawing.getchannel("A").filter(ImageFilter.GaussianBlur(work / 90)), np.float32) / 255
    channels = np.dstack([smooth, 1.5 * alpha])
    slope = np.hypot(*np.gradient(channels, axis=(0, 1))).max(-1) * work / 10
    line = np.clip(1.5 * slope - 0.35, 0, 1)[..., None]

    nearby = np.asarray(drawing.convert("RGBa").filter(ImageFilter.GaussianBlur(work / 32)), np.float32)
    colour = nearby[..., :3] / np.maximum(nearby[..., 3:], 1)
    grey = colour.mean(-1, keepdims=True)
    colour = np.clip(grey + 2.0 * (colour - grey), 0.02, None)
    colour = 0.15 + 0.85 * colour / colour.max(-1, keepdims=True)  # neon has no dark colours: black lines shine white

    light = Image.fromarray((255 * line * colour).astype(np.uint8))
    halo = sum(np.asarray(light.filter(ImageFilter.GaussianBlur(work / k)), np.float32) for k in (48, 20))
    lit = np.clip(line * colour + 0.45 * halo / 255, 0, 1)
    return np.asarray(Image.fromarray((255 * lit).astype(np.uint8)).resize((size, size), Image.BOX), np.float32) / 255
