"""Contract: what earlier versions of these scripts have saved resumes, bit for bit.

data/lora_checkpoint was written after two updates of the Stable Diffusion LoRA script, with --rank=1, at 2026-11-27.
"""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_script
from runs import rows
from safetensors.torch import load_file
from scripts import ADAPTERS
from torch.optim.optimizer import register_optimizer_step_pre_hook

STORED = Path(__file__).parent / "data" / "lora_checkpoint"


@pytest.fixture
def resume(command, tmp_path):
    """resume(updates, ...): the output folder of a run that goes on from the stored checkpoint to so many updates."""

    def run(updates: int, **changes) -> Path:
        out = tmp_path / f"until-{updates}"
        shutil.copytree(STORED, out / "checkpoint-2")
        options = {"rank": 1, "seed": None, "max_train_steps": updates, "resume_from_checkpoint": "latest"}
        load_script("sd_lora").main(command("sd_lora", output_dir=out, **options | changes))
        return out

    return run


def test_weights(resume):
    """A run that has no update left to make exports them as they are."""
    exported, stored = load_file(resume(2) / ADAPTERS), load_file(STORED / ADAPTERS)
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_optimizer_and_position(resume):
    before = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: before.append(copy.deepcopy(optimizer.state_dict())))
    try:
        out = resume(3)
    finally:
        hook.remove()
    (restored,), stored = before, torch.load(STORED / "optimizer.bin", weights_only=True)
    assert restored["state"].keys() == stored["state"].keys()
    for number, state in stored["state"].items():
        assert all(torch.equal(restored["state"][number][name], tensor) for name, tensor in state.items())
    assert [(row["step"], row["epoch"]) for row in rows(out)] == [(3, 1.0)]


def test_another_optimizer(resume):
    """The manifest of that time does not tell which it was."""
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    with pytest.raises(SystemExit) as stop:
        resume(3, use_8bit_adam=True)
    assert "the checkpoint was made with AdamW, and this run's optimizer is AdamW8bit" in stop.value.code
