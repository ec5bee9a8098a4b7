"""How many loader workers a run takes when it is not told."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

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


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
        "torch.empty(10**15)",
        "RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate')",
    ],
)
def test_too_little_memory_is_one_line(error):
    raising = f"x = {error}\nraise x"
    program = f"import torch\nfrom t2i_training import machine\nmachine.explain_out_of_memory()\n{raising}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "lower --train_batch_size" in line


def test_other_errors_keep_their_trace():
    program = "from t2i_training import machine\nmachine.explain_out_of_memory()\n1 / 0"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
