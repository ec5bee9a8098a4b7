"""Captioned images to train on, made on the spot: what is in them is of no matter, only how many and how large."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def make(folder: Path, count: int, *shapes: tuple[int, int]) -> Path:
    """An image folder of `count` images with captions, no two alike, in turn of those shapes (height, width).

    One that is there already is kept.
    """
    if (folder / "metadata.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        height, width = shapes[i % len(shapes)]
        suffix = ".png" if height < 64 else ".jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        name = f"{i:06d}{suffix}"
        whole = coarse if height == width == 8 else coarse.resize((width, height), Image.Resampling.BICUBIC)
        whole.save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": f"image number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder
