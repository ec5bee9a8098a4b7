"""Contract: interrupted at any moment and resumed, the same command leaves what it leaves uninterrupted, bit for bit.

Weights, averaged weights and their counters, optimizer state, position, exported pipeline, rows of metrics.jsonl.
"""

import json
import shutil
import signal

import pytest
import torch
from conftest import flags, load_script, short_run
from runs import checkpoints, interrupt, outcome, rows, wait_until
from scripts import SCRIPTS

from t2i_training.run import lifecycle

# Six images: epochs end inside batches, and most updates below stand in the middle of an epoch.
SCENARIOS = {  # of three updates each
    "constant rate": {"max_train_steps": 3, "use_ema": True},
    "cosine over epochs, accumulation, workers, offloaded average": {
        "max_train_steps": None, "num_train_epochs": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        "gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "use_ema": True, "offload_ema": True,
    },
    "linear over epochs, fused average, Min-SNR, DREAM": {
        "max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 4, "lr_scheduler": "linear",
        "dataloader_num_workers": 1, "use_ema": True, "foreach_ema": True, "snr_gamma": 5.0, "dream_training": True,
    },
    "no average, three single samples accumulated": {
        "max_train_steps": 3, "train_batch_size": 1, "gradient_accumulation_steps": 3, "lr_scheduler": "polynomial",
    },
}  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_interrupted_after_every_update(train, tmp_path, scenario):
    options = {"checkpointing_steps": 3, **SCRIPTS["sd"].draws, **SCENARIOS[scenario]}
    whole = train(output_dir=tmp_path / "whole", **options)
    pieces = tmp_path / "pieces"
    for update in (1, 2, 3):  # the last signal comes in the last update: that run exports, too
        with interrupt(1, signal.SIGINT if update % 2 else signal.SIGTERM, last=update == 3):
            train(output_dir=pieces, resume_from_checkpoint="latest", **options)
        assert f"checkpoint-{update}" in checkpoints(pieces)
        assert len(rows(pieces)) == update
    assert [row["step"] for row in rows(whole)] == [1, 2, 3]
    assert outcome(pieces, 3) == outcome(whole, 3)


SLOW = pytest.mark.slow("a second each: the other update of that interval is by default")


@pytest.mark.parametrize("update", [pytest.param(1, marks=SLOW), 2, 4, pytest.param(5, marks=SLOW)])
def test_interrupted_inside_a_logging_interval(train, finished, tmp_path, update):
    """An interval that a run began and another one ended is reported as one."""
    options = {"max_train_steps": 6, "checkpointing_steps": 6, "logging_steps": 3, "train_batch_size": 4}
    whole = finished("sd", **options)
    assert [row["step"] for row in rows(whole)] == [3, 6]
    with interrupt(update):
        train(output_dir=tmp_path / "pieces", **options)
    train(output_dir=tmp_path / "pieces", resume_from_checkpoint="latest", **options)
    assert outcome(tmp_path / "pieces", 6) == outcome(whole, 6)


def test_metrics_after_the_checkpoint_are_taken_back(train, tmp_path):
    """Updates that a resumed run repeats stand in metrics.jsonl once; a line that a crash cut short is dropped."""
    options = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(output_dir=tmp_path / "whole", **options)
    pieces = shutil.copytree(whole, tmp_path / "pieces")
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    train(output_dir=pieces, resume_from_checkpoint="checkpoint-2", **options)
    assert outcome(pieces, 4) == outcome(whole, 4)


def test_resume_from_a_name(train, tmp_path):
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "use_ema": True, **SCRIPTS["sd"].draws}
    whole = train(output_dir=tmp_path / "whole", **options)
    pieces = shutil.copytree(whole, tmp_path / "pieces")
    shutil.rmtree(pieces / "checkpoint-6")
    train(output_dir=pieces, resume_from_checkpoint="checkpoint-2", **options)
    assert outcome(pieces, 6) == outcome(whole, 6)


def test_resume_from_a_path_elsewhere(train, tmp_path):
    """An absolute path outside the output folder, under any name."""
    options = {"max_train_steps": 6, "checkpointing_steps": 3, "use_ema": True, **SCRIPTS["sd"].draws}
    whole = train(output_dir=tmp_path / "whole", **options)
    elsewhere = shutil.copytree(whole / "checkpoint-3", tmp_path / "elsewhere" / "the good one")
    pieces = train(output_dir=tmp_path / "pieces", resume_from_checkpoint=str(elsewhere), **options)
    expected = outcome(whole, 6) | {"rows": rows(whole)[3:]}
    assert outcome(pieces, 6) == expected
    assert checkpoints(pieces) == ["checkpoint-6"]
    assert (elsewhere / "manifest.json").is_file()


