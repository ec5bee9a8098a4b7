"""How many loader workers a run takes when it is not told, and what it says when memory is used up."""

import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script

from t2i_training import errors, stopping
from t2i_training.data.workers import loader_workers
from t2i_training.run import lifecycle


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
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    args = SimpleNamespace(resolution=512, train_batch_size=16, dataloader_num_workers=None)
    assert loader_workers(args, args.train_batch_size) == workers
    assert ("--shm-size" in caplog.text) == (free < 10**12)
    assert loader_workers(SimpleNamespace(dataloader_num_workers=5), 1) == 5


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
    errors.explain_out_of_memory()
    sys.excepthook(type(error), error, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory, starting: lower --train_batch_size (and raise ")
    assert f"({type(error).__name__}: " in line


def raised(function: str, error: Exception):
    """The error as a function of that name raises it, some calls deep."""
    names = {"error": error}
    exec(f"def fail():\n    raise error\ndef {function}():\n    fail()", names)
    with pytest.raises(type(error)) as caught:
        names[function]()
    return caught.value


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("load_models", "out of memory, loading the models: free memory on host and GPU ("),
        ("cached", "out of memory, encoding: lower --train_batch_size or --resolution, or leave --cache_enc"),
        ("make_ema", "out of memory, making the average: leave --use_ema out, or, for Stable Diffusion, take --offl"),
        ("validate", "out of memory, drawing validation pictures: lower --resolution, or draw none: leave --valid"),
    ],
)
def test_what_the_run_was_doing_is_named(function, said):
    error = raised(function, torch.OutOfMemoryError("CUDA out of memory."))
    line = errors.out_of_memory(type(error), error, error.__traceback__)
    assert line.startswith(said)
    assert line.endswith("(OutOfMemoryError: CUDA out of memory.)")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
        RuntimeError("unable to write to file </torch_7>: No space left on device (28): shared memory"),
    ],
    ids=repr,
)
def test_host_memory(error):
    line = errors.out_of_memory(type(error), error, None)
    assert line.startswith("out of memory, host memory, starting: lower --dataloader_num_workers, or give the")


def test_step_and_process_are_named(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(errors, "steps", (3, 3))
    line = errors.out_of_memory(type(error), error, None)
    assert line.startswith("out of memory, step 4: lower --train_batch_size")
    assert "--resume" not in line, "nothing has been trained yet"
    monkeypatch.setattr(errors, "steps", (3, 5))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    line = errors.out_of_memory(type(error), error, None)
    assert line.startswith("out of memory (process 1), step 6: lower --train_batch_size")
    assert "; --resume_from_checkpoint=latest continues from the last checkpoint (OutOfMemoryError: " in line


def test_other_errors_keep_their_trace(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    errors.explain_out_of_memory()
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err.splitlines()[0] == "Traceback (most recent call last):"


def test_a_run_forgets_where_an_earlier_one_in_this_process_stood(sd_flags, monkeypatch):
    """It has taken no step, and the bar of the earlier one is none of its own."""
    monkeypatch.setattr(errors, "steps", (3, 5))
    monkeypatch.setattr(errors, "progress_bar", object())
    lifecycle.start(load_script("sd").parse_args(sd_flags()))
    stopping.default_signals()
    assert (errors.steps, errors.progress_bar) == (None, None)
