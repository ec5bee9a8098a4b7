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
from runs import ALL_DRAWS
from tiny import SCRIPTS

SNR = {"snr_gamma": 5.0}
FLAGS = {  # script -> flags that add to its step
    "sd": {**ALL_DRAWS, **SNR, "use_ema": True, "dream_training": True, "gradient_accumulation_steps": 2},
    "sd_lora": {**ALL_DRAWS, **SNR, "dream_training": True},
    "prior": {**SNR, "use_ema": True, "caption_dropout": 0.5, "gradient_accumulation_steps": 2},
    "prior_lora": {**SNR, "caption_dropout": 0.5},
    "decoder": {**SNR, "use_ema": True, "image_embeds_dropout": 0.5, "gradient_accumulation_steps": 2},
    "decoder_lora": {**SNR, "image_embeds_dropout": 0.5},
}  # fmt: skip


@pytest.fixture
def tokens(command, tmp_path):
    """tokens(script, **changes): of a run of UPDATES updates with everything that adds to its step, and a report."""

    def make(script, **changes):
        run = {"max_train_steps": UPDATES, "logging_steps": 100, "dataloader_num_workers": 1}
        return command(script, output_dir=tmp_path / "out", **FLAGS[script] | run | changes)

    return make


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("script", SCRIPTS)
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
@pytest.mark.parametrize("script", SCRIPTS)
def test_cached_and_validated(tokens, script, precision, tmp_path):
    prompts = "validation_prompt" if script.endswith("_lora") else "validation_prompts"
    run = {"mixed_precision": precision, "cache_encodings": True, prompts: "picture 1", "validation_epochs": 100}
    with host_never_waits():  # which they may before the first update and after the last, where pictures are drawn
        load_script(script).main(tokens(script, **run))
    grids = sorted(path.name for path in (tmp_path / "out/validation").glob("*.png"))
    assert grids == ["step-000000.png", f"step-{UPDATES:06d}.png"]
    assert torch.tensor(losses(tmp_path / "out")).isfinite().tolist() == [True]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes(tokens, script, precision, tmp_path):
    launcher = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run = tokens(script, mixed_precision=precision, train_batch_size=1)
    program = [str(Path(__file__).with_name("no_waits.py")), str(SCRIPTS[script])]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *program, *run], capture_output=True, text=True, env=os.environ, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 x cuda" in result.stderr
    assert torch.tensor(losses(tmp_path / "out")).isfinite().tolist() == [True]
