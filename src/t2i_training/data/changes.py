"""Tells in one line whether the data set has changed since the checkpoint was made."""

import hashlib

import numpy as np

_CHUNK = 10_000  # captions in memory at a time


def describe(args, accelerator, dataset, image_infos) -> dict[str, str]:
    """Digests of a data set for a checkpoint's manifest, from the contents of images and captions. Main process only.

    Names and places of the files do not count. Takes seconds and 50 MiB for a million rows.
    """
    if not accelerator.is_main_process:
        return {}
    images = np.array([int(info.digest[:16], 16) for info in image_infos], np.uint64)
    captions = np.zeros(len(images), np.uint64)
    if args.caption_column:
        texts = dataset.select_columns([args.caption_column])
        for start in range(0, len(images), _CHUNK):
            chunk = texts[start : start + _CHUNK][args.caption_column]
            captions[start : start + _CHUNK] = [_number(repr(caption)) for caption in chunk]
    # The factor is odd, so that equal numbers do not cancel out.
    samples = images * np.uint64(0x9E3779B97F4A7C15) ^ captions
    numbers = {"images": np.sort(images), "captions": np.sort(captions), "samples": np.sort(samples), "order": samples}
    return {name: hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest() for name, array in numbers.items()}


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def since(position: dict, size: int, now: dict[str, str]) -> str | None:
    """What has changed since the checkpoint with this manifest was made; None if nothing is known to have."""
    if position.get("dataset_size", size) != size:
        return f"it had {position['dataset_size']} samples and has {size}, which are seen in a new order"
    before = position.get("data")  # older checkpoints have none
    if not before or not now or before == now:
        return None
    if before["samples"] == now["samples"]:
        return "its samples are in another order"
    others = [name for name in ("images", "captions") if before[name] != now[name]]
    return f"some of its {' and '.join(others)} have changed" if others else "some captions belong to other images"
