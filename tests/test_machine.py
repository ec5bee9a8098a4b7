"""How many loader workers a run takes when it is not told, and what it says when memory is used up."""

import sys
from types import SimpleNamespace

import pytest
import torch

from t2i_training import machine


@pytest.mark.parametrize(
    ("cores", "processes", "free", "workers"),
    [
        (1, 1, 10**12, 0),
        (2, 1, 10**12, 1),
        (16, 1, 10**12, 8),
        (16, 4, 10**12, 3),
        (2, 4, 10**12, 0),
        (16, 1, 64 * 2**20, 0),  # a container's default, at 512 pixels and a batch of 16
        (16, 1, 2**29, 5),
        (16, 2, 2**29, 2),
    ],
)
def test_automatic_number_of_workers(cores, processes, free, workers, monkeypatch, caplog):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(machine.os.path, "isdir", lambda _: True)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    args = SimpleNamespace(resolution=512, train_batch_size=16, dataloader_num_workers=None)
    assert machine.loader_workers(args, args.train_batch_size) == workers
    assert ("--shm-size" in caplog.text) == (free < 10**12)
    assert machine.loader_workers(SimpleNamespace(dataloader_num_workers=5), 1) == 5


def too_much() -> RuntimeError:
    with pytest.raises(RuntimeError) as stopped:
        torch.empty(10**15)
    return stopped.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        too_much(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes."),  # JAX's
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    machine.explain_out_of_memory()
    sys.excepthook(type(error), error, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {type(error).__name__}: ")
    assert "lower --train_batch_size" in line


def test_other_errors_keep_their_trace(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    machine.explain_out_of_memory()
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err.splitlines()[0] == "Traceback (most recent call last):"
