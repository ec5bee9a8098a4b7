"""Contract: where memory runs out in the middle of a run, no update that was made is lost."""

import contextlib

import psutil
import pytest
import torch
from conftest import load_script
from runs import outcome
from scripts import SCRIPTS, TORCH
from torch.optim.optimizer import register_optimizer_step_post_hook

from t2i_training.cli import out_of_memory
from t2i_training.model import ema
from t2i_training.run import checkpoint

CONTINUED = "; --resume_from_checkpoint=latest continues from the last checkpoint ("


@contextlib.contextmanager
def runs_out(module, name: str, call: int):
    """Inside, memory runs out in that call of a module's function, counted from 1."""
    function, calls = getattr(module, name), []

    def spoilt(*args, **options):
        counting_flops = args and callable(args[0]) and not isinstance(args[0], torch.nn.Module)
        calls.extend([] if counting_flops else [1])
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, spoilt)
        yield


def ending(script: str, tokens: list[str]) -> str:
    with pytest.raises(torch.OutOfMemoryError) as error:
        load_script(script).main(tokens)
    return out_of_memory.line(error.value)


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


@pytest.mark.parametrize("script", TORCH)
def test_in_a_step(script, command, tmp_path):
    """In the second half of the third update: what the first two have trained is saved, and the run goes on."""
    module, facts = load_script(script), SCRIPTS[script]
    options = {"max_train_steps": 4, "checkpointing_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 3}
    options |= facts.resumed | {"train_batch_size": 1}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    module.main(command(script, output_dir=whole, **options))
    with runs_out(module, "compute_loss", 6):
        line = ending(script, command(script, output_dir=pieces, **options))
    assert line.startswith("out of memory, step 3: ")
    assert CONTINUED in line
    assert checkpoints(pieces) == ["checkpoint-2"]
    module.main(command(script, output_dir=pieces, resume_from_checkpoint="latest", **options))
    assert outcome(pieces, 4, facts.trained, facts.tensors) == outcome(whole, 4, facts.trained, facts.tensors)


def test_in_the_first_step(command, tmp_path):
    """Nothing has been trained, and nothing is saved."""
    with runs_out(load_script("sd_lora"), "compute_loss", 1):
        line = ending("sd_lora", command("sd_lora", output_dir=tmp_path / "out"))
    assert line.startswith("out of memory, step 1: ")
    assert CONTINUED not in line
    assert checkpoints(tmp_path / "out") == []


def test_while_the_weights_change(command, tmp_path):
    """Between optimizer and average the third update is half made: the last regular checkpoint stays the last."""
    tokens = command("sd", output_dir=tmp_path / "out", use_ema=True, checkpointing_steps=1, max_train_steps=3)
    with runs_out(ema, "update", 3):
        assert ending("sd", tokens).startswith("out of memory, step 3: ")
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]
    assert checkpoint.verify(tmp_path / "out" / "checkpoint-2") is None


def test_while_images_are_drawn(command, tmp_path):
    """After the first epoch, when the optimizer has its state. They are drawn when the run goes on."""
    options = {"validation_prompt": "a cat", "num_validation_images": 1, "validation_epochs": 1}
    options |= {"max_train_steps": 4, "checkpointing_steps": 4}
    module, whole, pieces = load_script("sd_lora"), tmp_path / "whole", tmp_path / "pieces"
    module.main(command("sd_lora", output_dir=whole, **options))
    with runs_out(module, "generate_image", 2):
        line = ending("sd_lora", command("sd_lora", output_dir=pieces, **options))
    assert line.startswith("out of memory, generating validation images: lower --resolution, or leave --validation_pro")
    assert CONTINUED in line
    assert checkpoints(pieces) == ["checkpoint-3"]
    module.main(command("sd_lora", output_dir=pieces, resume_from_checkpoint="latest", **options))
    facts = SCRIPTS["sd_lora"]
    assert outcome(pieces, 4, facts.trained, facts.tensors) == outcome(whole, 4, facts.trained, facts.tensors)
    assert (pieces / "validation" / "step-000003.png").read_bytes() == (
        whole / "validation" / "step-000003.png"
    ).read_bytes()


def test_loader_worker_that_is_killed(command, tmp_path):
    """As the kernel does when host memory runs out."""
    tokens = command("sd_lora", output_dir=tmp_path / "out", dataloader_num_workers=1, max_train_steps=50)
    steps, this = [], psutil.Process()

    def kill(*_):
        steps.append(1)
        if len(steps) == 3:
            forked = [child for child in this.children() if child.cmdline() == this.cmdline()]
            max(forked, key=lambda child: child.create_time()).kill()

    hook = register_optimizer_step_post_hook(kill)
    try:
        with pytest.raises(RuntimeError) as error:
            load_script("sd_lora").main(tokens)
    finally:
        hook.remove()
    line = out_of_memory.line(error.value)
    assert line.startswith("out of memory, host memory, step ")
    assert (
        ": lower --dataloader_num_workers, or give the container more memory; --resume_from_checkpoint=latest" in line
    )
    saved = checkpoints(tmp_path / "out")
    assert saved in ([f"checkpoint-{step}"] for step in range(2, len(steps) + 1))
    assert checkpoint.verify(tmp_path / "out" / saved[0]) is None


def test_not_even_enough_to_save(command, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise RuntimeError("CUDA out of memory, again")

    monkeypatch.setattr(checkpoint.CheckpointManager, "save", full)
    with runs_out(load_script("sd_lora"), "compute_loss", 3):
        line = ending("sd_lora", command("sd_lora", output_dir=tmp_path / "out"))
    assert "Tried to allocate 2.00 GiB" in line
    assert "what was trained since the last checkpoint cannot be saved: CUDA out of memory, again" in caplog.messages
