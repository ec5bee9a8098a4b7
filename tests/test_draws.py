"""Draws are a function of (seed, epoch, index, name), and the same numbers on every machine and release."""

import hashlib
from itertools import product

import numpy as np
import pytest
import torch

from t2i_training.data import draws


def test_numbers_are_pinned():
    """A change in NumPy that shifted these would silently break resuming: it has to be noticed."""
    assert draws.generator(3, 1, 5, "noise").random(3).tolist() == [
        0.31909644857715025, 0.6460521423532556, 0.5835646431917184,
    ]  # fmt: skip
    assert draws.generator(3, 1, 5, "noise").standard_normal(3, dtype=np.float32).tolist() == [
        1.8405766487121582, 0.1690923124551773, 0.8837049603462219,
    ]  # fmt: skip
    assert draws.generator(3, 1, 5, "timestep").integers(1000, size=4).tolist() == [202, 985, 155, 151]
    assert draws.permutation(3, 0, 10).tolist() == [1, 9, 8, 7, 5, 0, 3, 4, 6, 2]
    assert draws.permutation(3, 1, 10).tolist() == [4, 8, 3, 0, 6, 7, 2, 5, 1, 9]


def philox4x64(counter, key):
    """Philox4x64-10, Salmon et al., SC 2011, figure 2 and table 2."""
    mask = 2**64 - 1
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def test_philox_known_answer():
    """The check above stands on the vector that the paper's authors publish (Random123, kat_vectors)."""
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0, 0, 0, 0], [0, 0]) == answer


def test_key_is_seed_and_name_counter_is_index_and_epoch():
    name = int.from_bytes(hashlib.blake2b(b"noise", digest_size=8).digest(), "little")
    raw = draws.generator(seed=3, epoch=1, index=5, name="noise").bit_generator.random_raw(8).tolist()
    first, second = philox4x64([1, 0, 5, 1], [3, name]), philox4x64([2, 0, 5, 1], [3, name])
    assert raw == [*first, *second]


def test_streams_differ_in_every_coordinate():
    keys = list(product((0, 1, 2**62), (0, 1, 7), (0, 1, 7), ("noise", "posterior", "crop")))
    assert len({draws.generator(*key).random() for key in keys}) == len(keys) == 81


def test_swapped_epoch_and_index_differ():
    assert draws.generator(0, 2, 3, "noise").random() != draws.generator(0, 3, 2, "noise").random()


def test_another_draw_shifts_none():
    """However much is drawn under other names before it, a draw stays what it is."""
    alone = draws.generator(3, 1, 5, "noise").random(4)
    for name in ("noise_offset", "crop", "posterior"):
        draws.generator(3, 1, 5, name).random(1000)
    assert np.array_equal(draws.generator(3, 1, 5, "noise").random(4), alone)


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = draws.normal(draws.generator(0, 0, 0, "noise"), (4,))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(1)
    assert torch.equal(draws.normal(draws.generator(0, 0, 0, "noise"), (4,)), first)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_permutation_visits_every_sample_once(size):
    for epoch in range(3):
        assert sorted(draws.permutation(9, epoch, size).tolist()) == list(range(size))


def test_epochs_have_orders_of_their_own():
    orders = {tuple(draws.permutation(9, epoch, 20).tolist()) for epoch in range(50)}
    assert len(orders) == 50


def test_normal_is_float32_standard_normal():
    numbers = draws.normal(draws.generator(0, 0, 0, "noise"), (4, 100, 100))
    assert (numbers.shape, numbers.dtype) == ((4, 100, 100), torch.float32)
    assert abs(numbers.mean().item()) < 0.02  # 4 standard errors of 40,000 numbers
    assert abs(numbers.std().item() - 1) < 0.015


def test_samples_are_uncorrelated():
    """First numbers over neighbouring samples: what one batch sees."""
    first = np.array([draws.generator(0, 0, i, "noise").standard_normal() for i in range(4000)])
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.065  # 4 standard errors


def test_seed_outside_64_bits_is_refused():
    with pytest.raises(OverflowError):
        draws.generator(-1, 0, 0, "noise")
