"""Contract: a first stop signal ends the run after its step with a checkpoint, a second one at once.

The exit status is 128 + the signal, as a shell would report it.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from runs import checkpoints, interrupt, rows, wait_until

from t2i_training.model import ema


def read_rows(folder) -> list[dict]:
    return rows(folder) if (folder / "metrics.jsonl").exists() else []


@pytest.mark.parametrize(
    ("number", "status", "workers"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0), (signal.SIGUSR1, 138, 0)]
)
def test_signal_saves_and_exits(server, sd_flags, tmp_path, number, status, workers):
    out = tmp_path / "out"
    tokens = sd_flags(max_train_steps=10000, dataloader_num_workers=workers)
    run = server.start(tokens, tmp_path, whole_exit=True)
    wait_until(lambda: len(read_rows(out)) >= 3)
    run.kill(number)
    assert run.wait() == status
    (name,) = checkpoints(out)
    step = json.loads((out / name / "manifest.json").read_text())["step"]
    assert name == f"checkpoint-{step}"
    assert [row["step"] for row in rows(out)] == list(range(1, step + 1)), "the step was finished, and none begun"
    assert not (out / "model_index.json").exists(), "an unfinished run exports nothing"
    assert f"{number.name}: finishing the step and saving" in run.output()
    assert "Traceback" not in run.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signal_to_its_group_saves(server, sd_flags, tmp_path, number):
    """As Ctrl-C, systemd or a cluster's scheduler do it: loader workers get the signal as well."""
    out = tmp_path / "out"
    run = server.start(sd_flags(max_train_steps=10000, dataloader_num_workers=1), tmp_path)
    wait_until(lambda: len(read_rows(out)) >= 3)
    os.killpg(run.pids[0], number)
    assert run.wait() == 128 + number
    step = rows(out)[-1]["step"]
    assert checkpoints(out) == [f"checkpoint-{step}"]
    assert "Traceback" not in run.output()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_second_signal_aborts_at_once(server, sd_flags, tmp_path, number, workers):
    out = tmp_path / "out"
    tokens = sd_flags(train_batch_size=1, gradient_accumulation_steps=5000, dataloader_num_workers=workers)
    run = server.start(tokens, tmp_path, whole_exit=True)
    wait_until((out / "metrics.jsonl").exists)  # the first update begins; it would last for more than a minute
    time.sleep(0.5)
    run.kill(number)
    wait_until(lambda: "once more aborts" in run.output())
    time.sleep(1.2)  # sooner it would be taken for the first one, passed on by a launcher
    began = time.monotonic()
    run.kill(number)
    assert run.wait() == -number
    assert time.monotonic() - began < 30  # torch gives workers five seconds
    assert checkpoints(out) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_before_the_first_step(server, sd_flags, tmp_path, number, status):
    """Nothing is there to be saved yet: no step is taken, and the base model's images are not waited for."""
    out = tmp_path / "out"
    prompts = [f"image {i}" for i in range(50)]
    run = server.start(sd_flags(max_train_steps=10000, validation_prompts=prompts), tmp_path)
    wait_until((out / "run_config.yaml").exists)  # written when all is loaded
    run.kill(number)
    assert run.wait() == status
    assert not (out / "validation").exists()
    assert checkpoints(out) == []
    assert read_rows(out) == []
    assert "Traceback" not in run.output()


def test_signal_while_resuming(server, sd_flags, train, tmp_path):
    """The checkpoint stays what it was. The run before this one has let go of the folder, though its process lives."""
    out = train(max_train_steps=2, checkpointing_steps=2)
    before = (out / "checkpoint-2" / "manifest.json").read_bytes()
    (out / "run_config.yaml").unlink()
    run = server.start(sd_flags(max_train_steps=10000, resume_from_checkpoint="latest"), tmp_path)
    wait_until((out / "run_config.yaml").exists)
    run.kill(signal.SIGTERM)
    assert run.wait() == 143
    assert checkpoints(out)[0] == "checkpoint-2"
    assert (out / "checkpoint-2" / "manifest.json").read_bytes() == before