def test_resume_after_the_end(train, tmp_path):
    """Nothing is left to train: the pipeline is exported again, equal."""
    options = {"max_train_steps": 2, "checkpointing_steps": 2, "use_ema": True}
    folder = train(output_dir=tmp_path / "out", **options)
    expected = outcome(folder, 2)
    shutil.rmtree(folder / "unet")
    train(output_dir=folder, resume_from_checkpoint="latest", **options)
    assert outcome(folder, 2) == expected


def test_drawn_seed_survives(train, tmp_path):
    """Without --seed one is drawn; the checkpoint keeps it."""
    options = {"max_train_steps": 4, "checkpointing_steps": 4, **SCRIPTS["sd"].draws}
    pieces = tmp_path / "pieces"
    with interrupt(2):
        train(output_dir=pieces, seed=None, **options)
    seed = json.loads((pieces / "checkpoint-2" / "manifest.json").read_text())["seed"]
    assert isinstance(seed, int)
    train(output_dir=pieces, seed=None, resume_from_checkpoint="latest", **options)
    whole = train(output_dir=tmp_path / "whole", seed=seed, **options)
    assert outcome(pieces, 4) == outcome(whole, 4)
    other = train(output_dir=tmp_path / "other", seed=None, **options)
    assert rows(other) != rows(whole), "a seed drawn anew"


def test_loss_scaling_begins_where_a_checkpoint_has_none(train, monkeypatch):
    """As in a run in bf16 that goes on in fp16."""
    train(max_train_steps=2, checkpointing_steps=2)
    start = lifecycle.start

    def start_scaled(args):
        accelerator = start(args)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(lifecycle, "start", start_scaled)
    for steps in (4, 6):
        folder = train(max_train_steps=steps, checkpointing_steps=steps, resume_from_checkpoint="latest")
        scaler = torch.load(folder / f"checkpoint-{steps}" / "scaler.pt", weights_only=True)
        assert scaler["_growth_tracker"] == steps - 2


def test_another_seed_is_refused(train, tmp_path):
    folder = train(output_dir=tmp_path / "out", max_train_steps=2, checkpointing_steps=2, seed=3)
    with pytest.raises(SystemExit) as error:
        train(output_dir=folder, max_train_steps=4, seed=4, resume_from_checkpoint="latest")
    assert error.value.code == "error: --seed 4 differs from the checkpoint's, 3: leave it out to continue"


def test_longer_run_continues(train, tmp_path):
    """A finished run goes on with a larger --max_train_steps, as if that had been asked for at first."""
    whole = train(output_dir=tmp_path / "whole", max_train_steps=6, checkpointing_steps=3, use_ema=True)
    train(output_dir=tmp_path / "pieces", max_train_steps=3, checkpointing_steps=3, use_ema=True)
    train(
        output_dir=tmp_path / "pieces", max_train_steps=6, checkpointing_steps=3, use_ema=True,
        resume_from_checkpoint="latest",
    )  # fmt: skip
    assert outcome(tmp_path / "pieces", 6) == outcome(whole, 6)


KILL_WHEN = {  # glob in the output folder -> a moment inside a save
    ".checkpoint-*.partial": "the folder was made",
    ".checkpoint-*.partial/optimizer.bin": "the optimizer is being written",
    ".checkpoint-*.partial/manifest.json": "the manifest is there, the name is not",
    ".checkpoint-*.removed": "an old one is being removed",
}


KILLED = {"use_ema": True, **SCRIPTS["sd"].draws, "max_train_steps": 12}


@pytest.fixture(scope="module")
def whole(model, pictures, tmp_path_factory):
    """An uninterrupted run of twelve updates, to be compared with those that are killed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    load_script("sd").main(flags(**short_run(model, pictures, folder) | KILLED, checkpointing_steps=12))
    return folder


@pytest.mark.parametrize("moment", KILL_WHEN)
def test_killed_during_a_save(train, sd_flags, server, whole, tmp_path, moment):
    """SIGKILL leaves nothing half-made under a checkpoint's name, and the run continues from the one before."""
    out = tmp_path / "out"
    options = {**KILLED, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    killed_inside = False
    while not killed_inside:  # the moment is short: a run that outran its killer is no evidence, and is repeated
        shutil.rmtree(out, ignore_errors=True)
        run = server.start(sd_flags(**options), tmp_path)
        wait_until((out / "checkpoint-4").is_dir)
        wait_until(lambda: list(out.glob(moment)))
        run.kill(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        killed_inside = list(out.glob(".checkpoint-*"))
    assert not (out / "model_index.json").exists()
    train(**options)
    assert checkpoints(out) == ["checkpoint-11", "checkpoint-12"], "and no leftovers"
    assert outcome(out, 12) == outcome(whole, 12)
