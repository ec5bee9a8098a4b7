"""What only a CUDA device shows of a run: its loss scaler, its memory, and workers forked when it was in use."""

import contextlib
import gc
import itertools
import json

import psutil
import pytest
import torch
from conftest import load_script
from runs import interrupt, rows
from safetensors.torch import load_file
from scripts import SCRIPTS

from t2i_training.cli import out_of_memory
from t2i_training.model import networks
from t2i_training.run import checkpoint

pytestmark = pytest.mark.gpu


def run(command, script: str, folder, **changes):
    load_script(script).main(command(script, output_dir=folder, **changes))
    return folder


def scaler(folder, step: int) -> dict:
    return torch.load(folder / f"checkpoint-{step}" / "scaler.pt", weights_only=True)


@pytest.fixture
def overflow_at(monkeypatch):
    """overflow_at(script, update): the gradient of that update, counted from 1, is infinite, and its loss is not."""

    def spoil(script: str, update: int) -> None:
        module, calls = load_script(script), []
        compute_loss = module.compute_loss

        def spoilt(network, *args, **options):
            loss = compute_loss(network, *args, **options)
            if not isinstance(network, torch.nn.Module):  # FLOPs are counted
                return loss
            calls.append(1)
            trained = next(parameter for parameter in network.parameters() if parameter.requires_grad)
            # In fp32, which the scale of 65536 makes infinite.
            return loss + ((trained - trained.detach()) * 1e38).sum() if len(calls) == update else loss

        monkeypatch.setattr(module, "compute_loss", spoilt)

    return spoil


