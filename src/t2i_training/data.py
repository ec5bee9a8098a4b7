"""Captioned pictures: opening and checking a data set, the order of samples, and the loader that feeds the step.

The samples form one endless stream: epoch after epoch, each in an order of its own. Update `u` consumes positions
`u * E` to `(u + 1) * E` of it, where E is the effective batch (processes x accumulation x batch size). So a step's
samples depend on E alone, every batch is full, and the position to resume from is one number.
"""

import atexit
import functools
import os
import signal
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from . import draws, runtime


class BadSample(Exception):
    """A sample that cannot be used; the message names row, file and reason."""


def open_dataset(args):
    """The training split as a `datasets.Dataset` whose pictures are left encoded. Exits with one line on an error."""
    import datasets

    where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    try:
        folder = args.train_data_dir if args.dataset_name is None else args.dataset_name
        if args.dataset_name is not None and not os.path.exists(os.path.join(folder, "metadata.jsonl")):
            splits = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, data_dir=args.train_data_dir
            )
        else:
            # Not data_dir: with that, names of files and subfolders (steam_train.png) would become splits.
            files = {"train": os.path.join(folder, "**")}
            splits = datasets.load_dataset("imagefolder", data_files=files, cache_dir=args.cache_dir)
    except Exception as error:  # datasets raises some twenty kinds here, for files, hub, formats and metadata
        raise SystemExit(f"error: {where}: {_one_line(error)}") from error
    if "train" not in splits:
        raise SystemExit(f"error: {where} has no split named train, only: {', '.join(splits)}")
    dataset = splits["train"]
    if len(dataset) == 0:
        raise SystemExit(f"error: {where} holds no samples")
    return _check_images(_select(dataset, args), args)


def _one_line(error: BaseException) -> str:
    reason = error.__cause__ or error
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"


def _select(dataset, args):
    if args.max_train_samples is None:
        return dataset
    if args.max_train_samples > len(dataset):
        raise SystemExit(
            f"error: --max_train_samples {args.max_train_samples} is more than the {len(dataset)} samples there are"
        )
    return dataset.shuffle(seed=args.seed).select(range(args.max_train_samples))


def _check_images(dataset, args):
    import datasets

    _check_column(dataset, "image_column", args.image_column)
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        raise SystemExit(
            f"error: --image_column {args.image_column!r} holds {_kind(dataset, args.image_column)}, not pictures; "
            f"columns with pictures: {', '.join(_columns_of(dataset, datasets.Image)) or 'none'}"
        )
    # Left encoded: datasets would decode every picture in full, and in the main process.
    return dataset.cast_column(args.image_column, datasets.Image(decode=False))


def check_captions(dataset, column: str) -> None:
    """Exit with one line unless `column` holds a string, or a non-empty list of strings, in every row."""
    _check_column(dataset, "caption_column", column)
    kind = _kind(dataset, column).replace("large_string", "string")
    if kind not in ("string", "list of string"):
        raise SystemExit(f"error: --caption_column {column!r} holds {kind}; it must hold strings or lists of strings")
    bad = [row for row, caption in enumerate(dataset[column]) if not _is_caption(caption)]
    if bad:
        rows = ", ".join(map(str, bad[:10])) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise SystemExit(f"error: --caption_column {column!r} is empty (no string) in row {rows}")


def _is_caption(caption) -> bool:
    if isinstance(caption, str):
        return True
    return bool(caption) and all(isinstance(text, str) for text in caption)


def _check_column(dataset, flag: str, column: str) -> None:
    if column not in dataset.column_names:
        raise SystemExit(f"error: --{flag} {column!r} is not a column; there are: {', '.join(dataset.column_names)}")


def _columns_of(dataset, feature) -> list[str]:
    return [name for name, kind in dataset.features.items() if isinstance(kind, feature)]


def _kind(dataset, column: str) -> str:
    feature = dataset.features[column]
    if hasattr(feature, "feature"):
        return f"list of {getattr(feature.feature, 'dtype', feature.feature)}"
    return str(getattr(feature, "dtype", feature))


def pick_caption(caption: str | list[str], draw: Callable[[str], np.random.Generator], dropout: float) -> str:
    """The caption of this visit: one of several if there are several, and the empty one with probability `dropout`."""
    if dropout and draw("caption_dropout").random() < dropout:
        return ""  # arXiv:2207.12598: without such samples fine-tuning erodes classifier-free guidance
    return caption if isinstance(caption, str) else caption[draw("caption").integers(len(caption))]


