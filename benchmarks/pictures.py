"""Captioned images to train on, made on the spot: what is in them is of no matter, only how many and how large."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def make(folder: Path, count: int, side: int) -> Path:
    """An image folder of `count` square images with captions, no two alike; one that is there already is kept."""
    if (folder / "metadata.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    suffix = ".png" if side < 64 else ".jpg"
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        name = f"{i:06d}{suffix}"
        (coarse if side == 8 else coarse.resize((side, side), Image.Resampling.BICUBIC)).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": f"image number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder
