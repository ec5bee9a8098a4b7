"""A run says at its start how much disk its checkpoints will take."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import load_quick_flax_script, load_script
from scripts import SCRIPTS

from t2i_training.run import checkpoint

GIB = 2**30


def announced(caplog, tmp_path, monkeypatch, free=100 * GIB, existing=0, **changes) -> tuple[str, str] | None:
    """(level, line) of what is said of checkpoints of 10 GiB."""
    for step in range(1, existing + 1):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / checkpoint.MANIFEST).touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    PartialState()  # or accelerate's logger refuses
    args = {"output_dir": str(tmp_path), "checkpointing_steps": 500, "checkpoints_total_limit": None} | changes
    step, total = args.pop("step", 0), args.pop("total", 4000)
    with caplog.at_level("INFO"):
        checkpoint.announce_space(SimpleNamespace(**args), 10 * GIB, step, total)
    (record,) = caplog.records or [None]
    return record and (record.levelname, record.getMessage().removesuffix(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "level", "line"),
    [
        ({}, "INFO", "8 checkpoints of 10.0 GiB will take 80.0 GiB of the 100.0 GiB that are free in "),
        ({"total": 4499}, "INFO", "8 checkpoints of 10.0 GiB will take 80.0 GiB of the 100.0 GiB that are free in "),
        ({"step": 3999}, "INFO", "1 checkpoint of 10.0 GiB will take 10.0 GiB of the 100.0 GiB that are free in "),
        (
            {"checkpoints_total_limit": 3},
            "INFO",
            "8 checkpoints of 10.0 GiB, of which 3 are kept, will take 40.0 GiB of the 100.0 GiB that are free in ",
        ),
        (
            {"checkpoints_total_limit": 3, "existing": 3, "step": 1500, "free": 11 * GIB},
            "INFO",
            "5 checkpoints of 10.0 GiB, of which 3 are kept, will take 10.0 GiB of the 11.0 GiB that are free in ",
        ),
    ],
)
def test_line(caplog, tmp_path, monkeypatch, changes, level, line):
    assert announced(caplog, tmp_path, monkeypatch, **changes) == (level, line)


@pytest.mark.parametrize(
    ("limit", "way_out"),
    [
        (None, "keep fewer with --checkpoints_total_limit,"),
        (7, "keep fewer with --checkpoints_total_limit,"),
        (1, "make room,"),
    ],
)
def test_warning(caplog, tmp_path, monkeypatch, limit, way_out):
    level, line = announced(caplog, tmp_path, monkeypatch, free=19 * GIB, checkpoints_total_limit=limit)
    assert level == "WARNING"
    assert line.endswith(", or choose another --output_dir")
    assert "they do not fit; " in line
    assert way_out in line


def test_no_checkpoint_is_due(caplog, tmp_path, monkeypatch):
    assert announced(caplog, tmp_path, monkeypatch, total=499) is None


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("averaged", [False, True])
def test_size_is_that_of_the_files(command, monkeypatch, caplog, script, averaged, tmp_path):
    """Their tensors', that is: a tiny network's files are headers for the most part."""
    if SCRIPTS[script].is_lora and averaged:
        pytest.skip("no --use_ema")
    module = load_quick_flax_script(monkeypatch) if script == "sd_flax" else load_script(script)
    options = {"use_ema": averaged, "max_train_steps": 1, "checkpointing_steps": 1, "output_dir": tmp_path / "out"}
    announce, sizes = checkpoint.announce_space, []
    monkeypatch.setattr(
        checkpoint, "announce_space", lambda args, size, *rest: sizes.append(size) or announce(args, size, *rest)
    )
    with caplog.at_level("INFO"):
        module.main(command(script, **options))
    assert re.search(r"1 checkpoint of \d+\.\d MiB will take \d+\.\d MiB of the .* that are free in", caplog.text)
    assert sizes == [pytest.approx(tensor_bytes(tmp_path / "out" / "checkpoint-1"), rel=0.02)]


def tensor_bytes(folder) -> int:
    from safetensors.torch import load_file

    states = [load_file(path) for path in folder.rglob("*.safetensors")]
    if (folder / "optimizer.bin").exists():
        moments = torch.load(folder / "optimizer.bin", weights_only=True)["state"].values()
        states += [{name: tensor for name, tensor in state.items() if name != "step"} for state in moments]
    return sum(tensor.nbytes for state in states for tensor in state.values())


def test_8bit_adam_has_smaller_moments():
    network = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(10, 10, bias=False))
    network.append(torch.nn.Linear(9, 9).requires_grad_(False))
    weights = 4 * (1024 * 1024 + 1024 + 100)
    assert checkpoint.size_of(SimpleNamespace(use_8bit_adam=False), network) == 3 * weights
    assert checkpoint.size_of(SimpleNamespace(use_8bit_adam=False), network, average=object()) == 4 * weights
    moments = 2 * 1024 * 1024 + 8 * 4096 + 8 * (1024 + 100)
    assert checkpoint.size_of(SimpleNamespace(use_8bit_adam=True), network) == weights + moments
