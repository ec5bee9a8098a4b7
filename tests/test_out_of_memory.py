"""How many loader workers a run takes when it is not told, and what it says when memory is used up."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from t2i_training import library_errors
from t2i_training.data.workers import loader_workers
from t2i_training.errors import RunError
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
    args = SimpleNamespace(train_batch_size=16, dataloader_num_workers=None)
    assert loader_workers(args, args.train_batch_size * 512 * 512) == workers
    assert ("--shm-size" in caplog.text) == (free < 10**12)
    assert loader_workers(SimpleNamespace(dataloader_num_workers=5), 1) == 5


def ending(error: BaseException) -> str:
    """What a script whose `main` raises this error prints before it exits with status 1."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        lifecycle.run(main)
    return stop.value.code


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
def test_too_little_memory_is_one_line(error):
    line = ending(error)
    assert line.startswith("error: out of memory, starting: lower --train_batch_size (and raise ")
    assert f"({type(error).__name__}: " in line
    assert len(line.splitlines()) == 1


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
        ("precompute", "out of memory, encoding: lower --train_batch_size or --resolution, or leave --cache_enc"),
        ("make_ema", "out of memory, making the average: leave --use_ema out, or, for Stable Diffusion, take --offl"),
        ("validate", "out of memory, generating validation images: lower --resolution, or leave --valid"),
    ],
)
def test_what_the_run_was_doing_is_named(function, said):
    error = raised(function, torch.OutOfMemoryError("CUDA out of memory."))
    line = library_errors.out_of_memory(error)
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
    line = library_errors.out_of_memory(error)
    assert line.startswith("out of memory, host memory, starting: lower --dataloader_num_workers, or give the")


def test_step_and_process_are_named(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    library_errors.note_step(error, 4, trained=False)
    line = ending(error)
    assert line.startswith("error: out of memory, step 4: lower --train_batch_size")
    assert "--resume" not in line, "nothing has been trained yet"
    error = torch.OutOfMemoryError("CUDA out of memory.")
    library_errors.note_step(error, 6, trained=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    line = ending(error)
    assert line.startswith("error: out of memory (process 1), step 6: lower --train_batch_size")
    assert "; --resume_from_checkpoint=latest continues from the last checkpoint (OutOfMemoryError: " in line


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("1 / 0"), RunError("--encodings_dir x: RuntimeError: out of memory"), SystemExit(143)]
)
def test_other_errors_stay_what_they_are(error):
    """So do those that are one line already, whatever it says."""

    def main():
        raise error

    with pytest.raises(type(error)) as ending:
        lifecycle.run(main)
    assert ending.value is error
