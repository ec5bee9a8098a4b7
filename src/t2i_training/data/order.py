"""The order in which samples are visited: an endless stream of (epoch, row), a pure function of seed and data.

Update `u` consumes positions `u * E` to `(u + 1) * E` of it, where E is the effective batch (processes x accumulation
x batch size). So a step's samples depend on E alone, every batch is full, and the position to resume from is one
number.
"""

import itertools
from collections.abc import Iterator

from . import draws


def visits(seed: int, shapes: list, effective_batch: int, start: int, waiting: dict) -> Iterator[tuple[int, int]]:
    """The stream from position `start` on. Images of several `shapes` come in updates of one shape each.

    `waiting` is filled with the visits that wait for their update, by shape.
    """
    if len(set(shapes)) == 1:
        return _one_by_one(seed, len(shapes), start)
    updates = by_shape(seed, shapes, effective_batch, waiting)
    # Where the effective batch has changed, `start` may lie within an update: the next whole one follows.
    return itertools.chain.from_iterable(itertools.islice(updates, -(-start // effective_batch), None))


def _one_by_one(seed: int, size: int, start: int) -> Iterator[tuple[int, int]]:
    """Epoch after epoch, each in an order of its own."""
    first, place = divmod(start, size)
    for epoch in itertools.count(first):
        rows = draws.permutation(seed, epoch, size)[place if epoch == first else 0 :]
        yield from ((epoch, row) for row in rows.tolist())


def by_shape(seed: int, shapes: list, effective_batch: int, waiting: dict) -> Iterator[list[tuple[int, int]]]:
    """The same visits in updates of one shape: a visit waits until there are `effective_batch` of its shape.

    What waits at the end of an epoch is carried into the next, so nothing is left out or visited twice. Going through
    a million visits takes 0.4 s, at every start from the first on.
    """
    for epoch in itertools.count():
        for row in draws.permutation(seed, epoch, len(shapes)).tolist():
            update = waiting.setdefault(shapes[row], [])
            update.append((epoch, row))
            if len(update) == effective_batch:
                yield waiting.pop(shapes[row])
