"""Contract, on CUDA devices: all torch scripts end well in half precision, and the host waits only to report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port, load_script
from no_waits import UPDATES, host_never_waits
from scripts import SCRIPTS, TORCH


@pytest.fixture
def tokens(command, tmp_path):
    """tokens(script, **changes): of a run of UPDATES updates with everything that adds to its step, and a report."""

    def make(script, **changes):
        run = {"max_train_steps": UPDATES, "logging_steps": 100, "dataloader_num_workers": 1, "snr_gamma": 5.0}
        run |= {"dream_training": True} if SCRIPTS[script].base == "model" else {}
        run |= {} if SCRIPTS[script].is_lora else {"gradient_accumulation_steps": 2}
        return command(
            script, output_dir=tmp_path / "out", **SCRIPTS[script].draws | SCRIPTS[script].resumed | run | changes
        )

    return make


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("script", TORCH)
def test_plain_and_resumed(tokens, script, precision, tmp_path):
    run = {"mixed_precision": precision, "checkpointing_steps": UPDATES}
    with host_never_waits():
        load_script(script).main(tokens(script, **run))
    with host_never_waits():
        load_script(script).main(
            tokens(script, **run, max_train_steps=2 * UPDATES, resume_from_checkpoint=f"checkpoint-{UPDATES}")
        )
    assert torch.tensor(losses(tmp_path / "out")).isfinite().tolist() == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("script", TORCH)
def test_cached_and_validated(tokens, script, precision, tmp_path):
    run = {"mixed_precision": precision, "cache_encodings": True, "validation_epochs": 100, **SCRIPTS[script].validates}
    with host_never_waits():  # which they may before the first update and after the last, where images are drawn
        load_script(script).main(tokens(script, **run))
    grids = sorted(path.name for path in (tmp_path / "out/validation").glob("*.png"))
    assert grids == ["step-000000.png", f"step-{UPDATES:06d}.png"]
    assert torch.tensor(losses(tmp_path / "out")).isfinite().tolist() == [True]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("script", TORCH)
def test_two_processes(tokens, script, precision, tmp_path):
    launcher = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run = tokens(script, mixed_precision=precision, train_batch_size=1)
    program = [str(Path(__file__).with_name("no_waits.py")), str(SCRIPTS[script].path)]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *program, *run], capture_output=True, text=True, env=os.environ, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"2 x {torch.cuda.get_device_name()}" in result.stderr
    assert torch.tensor(losses(tmp_path / "out")).isfinite().tolist() == [True]