def tokenize(tokenizer, caption: str) -> torch.Tensor:
    """(tokens,) int64, padded and cut to the tokenizer's length (77 for CLIP)."""
    options = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    return tokenizer(caption, **options, return_tensors="pt").input_ids[0]


def text_mask(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) bool: True up to and including the first end token, False on the padding after it."""
    ends = (input_ids == tokenizer.eos_token_id).cumsum(0)
    return ends - (input_ids == tokenizer.eos_token_id).long() < 1


class Samples(torch.utils.data.Dataset):
    """What loader workers run: (epoch, index) -> one training sample, with everything random about it drawn here.

    `make_sample(row, draw)` is the script's; `draw(name)` gives the generator of a named draw for this very visit.
    A sample gets an "index" entry, so that a fault found later can be traced to its row.
    """

    def __init__(self, dataset, make_sample: Callable[..., dict], image_column: str, seed: int):
        self.dataset, self.make_sample, self.image_column, self.seed = dataset, make_sample, image_column, seed

    def __getitem__(self, visit: tuple[int, int]) -> dict:
        epoch, index = visit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL on harmless metadata; real faults raise
                draw = functools.partial(draws.generator, self.seed, epoch, index)
                sample = self.make_sample(self.dataset[index], draw)
        except Exception as error:
            raise BadSample(f"{describe(self.dataset, self.image_column, index)}: {_one_line(error)}") from None
        return sample | {"index": torch.tensor(index)}


def picture_source(picture: dict) -> bytes | str:
    """What `images.decode` reads, of an image column's entry."""
    return picture["bytes"] or picture["path"]


def describe(dataset, image_column: str, index: int) -> str:
    """Row number and, where the data set knows it, file name of a sample."""
    picture = dataset[int(index)][image_column]
    path = picture.get("path") if picture else None
    return f"row {int(index)} ({path})" if path else f"row {int(index)}"


class VisitStream(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one process, endlessly, from any position of the stream of samples."""

    def __init__(self, size: int, seed: int, batch_size: int, rank: int, world_size: int, start: int):
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = functools.lru_cache(maxsize=2)(functools.partial(draws.permutation, self.seed, size=self.size))
        position = self.start + self.rank * self.batch_size
        while True:
            places = (divmod(position + i, self.size) for i in range(self.batch_size))
            yield [(epoch, int(order(epoch)[place])) for epoch, place in places]
            position += self.world_size * self.batch_size


def make_loader(dataset, make_sample: Callable[..., dict], args, accelerator, start: int):
    """This process's batches of collated samples, endlessly, from stream position `start` (in samples)."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return torch.utils.data.DataLoader(
        Samples(dataset, make_sample, args.image_column, args.seed),
        batch_sampler=VisitStream(len(dataset), args.seed, args.train_batch_size, rank, world_size, start),
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # its own: the loader draws a worker seed, which must not touch the global state
        worker_init_fn=_ignore_stop_signals,
    )


def _ignore_stop_signals(_worker: int) -> None:
    """A Ctrl-C reaches the whole process group; the main process still needs its batches to finish the step."""
    for number in runtime.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers(iterator) -> None:
    if hasattr(iterator, "_shutdown_workers"):  # there are workers
        iterator._shutdown_workers()


def batches(loader, accelerator) -> Iterator[dict]:
    """Batches on the device. A bad sample ends the run in one line instead of a worker's stack trace."""
    iterator = iter(loader)
    # At exit multiprocessing would send workers a SIGTERM, which they ignore, and wait for ever. And the iterator must
    # not die with a traceback's reference cycle: Python then first ends the threads that tell workers to stop.
    end_workers = functools.partial(_end_workers, iterator)
    atexit.register(end_workers)
    runtime.begin_loop()
    try:
        for batch in iterator:
            yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    except BadSample as error:
        message = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.BadSample: ")
        runtime.fail(message)
    finally:
        atexit.unregister(end_workers)
        end_workers()


def plan_updates(args, dataset_size: int, world_size: int) -> tuple[int, int]:
    """(effective batch in samples, number of weight updates) of a run; --max_train_steps overrides the epochs."""
    effective_batch = args.train_batch_size * args.gradient_accumulation_steps * world_size
    return effective_batch, args.max_train_steps or -(-args.num_train_epochs * dataset_size // effective_batch)
