"""The loader that feeds the step with the stream of samples, whose order is in `order`."""

import atexit
import collections
import functools
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from multiprocessing import connection

import torch

from .. import device, stopping
from ..errors import RunError
from ..log import logger
from . import draws, order
from .dataset import ROW_INDEX, SHAPE, BadSample, naming_the_sample
from .workers import loader_workers

MAX_LOOKAHEAD = 64  # upper bound of the look-ahead, in micro-batches


class TrainingDataset(torch.utils.data.Dataset):
    """Runs in loader workers: (epoch, index) -> one training sample, with everything random about it drawn here.

    `make_sample(row, draw)` is the script's; `draw(name)` is the random generator of that name for this visit.
    The row holds its shape of `shapes` besides. A sample gets an "index" entry, by which a fault that is found later
    can be traced to its row.
    """

    def __init__(self, dataset, shapes: list, make_sample: Callable[..., dict], image_column: str, seed: int):
        self.dataset, self.make_sample, self.image_column, self.seed = dataset, make_sample, image_column, seed
        self.rows, self.shapes = dataset, shapes

    def __getitem__(self, visit: tuple[int, int]) -> dict:
        epoch, index = visit
        draw = functools.partial(draws.generator, self.seed, epoch, index)
        with naming_the_sample(self.dataset, self.image_column, index):
            row = self.rows[index] | {ROW_INDEX: index, SHAPE: self.shapes[index]}
            sample = self.make_sample(row, draw)
        return sample | {"index": torch.tensor(index)}


class StreamSampler(torch.utils.data.Sampler):
    """One process's batches of a stream of visits, `count` or endlessly. Each process takes a batch in turn.

    At the end, those that are left `waiting` for an update of their shape are counted in the log.
    """

    def __init__(self, visits: Iterator, batch_size: int, rank: int, world_size: int, count, waiting: dict):
        self.visits, self.batch_size, self.count = visits, batch_size, count
        self.rank, self.world_size, self.waiting = rank, world_size, waiting

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for _ in itertools.count() if self.count is None else range(self.count):
            batches = list(itertools.islice(self.visits, self.world_size * self.batch_size))
            yield batches[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        if left := sum(map(len, self.waiting.values())):
            logger.info(
                f"training ends while {left} samples of {len(self.waiting)} buckets wait for others of their shape: "
                "they are trained once less than the rest"
            )


def make_loader(
    dataset, shapes: list, make_sample: Callable[..., dict], args, accelerator, seed: int, start: int, updates=None,
    devices=1,
):  # fmt: skip
    """This process's batches of collated samples, for that many updates, from stream position `start` (in samples).

    The run's `seed` orders the stream. An update is of one of the rows' `shapes` (H, W). A batch is for the process's
    `devices` together.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    samples = TrainingDataset(dataset, shapes, make_sample, args.image_column, seed)
    if args.cache_encodings:  # do not read images any more: the data set itself may hold them
        others = [name for name in dataset.column_names if name != args.image_column]
        samples.rows = dataset.select_columns(others) if others else [{}] * len(dataset)
    count = None if updates is None else updates * args.gradient_accumulation_steps
    size, waiting = devices * args.train_batch_size, {}
    visits = order.visits(seed, shapes, size * world_size * args.gradient_accumulation_steps, start, waiting)
    batches_of_rows = StreamSampler(visits, size, rank, world_size, count, waiting)
    return loader(samples, args, accelerator, size * max(map(math.prod, set(shapes))), batches_of_rows)


def loader(dataset, args, accelerator, pixels: int, batches_of_rows) -> torch.utils.data.DataLoader:
    """Batches of at most so many `pixels` from a map-style dataset, made by --dataloader_num_workers processes."""
    workers = loader_workers(args, pixels)
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches_of_rows,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.pins_memory(accelerator.device),
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


def _ended_worker(iterator) -> int | None:
    """The process number of a worker that has ended, or does so in 5 s: its sockets break a moment before.

    torch asks only whether one has ended already, and would raise the socket's error.
    """
    pids = {worker.sentinel: worker.pid for worker in getattr(iterator, "_workers", [])}
    return next((pids[ended] for ended in connection.wait(list(pids), timeout=5)), None) if pids else None


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
    except (OSError, EOFError, RuntimeError) as error:
        lost = not isinstance(error, RuntimeError) or "Pin memory thread" in str(error)  # it reads the workers' sockets
        if lost and (pid := _ended_worker(iterator)):
            raise RuntimeError(f"DataLoader worker (pid {pid}) exited unexpectedly") from error  # in torch's words
        raise
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
