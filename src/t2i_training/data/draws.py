"""Randomness as a pure function of (seed, epoch, sample index, name of the draw).

A training run draws noise, timesteps, crops, flips, captions and dropouts. Here each of them has its own counter-based
stream (Philox, Salmon et al., SC 2011), so no draw depends on how many were made before it, on which process or worker
makes it, or on the device. Resume, any split over processes and any number of workers then see the same numbers, and a
flag that adds a draw shifts no other.
"""

import functools
import hashlib

import numpy as np


@functools.cache
def _stream_number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def generator(seed: int, epoch: int, index: int, name: str) -> np.random.Generator:
    """The generator of one draw; equal arguments give equal numbers on every machine.

    The 128-bit Philox key holds the seed and the draw's name. Of the 256-bit counter the two high words hold sample and
    epoch, the two low ones count, so streams cannot meet before 2**128 numbers. Costs about 10 microseconds.
    """
    key = np.array([seed, _stream_number(name)], dtype=np.uint64)
    counter = np.array([0, 0, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `size` samples: (size,) int64."""
    return generator(seed, epoch, 0, "order").permutation(size)


def normal(draw: np.random.Generator, shape: tuple[int, ...]):
    """Standard normal numbers as a float32 torch tensor of `shape`."""
    import torch

    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))
