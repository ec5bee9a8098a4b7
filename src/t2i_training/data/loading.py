"""The order of samples, and the loader that feeds the step.

The samples form one endless stream: epoch after epoch, each in an order of its own. Update `u` consumes positions
`u * E` to `(u + 1) * E` of it, where E is the effective batch (processes x accumulation x batch size). So a step's
samples depend on E alone, every batch is full, and the position to resume from is one number.
"""

import atexit
import collections
import functools
import itertools
import signal
from collections.abc import Callable, Iterator

import torch

from .. import stopping
from ..errors import RunError
from . import draws
from .dataset import ROW_INDEX, BadSample, naming_the_sample
from .workers import loader_workers

MAX_LOOKAHEAD = 64  # upper bound of the look-ahead, in micro-batches


class TrainingDataset(torch.utils.data.Dataset):
    """Runs in loader workers: (epoch, index) -> one training sample, with everything random about it drawn here.

    `make_sample(row, draw)` is the script's; `draw(name)` is the random generator of that name for this visit.
    A sample gets an "index" entry, by which a fault that is found later can be traced to its row.
    """

    def __init__(self, dataset, make_sample: Callable[..., dict], image_column: str, seed: int):
        self.dataset, self.make_sample, self.image_column, self.seed = dataset, make_sample, image_column, seed
        self.rows = dataset

    def __getitem__(self, visit: tuple[int, int]) -> dict:
        epoch, index = visit
        draw = functools.partial(draws.generator, self.seed, epoch, index)
        with naming_the_sample(self.dataset, self.image_column, index):
            sample = self.make_sample(self.rows[index] | {ROW_INDEX: index}, draw)
        return sample | {"index": torch.tensor(index)}


class StreamSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one process, `count` or endlessly, from any position of the stream of samples."""

    def __init__(self, size: int, seed: int, batch_size: int, rank: int, world_size: int, start: int, count=None):
        self.size, self.seed, self.batch_size, self.count = size, seed, batch_size, count
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = functools.lru_cache(maxsize=2)(functools.partial(draws.permutation, self.seed, size=self.size))
        position = self.start + self.rank * self.batch_size
        for _ in itertools.count() if self.count is None else range(self.count):
            places = (divmod(position + i, self.size) for i in range(self.batch_size))
            yield [(epoch, int(order(epoch)[place])) for epoch, place in places]
            position += self.world_size * self.batch_size


def make_loader(
    dataset, make_sample: Callable[..., dict], args, accelerator, seed: int, start: int, updates=None, devices=1
):
    """This process's batches of collated samples, for that many updates, from stream position `start` (in samples).

    The run's `seed` orders the stream. A batch is for the process's `devices` together.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    samples = TrainingDataset(dataset, make_sample, args.image_column, seed)
    if args.cache_encodings:  # do not read images any more: the data set itself may hold them
        others = [name for name in dataset.column_names if name != args.image_column]
        samples.rows = dataset.select_columns(others) if others else [{}] * len(dataset)
    count = None if updates is None else updates * args.gradient_accumulation_steps
    visits = StreamSampler(len(dataset), seed, devices * args.train_batch_size, rank, world_size, start, count)
    return loader(samples, args, accelerator, visits.batch_size, batch_sampler=visits)


def loader(dataset, args, accelerator, size: int, **order) -> torch.utils.data.DataLoader:
    """Batches of `size` from a map-style dataset, made by --dataloader_num_workers processes."""
    workers = loader_workers(args, size)
    return torch.utils.data.DataLoader(
        dataset,
        **order,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a worker seed; it must not advance the global generator
        worker_init_fn=_ignore_stop_signals,
    )


def _ignore_stop_signals(_worker: int) -> None:
    """A Ctrl-C reaches the whole process group; the main process still needs its batches to finish the step."""
    for number in stopping.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers(iterator) -> None:
    if hasattr(iterator, "_shutdown_workers"):  # there are workers
        iterator._shutdown_workers()


def batches(loader, accelerator, stop) -> Iterator[dict]:
    """The loop's batches, on the device. A bad sample ends the run through `stop`, after the update is saved."""
    accumulation = accelerator.gradient_accumulation_steps
    return on_device(
        loader, accelerator, functools.partial(_look_ahead_one_update, accumulation=accumulation, stop=stop)
    )


def on_device(loader, accelerator, order: Callable[[Iterator], Iterator] = iter) -> Iterator[dict]:
    """Batches on the device. A bad sample ends the run in one line instead of a worker's stack trace."""
    iterator = iter(loader)
    # At exit multiprocessing would send the workers a SIGTERM, which they ignore, and join them forever. And if the
    # iterator were freed with a traceback's reference cycle, the threads that tell workers to stop would end first.
    end_workers = functools.partial(_end_workers, iterator)
    atexit.register(end_workers)
    try:
        for batch in order(iterator):
            yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    except BadSample as error:
        raise RunError(_what_happened(error)) from error
    finally:
        atexit.unregister(end_workers)
        end_workers()


def _look_ahead_one_update(iterator, accumulation: int, stop) -> Iterator[dict]:
    """Yield batches with a look-ahead of one update, so that it can be finished if a later sample is bad."""
    held, given = collections.deque(), 0
    try:
        for batch in iterator:
            held.append(batch)
            if len(held) > min(accumulation, MAX_LOOKAHEAD):
                yield held.popleft()
                given += 1
    except BadSample as error:
        if len(held) < accumulation - given % accumulation:
            raise
        stop.fail_after_step(_what_happened(error))
    yield from held


def _what_happened(error: BadSample) -> str:
    name = f"{BadSample.__module__}.{BadSample.__qualname__}"  # the last line of a worker's traceback begins with it
    return str(error).strip().splitlines()[-1].removeprefix(f"{name}: ")
