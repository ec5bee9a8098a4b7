"""What one core makes of JPEG files, in images per second: this suite's data path and the usual one.

    python benchmarks/data_path.py [--rounds 15] [--resolution 512]

Ours: scaled decode, resize, crop and flip to uint8, as `make_sample` does it; the device normalises. The usual one:
`datasets` decodes the whole image, torchvision resizes, crops, flips, converts to float and normalises. Both read the
same files from the page cache, with the same filter (Lanczos), in one thread. Each round times both, in turn; the table
gives medians over the rounds and the median of the rounds' ratios.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from t2i_training.data import draws, images

SIZES = {"1 MP": (1152, 864), "12 MP": (4000, 3000)}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, and some grain: as a JPEG about a photograph's bytes a pixel."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(height, width, 1)).astype(np.float32).repeat(3, axis=2) * 4
    for octave in range(2, 11):
        coarse = rng.normal(size=(2 ** (octave - 1), 2**octave, 3)) * 160 / octave**2
        layers = [Image.fromarray(coarse[..., c].astype(np.float32)).resize((width, height)) for c in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    return Image.fromarray(np.uint8(np.clip(pixels + 128, 0, 255)))


def ours(file: str, index: int, resolution: int) -> torch.Tensor:
    """(3, R, R) uint8"""
    draw = partial(draws.generator, 0, 0, index)
    shape = (resolution, resolution)
    decoded = images.decode(file, shape)
    return images.fill(decoded, shape, "lanczos", draw("crop"), draw("flip").random() < 0.5)


def usual_path(resolution: int):
    decode = datasets.Image().decode_example
    transform = transforms.Compose(
        [
            transforms.Resize(resolution, transforms.InterpolationMode.LANCZOS),
            transforms.RandomCrop(resolution),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    return lambda file: transform(decode({"path": file, "bytes": None}).convert("RGB"))  # (3, R, R) float32


def measure(paths: list, files: list[str], rounds: int) -> list[list[float]]:
    """Images per second of each path in each round."""
    rates = [[] for _ in paths]
    for number in range(rounds + 1):  # the first warms up
        for path, measured in zip(paths, rates, strict=True):
            began = time.perf_counter()
            for index, file in enumerate(files):
                path(file, index)
            if number:
                measured.append(len(files) / (time.perf_counter() - began))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--resolution", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    usual = usual_path(args.resolution)
    paths = [lambda file, index: ours(file, index, args.resolution), lambda file, _: usual(file)]
    print(f"JPEG to a square of {args.resolution} pixels, one thread, medians of {args.rounds} rounds\n")
    print("| images | KB a file | ours, pictures/s | usual, pictures/s | ratio | range of ratios |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            files = [f"{folder}/{name}-{i}.jpg" for i in range(4)]
            for i, file in enumerate(files):
                picture(*size, seed=i).save(file, quality=90)
            here, there = measure(paths, files, args.rounds)
            ratios = sorted(a / b for a, b in zip(here, there, strict=True))
            kilobytes = sum(Path(file).stat().st_size for file in files) / len(files) / 1000
            print(
                f"| {name} | {kilobytes:.0f} | {statistics.median(here):.1f} | {statistics.median(there):.1f} "
                f"| {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