def test_signals_that_libraries_take_for_something_else(train, monkeypatch, tmp_path):
    """PyTorch's C++ makes an error of the exit, which is none of the checkpoint's; others pass over it."""
    train(max_train_steps=1, checkpointing_steps=1)

    def read(_file):
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise RuntimeError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    with monkeypatch.context() as patch:
        patch.setattr(ema, "safetensors", SimpleNamespace(torch=SimpleNamespace(load_file=read)))
        with pytest.raises(SystemExit) as stop:
            train(max_train_steps=2, resume_from_checkpoint="latest")
    assert stop.value.code == 143

    def open_dataset(args, seed):
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return opened(args, seed)

    script = load_script("sd")
    opened = script.open_dataset
    monkeypatch.setattr(script, "open_dataset", open_dataset)
    with pytest.raises(SystemExit) as stop:
        train(output_dir=tmp_path / "other")
    assert stop.value.code == 130
    assert read_rows(tmp_path / "other") == []
    with pytest.raises(SystemExit) as stop:
        train(max_train_steps=1, resume_from_checkpoint="latest")
    assert stop.value.code == 130, "nothing was left to do"


def test_signal_in_the_last_step_still_exports(train, tmp_path):
    """The run is complete, and says so by its status: nothing is left that a scheduler would have to start again."""
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "out"
    with interrupt(2, signal.SIGTERM, last=True):
        train(output_dir=out, max_train_steps=2, validation_prompts=["a cat"])
    assert checkpoints(out) == ["checkpoint-2"]
    assert (out / "validation" / "step-000002.png").exists()
    exported = StableDiffusionPipeline.from_pretrained(out).unet.state_dict()
    untouched = StableDiffusionPipeline.from_pretrained(train(output_dir=tmp_path / "other", max_train_steps=1)).unet
    assert not torch.equal(exported["conv_in.weight"], untouched.state_dict()["conv_in.weight"])


def test_signal_in_a_validation_ends_it(train, monkeypatch, caplog, tmp_path):
    """No further image is drawn and no update made; the resumed run draws it, and is as if nothing had been."""
    script = load_script("sd")
    changes = {"max_train_steps": 4, "validation_epochs": 1, "checkpointing_steps": 9, "validation_prompts": ["a", "b"]}
    undisturbed, drawn = train(output_dir=tmp_path / "other", **changes), []

    def draw(index, generate_image=script.generate_image, **options):
        drawn.append(index)
        if len(drawn) == 3:  # the first of the two after the first epoch; two were of the untouched model
            os.kill(os.getpid(), signal.SIGTERM)
        return generate_image(index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(script, "generate_image", draw)
        with pytest.raises(SystemExit) as stop:
            train(**changes)
    assert (stop.value.code, drawn) == (143, [0, 1, 0])
    assert checkpoints(tmp_path / "out") == ["checkpoint-3"]
    assert "validation at step 3: stopped after 1 of 2 images, none kept" in caplog.text
    assert not list((tmp_path / "out" / "validation").glob("*3*"))
    out = train(**changes, resume_from_checkpoint="latest")
    names = ["step-000000", "step-000000.png", "step-000003", "step-000003.png", "step-000004", "step-000004.png"]
    assert sorted(path.name for path in (out / "validation").iterdir()) == names
    for name in names[1::2]:
        assert (out / "validation" / name).read_bytes() == (undisturbed / "validation" / name).read_bytes()


@pytest.mark.parametrize("place", ["export_atomically", "write_card"])
def test_signal_after_the_last_update_lets_the_run_end(train, monkeypatch, caplog, tmp_path, place):
    from t2i_training.report import hub

    module = load_script("sd") if place == "export_atomically" else hub
    original = getattr(module, place)

    def signalled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(module, place, signalled)
    out = train(max_train_steps=1)
    assert (out / "model_index.json").exists()
    assert (out / "README.md").exists()
    assert "SIGTERM: all updates are made, finishing the rest; once more aborts" in caplog.text


def test_signals_are_handed_back(train, tmp_path):
    """After a run, finished or interrupted, the caller's process answers Ctrl-C as Python does."""
    train(output_dir=tmp_path / "out", max_train_steps=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with interrupt(1, signal.SIGINT):
        train(output_dir=tmp_path / "other")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_worker_outlives_an_interrupted_run(train, tmp_path):
    """Even where the caller keeps the exception, whose traceback keeps the loader."""
    with interrupt(1):
        train(output_dir=tmp_path / "out", dataloader_num_workers=2)
    gc.collect()
    wait_until(lambda: not multiprocessing.active_children())
