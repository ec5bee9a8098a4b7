"""Aspect-ratio buckets: photographs are not square, and a square crop of a portrait cuts off heads.

A bucket is one of few shapes of about as many pixels, or of fewer for small images. Each image is trained in the shape
nearest to its own.
"""

import math
from collections import Counter

from ..log import logger

STEP = 64  # pixels: the VAE halves an image three times, the UNet its latents three times

Shape = tuple[int, int]  # height and width in pixels


def choose(args, image_infos: list, effective_batch: int) -> tuple[list[Shape], Shape]:
    """(shape (H, W) in which each image is trained, that of the validation images: the one that most images have).

    Without --use_aspect_ratio_buckets a square. Logged are the samples of each bucket, how much of them is cut off, and
    which are enlarged: those are blurred, and the model learns to generate blurred ones.
    """
    side = args.resolution
    sizes = [(info.height, info.width) for info in image_infos]
    if not args.use_aspect_ratio_buckets:
        different = {info.digest: min(info.height, info.width) for info in image_infos}  # an image may be repeated
        if small := sum(shorter < side for shorter in different.values()):
            logger.warning(f"{small} of {len(different)} images are smaller than --resolution {side}: enlarged")
        return [(side, side)] * len(sizes), (side, side)
    named = parse(args.aspect_ratio_buckets) if args.aspect_ratio_buckets else None
    levels = [named] if named else _default_levels(side)
    counts = Counter(sizes)
    chosen = {size: _nearest(size, levels) for size in counts}
    moved = _merge(_count(counts, chosen), effective_batch)
    chosen = {size: moved.get(shape, shape) for size, shape in chosen.items()}
    usual = _report(counts, chosen, side)
    if smaller := sum(counts[size] for size in counts if not named and chosen[size] not in levels[0]):
        shapes = ";".join(f"{height},{width}" for height, width in levels[0])
        logger.info(
            f"{smaller} samples are too small for the buckets of --resolution {side}, so they have smaller ones; "
            f'--aspect_ratio_buckets="{shapes}" would enlarge them'
        )
    return [chosen[size] for size in sizes], usual


def parse(text: str) -> list[Shape]:
    """The shapes of --aspect_ratio_buckets, "height,width;height,width", whose form has been checked."""
    return [tuple(map(int, pair.split(","))) for pair in text.split(";")]


def _default_levels(side: int) -> list[list[Shape]]:
    """diffusers' shapes of `side`**2 pixels; then those of smaller sides, for images that these would enlarge."""
    from diffusers.training_utils import generate_aspect_ratio_buckets

    sides = [side, *range((side - 1) // STEP * STEP, 0, -STEP)]
    return [generate_aspect_ratio_buckets(each, divisibility=STEP) for each in sides]


def _nearest(size: Shape, levels: list[list[Shape]]) -> Shape:
    """The shape of nearest aspect ratio, of the first level in which that enlarges nothing; else of the last level."""
    for level in levels:
        shape = min(level, key=lambda shape: abs(math.log(shape[0] * size[1] / (shape[1] * size[0]))))
        if shape[0] <= size[0] and shape[1] <= size[1]:
            break
    return shape


def _count(counts: Counter, chosen: dict[Shape, Shape]) -> Counter:
    """Samples of each shape."""
    found = Counter()
    for size, shape in chosen.items():
        found[shape] += counts[size]
    return found


def _merge(counts: Counter, least: int) -> dict[Shape, Shape]:
    """Where the samples of shapes go that fewer than `least` have: to the nearest, by the ratios of sides."""
    left, moved = dict(counts), {}

    def distance(one: Shape, other: Shape) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))

    while len(left) > 1 and min(left.values()) < least:
        shape = min(left, key=lambda shape: (left[shape], shape))
        number = left.pop(shape)
        target = min(left, key=lambda other: (distance(shape, other), other))
        left[target] += number
        moved = {old: target if new == shape else new for old, new in moved.items()} | {shape: target}
    if moved:
        said = [f"{counts[old]} of {_text(old)} in {_text(new)}" for old, new in sorted(moved.items())]
        logger.warning(f"buckets with fewer samples than an update has ({least}) are merged: {', '.join(said)}")
    return moved


def _report(counts: Counter, chosen: dict[Shape, Shape], side: int) -> Shape:
    """Log what each bucket holds and loses. Returns the shape of most images."""
    enlarged, held = Counter(), _count(counts, chosen)
    kept, kept_by_squares = Counter(), 0.0  # samples, in parts
    for size, shape in chosen.items():
        kept[shape] += counts[size] * _kept(size, shape)
        kept_by_squares += counts[size] * _kept(size, (side, side))
        enlarged[shape] += counts[size] * (shape[0] > size[0] or shape[1] > size[1])
    for shape in sorted(held, key=lambda shape: (-held[shape], shape)):
        more = f", {enlarged[shape]} enlarged" if enlarged[shape] else ""
        logger.info(f"bucket {_text(shape)}: {held[shape]} samples, {1 - kept[shape] / held[shape]:.1%} cut off{more}")
    total, usual = held.total(), min(held, key=lambda shape: (-held[shape], shape))
    logger.info(
        f"{len(held)} buckets, height x width: {1 - kept.total() / total:.1%} of the images' area is cut off, "
        f"by squares {1 - kept_by_squares / total:.1%}"
    )
    if number := enlarged.total():
        logger.warning(f"{number} of {total} samples are smaller than their bucket: enlarged")
    return usual


def _kept(size: Shape, shape: Shape) -> float:
    """The share of an image that is left when it covers a shape."""
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    return min(ratio, 1 / ratio)


def _text(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"
