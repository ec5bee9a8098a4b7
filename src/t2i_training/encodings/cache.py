"""Disk cache of frozen-encoder outputs (VAE or MoVQ latents, CLIP image and text embeddings), filled before training.

Images and captions have a store each. The store's name is a hash of everything that its encodings depend on besides
the image or caption: preprocessing (code, size, filter, tokenizer) and the network, with its weights and precision. A
key is the hash of an image file's bytes with the view, or of a caption's text. So whatever has been edited is encoded
again, and everything else is found, by any run.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from .. import __version__, device, distributed, errors
from ..bar import Bar
from ..data import captions, draws, images, inspection, loading
from ..data.dataset import describe, image_bytes, naming_the_sample
from ..library_errors import readable_errors
from ..log import logger
from .fingerprint import fingerprint
from .store import Store

BATCH = 8  # encoder batch: min(8, max(4, --train_batch_size)); 4 always fit, since no gradients are kept
SHARD = 512  # encodings per file; after a crash at most this many are computed again


def precompute(
    args, accelerator, dataset, image_infos, shapes, readers, encoders, *,
    crops=0, flips=False, devices=1, precision=None,
) -> list[Callable]:  # fmt: skip
    """Encode the data set, and return functions to call in place of `readers`, which return the cached encodings.

    The readers are the script's preprocessing functions with all but their input bound. `read_image(source, shape,
    crop_draw, mirror)` and, where captions are used, `read_caption(text)` return the tensors of one item. The encoders
    map a batch of such items to encodings: of `crops` random crops of each image, or with 0 of the centre crop, and
    with `flips` of both mirrorings. `image_infos` comes from `inspection.inspect`, `shapes` (H, W) are the rows'. All
    processes encode what is not on disk yet, with `devices` each, in `precision` (by default the accelerator's); then
    the networks move to the CPU. The returned functions take a row's index as `source`. Captions that `captions.vary`
    are not cached: their reader is returned as it is, and their network stays.
    """
    in_fp16 = (precision or accelerator.mixed_precision) == "fp16"
    # An image that covers its shape exactly has only one crop: of squares a square.
    exact = [images.covering((i.width, i.height), shape) == shape[::-1] for i, shape in zip(image_infos, shapes)]
    views = [(image.digest, 0 if only_one else crops) for image, only_one in zip(image_infos, exact)]
    mirrors = (False, True) if flips else (False,)
    rows = sorted(range(len(views)), key=lambda row: shapes[row])  # networks read batches of one shape
    wanted = {
        _view_key(views[row][0], shapes[row], crop, mirror): (row, shapes[row], crop, mirror)
        for row in rows
        for crop in (range(views[row][1]) if views[row][1] else [None])
        for mirror in mirrors
    }
    read_view = partial(_read_view, read=readers[0], dataset=dataset, views=views, column=args.image_column)
    store = _fill(args, accelerator, "images", wanted, read_view, (readers[0], encoders[0]), devices, in_fp16)
    cached_readers, done = [partial(_cached_image, store=store, views=views)], encoders
    if len(readers) > 1 and captions.vary(args):
        logger.info("captions differ from visit to visit, so they are encoded in each step, and not cached")
        cached_readers, done = [*cached_readers, readers[1]], encoders[:1]
    elif len(readers) > 1:
        texts = {_key(text): text for text in captions.all_captions(dataset, args)}
        store = _fill(args, accelerator, "captions", texts, readers[1], (readers[1], encoders[1]), devices, in_fp16)
        cached_readers.append(partial(_cached_caption, store=store))
    for encoder in done:
        for network in encoder.keywords.values():
            if isinstance(network, torch.nn.Module):
                network.to("cpu")
    device.release_memory(accelerator.device)
    return cached_readers


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _view_key(digest: str, shape: tuple[int, int], crop: int | None, mirror: bool) -> bytes:
    return _key(f"{digest} shape {shape} crop {crop} mirror {mirror}")


def _read_view(view: tuple, read: Callable, dataset, views: list[tuple[str, int]], column: str) -> dict:
    row, shape, crop, mirror = view
    # The place of crop k depends on the image alone, so that all runs share it.
    crop_draw = None if crop is None else draws.generator(int(views[row][0][:15], 16), 0, crop, "crop")
    with naming_the_sample(dataset, column, row):
        content = image_bytes(dataset[row][column])
        if hashlib.blake2b(content, digest_size=16).hexdigest() != views[row][0]:
            advice = f"start again; if it recurs, remove {inspection.MEMO}"
            raise images.UnreadableImage(f"not the file that was inspected: {advice}")
        return read(content, shape, crop_draw, mirror)


def _cached_image(row: int, shape, crop_draw, mirror: bool, store: Store, views: list[tuple[str, int]]) -> dict:
    digest, crops = views[row]
    return store.read(_view_key(digest, shape, int(crop_draw.integers(crops)) if crops else None, mirror))


def _cached_caption(text: str, store: Store) -> dict:
    return store.read(_key(text))


def _fill(args, accelerator, kind: str, wanted: dict, read, functions: tuple, devices: int, in_fp16: bool) -> Store:
    """The store with all `wanted` encodings ({key: input of `read`}), after encoding those that are missing."""
    folder = Path(args.encodings_dir or Path(args.output_dir, "encodings"))
    readable = partial(readable_errors, "--encodings_dir", str(folder))
    plan = None
    if accelerator.is_main_process:
        identity = " ".join([__version__, str(args.allow_tf32), *map(fingerprint, functions)])
        with readable():
            store = Store(folder / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")
            store.remove_stale(3600 if args.encodings_dir else 0)  # no other run writes into this run's output folder
            store.verify(wanted)
        plan = store.folder.name, store.missing(wanted)
    distributed.barrier(accelerator)  # hashing terabytes takes long
    name, missing = broadcast_object_list([plan])[0]
    logger.info(f"{kind}: {len(wanted)} encodings needed, {len(wanted) - len(missing)} are in {folder}")
    with readable():
        store = Store(folder / name)
    if missing:
        items = list(wanted.items())
        mine = [items[i] for i in missing[accelerator.process_index :: accelerator.num_processes]]
        _encode(args, accelerator, store, kind, mine, read, functions[1], devices, in_fp16)
        distributed.barrier(accelerator)
        with readable():
            _wait_for_files(store, wanted)
    return store


def _wait_for_files(store: Store, wanted: dict) -> None:
    """Wait until all files are visible: a network file system may show another machine's files a minute late."""
    for _ in range(90):
        store.scan()
        if not store.missing(wanted):
            return
        time.sleep(1)
    raise OSError("not all processes see the same files in this folder")


class _EncodingInputs(torch.utils.data.Dataset):
    """Runs in loader workers while encoding: the encoder input of each item."""

    def __init__(self, items: list[tuple], read: Callable):
        self.items, self.read = items, read

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.read(self.items[i][1])


def _check_finite(encoded: dict[str, torch.Tensor], items: list[tuple], read: Callable, in_fp16: bool) -> None:
    """End the run before an encoding with inf or nan is stored. The tensors are on the CPU already."""
    for name, tensor in encoded.items():
        bad = (~tensor.reshape(len(tensor), -1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            item, known = items[bad[0]][1], getattr(read, "keywords", {})
            sample = f"the caption {item[:80]!r}" if isinstance(item, str) else f"row {item[0]}"
            if "dataset" in known:
                sample = describe(known["dataset"], known["column"], item[0])
            raise errors.RunError(errors.not_finite(name, [sample], in_fp16))


def _encode(args, accelerator, store: Store, kind: str, items: list[tuple], read, encode, devices, in_fp16) -> None:
    """Encode this process's `items` (key, input of `read`). Write full shards, and the rest if the run stops."""
    size = devices * min(BATCH, max(4, args.train_batch_size))
    parts = []  # (keys, tensors by name) of each batch since the last shard
    shapes = [item[1] if isinstance(item, tuple) else (1, 1) for _, item in items]  # of views; a caption has none
    batches = []  # indices of items
    for _, alike in itertools.groupby(range(len(items)), key=lambda i: shapes[i]):
        alike = list(alike)
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]

    def commit():
        if parts:
            keys = [key for keys, _ in parts for key in keys]
            store.add(keys, {name: torch.cat([tensors[name] for _, tensors in parts]) for name in parts[0][1]})
        parts.clear()

    pixels = size * max(map(math.prod, set(shapes)), default=1)
    loader = loading.loader(_EncodingInputs(items, read), args, accelerator, pixels, batches)
    bar = Bar(accelerator, total=len(items), desc=f"encoding {kind}", unit="")
    with bar, torch.no_grad():
        try:
            for places, batch in zip(batches, loading.on_device(loader, accelerator), strict=True):
                if shapes[places[0]] != shapes[places[0] - 1]:  # a shard is of one shape
                    commit()
                keys = [items[i][0] for i in places]
                encoded = {name: tensor.cpu() for name, tensor in encode(batch).items()}
                _check_finite(encoded, [items[i] for i in places], read, in_fp16)
                parts.append((keys, encoded))
                if len(parts) * size >= SHARD:
                    commit()
                bar.update(len(keys))
        finally:
            commit()
            if bar.n < len(items):
                logger.info(f"{kind}: {bar.n} of the {len(items)} that were missing are encoded, and kept")
