"""Contract: a run depends on its effective batch, not on how processes, accumulation and loader workers share it."""

import json
import signal

import pytest
import torch
from conftest import flags, launch, load_script, short_run
from runs import LARGE_EPSILON, LOSS, WEIGHT, interrupt, outcome, rows, wait_until, weights
from scripts import SCRIPTS

# Six images and an effective batch of four: two of five updates cross the border of an epoch.
RUN = {**SCRIPTS["sd"].draws, "use_ema": True, "max_train_steps": 5, "checkpointing_steps": 5, "scale_lr": True,
       "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "train_batch_size": 4,
       **LARGE_EPSILON}  # fmt: skip
TWO_PROCESSES = {**RUN, "train_batch_size": 2}


def assert_close(folder, expected):
    """The sequence of losses, gradient norms and rates; weights, their average and its counters after the last step."""
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(expected)]
    for row, wanted in zip(rows(folder), rows(expected), strict=True):
        assert row == pytest.approx(wanted, **LOSS)
        assert (row["lr"], row["epoch"]) == (wanted["lr"], wanted["epoch"])
    for part in ("checkpoint-5/unet", "checkpoint-5/unet_ema", "unet"):
        torch.testing.assert_close(weights(folder, part), weights(expected, part), **WEIGHT)
        assert (folder / part / "config.json").read_bytes() == (expected / part / "config.json").read_bytes()
    positions = [json.loads((run / "checkpoint-5" / "manifest.json").read_text()) for run in (folder, expected)]
    for name in ("step", "samples_seen", "seed", "effective_batch", "dataset_size"):
        assert positions[0][name] == positions[1][name]


@pytest.fixture(scope="module")
def whole(model, pictures, tmp_path_factory):
    """One process, one batch of four."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    load_script("sd").main(flags(**short_run(model, pictures, folder) | RUN))
    return folder


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation(train, whole, batch, accumulation):
    folder = train(**RUN | {"train_batch_size": batch, "gradient_accumulation_steps": accumulation})
    assert_close(folder, whole)


def test_two_processes(sd_flags, whole, server, tmp_path):
    run = server.start(sd_flags(**TWO_PROCESSES), tmp_path, processes=2, count_flops=True)
    assert run.wait_for_all() == [0, 0], run.output()
    assert_close(tmp_path / "out", whole)


@pytest.mark.slow("26 s, three interpreters: test_two_processes is the same without the launcher itself")
def test_two_processes_of_torchrun(sd_flags, whole, tmp_path):
    run = launch("sd", sd_flags(**TWO_PROCESSES), processes=2, timeout=120)
    assert run.returncode == 0, run.stderr
    assert_close(tmp_path / "out", whole)


def test_two_processes_with_all_that_ddp_could_stumble_over(sd_flags, train, server, tmp_path):
    """DREAM's first pass without gradients, blocks that are computed again, micro-batches that are not synchronised."""
    options = RUN | {"dream_training": True, "gradient_checkpointing": True, "scale_lr": None}
    one = train(**options, output_dir=tmp_path / "one")
    options |= {"train_batch_size": 1, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "two"}
    run = server.start(sd_flags(**options), tmp_path, processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    assert_close(tmp_path / "two", one)


def test_two_processes_interrupted_then_one(sd_flags, train, server, tmp_path):
    """A scheduler's SIGTERM reaches both of them. One process continues, with accumulation."""
    out = tmp_path / "out"
    endless = {"max_train_steps": 10000, "checkpointing_steps": 10000, "lr_scheduler": "constant_with_warmup"}
    options = TWO_PROCESSES | endless
    run = server.start(sd_flags(**options), tmp_path, processes=2)
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(rows(out)) >= 2)
    run.kill(signal.SIGTERM)
    assert run.wait_for_all() == [143, 143]
    (checkpoint,) = out.glob("checkpoint-*")
    step = json.loads((checkpoint / "manifest.json").read_text())["step"]
    assert len(rows(out)) == step, run.output()
    options |= {"max_train_steps": step + 2, "gradient_accumulation_steps": 2}
    train(**options, resume_from_checkpoint="latest")
    expected = train(**options, output_dir=tmp_path / "expected")
    losses = [[row["loss"] for row in rows(folder)] for folder in (out, expected)]
    assert losses[0][:4] == pytest.approx(losses[1][:4], **LOSS)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "further on, rounding has had time to grow"


@pytest.mark.parametrize("workers", [1, 3])
def test_workers(train, workers, tmp_path):
    """Bit for bit."""
    outcomes = []
    for count in (0, workers):
        folder = train(output_dir=tmp_path / str(count), dataloader_num_workers=count, **RUN | {"train_batch_size": 2})
        outcomes.append(outcome(folder, 5))
    assert outcomes[0] == outcomes[1]


def test_workers_may_change_at_resume(train, tmp_path):
    options = RUN | {"train_batch_size": 4}
    whole = train(output_dir=tmp_path / "whole", **options)
    with interrupt(2):
        train(output_dir=tmp_path / "pieces", dataloader_num_workers=2, **options)
    train(output_dir=tmp_path / "pieces", dataloader_num_workers=0, resume_from_checkpoint="latest", **options)
    assert outcome(tmp_path / "pieces", 5) == outcome(whole, 5)


def test_scale_lr_counts_the_effective_batch(train, whole):
    """1e-4 x 4 at its peak, after a warm-up of two updates; without the flag 1e-4, whatever the batch."""
    assert [row["lr"] for row in rows(whole)][:3] == pytest.approx([0, 2e-4, 4e-4])
    folder = train(train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-4, max_train_steps=1)
    assert [row["lr"] for row in rows(folder)] == [1e-4]


def test_another_effective_batch_is_another_run(train, whole):
    """So that the tests above can fail."""
    folder = train(**RUN | {"train_batch_size": 2, "learning_rate": 2e-4, "max_train_steps": 1})
    assert rows(folder)[0]["loss"] != pytest.approx(rows(whole)[0]["loss"], rel=1e-3)