@pytest.mark.parametrize("script", ["sd", "sd_lora"])
def test_update_that_the_loss_scaler_skips(command, overflow_at, script, tmp_path):
    """It counts as a step, of schedule and average too; weights and moments stay as they are; the scale is halved."""
    average = {"use_ema": True} if script == "sd" else {}
    options = {"mixed_precision": "fp16", "checkpointing_steps": 1, "lr_scheduler": "linear", **average}
    overflow_at(script, 3)
    folder = run(command, script, tmp_path / "out", **options)
    weights = [load_file(folder / f"checkpoint-{step}" / SCRIPTS[script].trained) for step in (1, 2, 3, 4)]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert same == [False, True, False]
    assert all(tensor.isfinite().all() for tensor in weights[3].values())
    found = rows(folder)
    assert [row["grad_norm"] is None for row in found] == [False, False, True, False]
    rate = 1e-3 if script == "sd" else 1e-2
    assert [row["lr"] for row in found] == pytest.approx([rate, rate * 0.75, rate * 0.5, rate * 0.25])
    assert [scaler(folder, step)["scale"] for step in (2, 3, 4)] == [65536.0, 32768.0, 32768.0]
    state = torch.load(folder / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in state.values()} == {3.0}
    assert all(entry["exp_avg"].isfinite().all() for entry in state.values())
    if average:
        counters = json.loads((folder / "checkpoint-4" / "unet_ema" / "config.json").read_text())
        assert counters["optimization_step"] == 4
        averaged = load_file(folder / "checkpoint-4" / "unet_ema" / "diffusion_pytorch_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in averaged.values())


def test_gradients_are_clipped_after_the_scale_is_taken_out(command, tmp_path):
    """The norm that is reported, and Adam's first moment, a tenth of the gradient that was clipped to 1e-3."""
    options = {"max_train_steps": 1, "checkpointing_steps": 1, "max_grad_norm": 1e-3}
    norms = []
    for precision in ("fp16", "no"):
        folder = run(command, "sd", tmp_path / precision, mixed_precision=precision, **options)
        norms.append(rows(folder)[0]["grad_norm"])
        state = torch.load(folder / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"]
        moments = torch.stack([entry["exp_avg"].norm() for entry in state.values()])
        assert float(moments.norm()) == pytest.approx(1e-4, rel=1e-2)
    assert norms[0] == pytest.approx(norms[1], rel=5e-2)


def test_scale_is_restored(command, overflow_at, tmp_path):
    overflow_at("prior", 1)
    options = {"mixed_precision": "fp16", "checkpointing_steps": 2}
    run(command, "prior", tmp_path / "out", max_train_steps=2, **options)
    run(command, "prior", tmp_path / "out", max_train_steps=4, resume_from_checkpoint="latest", **options)
    skipped = [row["grad_norm"] is None for row in rows(tmp_path / "out")]  # a device may need more than the first
    assert skipped[0]
    assert not all(skipped)
    assert scaler(tmp_path / "out", 2)["scale"] == 65536 / 2 ** sum(skipped[:2])
    assert scaler(tmp_path / "out", 4)["scale"] == 65536 / 2 ** sum(skipped)
    assert scaler(tmp_path / "out", 4)["_growth_tracker"] == skipped[::-1].index(True)


DRAWING = {
    "sd": {"validation_prompts": "a cat", "use_ema": True}, "sd_lora": {"validation_prompt": "a cat"},
    "decoder": {"validation_prompts": "a cat", "use_ema": True}, "prior_lora": {"validation_prompt": "a cat"},
}  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("script", DRAWING)
def test_validation_leaves_nothing_on_the_device(command, script, cached, tmp_path, monkeypatch):
    lend, seen = networks.on_device, []

    def allocated():
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB and more, which the first product of a process leaves there
        return torch.cuda.memory_allocated()

    @contextlib.contextmanager
    def measured(*args):
        before = allocated()
        with lend(*args):
            yield
        seen.append((before, allocated()))

    monkeypatch.setattr(networks, "on_device", measured)
    options = {"validation_epochs": 1, "max_train_steps": 4, "cache_encodings": cached, "mixed_precision": "bf16"}
    run(command, script, tmp_path / "out", **options | DRAWING[script])
    assert len(seen) == 3
    assert all(after <= before for before, after in seen), seen


def test_memory_runs_out_in_the_middle_of_a_step(command, tmp_path, monkeypatch):
    """What was saved stays, and the run goes on from there as if nothing had been."""
    module = load_script("sd")
    compute_loss, calls = module.compute_loss, []

    def too_much(network, *args, **options):
        calls.extend([1] * isinstance(network, torch.nn.Module))  # not where FLOPs are counted
        loss = compute_loss(network, *args, **options)
        return loss + torch.empty(2**44, device="cuda").sum() if len(calls) == 4 else loss

    options = {"checkpointing_steps": 2, "max_train_steps": 4}
    with monkeypatch.context() as patch:
        patch.setattr(module, "compute_loss", too_much)
        with pytest.raises(torch.OutOfMemoryError) as error:
            run(command, "sd", tmp_path / "out", **options)
    line = out_of_memory.line(error.value)
    way_out = "--train_batch_size=1 with --gradient_accumulation_steps=2 saves 50% of the activations"
    assert line.startswith(f"out of memory, step 4: --gradient_checkpointing saves most of the activations, {way_out}")
    assert "; --resume_from_checkpoint=latest continues from the last checkpoint (OutOfMemoryError: CUDA" in line
    assert checkpoint.verify(tmp_path / "out" / "checkpoint-2") is None
    run(command, "sd", tmp_path / "out", resume_from_checkpoint="latest", **options)
    whole = run(command, "sd", tmp_path / "whole", **options)
    losses = [[row["loss"] for row in rows(folder)] for folder in (tmp_path / "out", whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_stop_with_workers_that_were_forked_beside_the_device(command, cached, tmp_path):
    """Two workers, forked with the networks on the device, batches pinned by a thread: a signal ends all of them."""
    options = {"dataloader_num_workers": 2, "max_train_steps": 6, "checkpointing_steps": 100, "cache_encodings": cached}
    with interrupt(3):
        run(command, "sd", tmp_path / "out", **options)
    gc.collect()  # the exit that ended the run holds its frames
    this = psutil.Process()
    assert [child for child in this.children() if child.cmdline() in ([], this.cmdline())] == []  # zombies have none
    run(command, "sd", tmp_path / "out", resume_from_checkpoint="latest", **options)
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
