"""Contract, for every script but the first: interrupted and resumed, a run leaves what it leaves uninterrupted.

Bit for bit: weights or adapters, averages, optimizer state, position, export, rows of metrics.jsonl.
"""

import signal

import pytest
from conftest import load_script
from runs import checkpoints, interrupt, outcome, rows
from scripts import ADAPTERS, SCRIPTS, TORCH

# Six images, two times two an update: the first and the third of three updates end in the middle of an epoch.
RUN = {
    "max_train_steps": 3, "checkpointing_steps": 3, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
}  # fmt: skip


@pytest.fixture(params=list(TORCH)[1:])
def script(request):
    return request.param


@pytest.fixture
def train(command, script):
    """train(output_dir, **changes): a run of the script in this process; returns its output folder."""

    def run(output_dir, **changes):
        load_script(script).main(command(script, output_dir=output_dir, **RUN | SCRIPTS[script].draws | changes))
        return output_dir

    return run


def test_interrupted_after_every_update(train, script, tmp_path):
    known, options = SCRIPTS[script], SCRIPTS[script].resumed
    whole = train(tmp_path / "whole", **options)
    pieces = tmp_path / "pieces"
    for update in (1, 2, 3):  # the last signal comes in the last update: that run exports, too
        with interrupt(1, signal.SIGINT if update % 2 else signal.SIGTERM, last=update == 3):
            train(pieces, resume_from_checkpoint="latest", **options)
        assert f"checkpoint-{update}" in checkpoints(pieces)
        assert len(rows(pieces)) == update
    assert [row["epoch"] for row in rows(whole)] == [0.6667, 1.3333, 2.0]
    assert outcome(pieces, 3, known.trained, known.tensors) == outcome(whole, 3, known.trained, known.tensors)


def test_interrupted_mid_epoch_with_loader_workers(train, script, tmp_path):
    """Resumed with none, from a checkpoint by name, and with a seed that was drawn."""
    known, options = SCRIPTS[script], SCRIPTS[script].resumed
    with interrupt(1):
        train(tmp_path / "pieces", seed=None, dataloader_num_workers=1, **options)
    train(tmp_path / "pieces", seed=None, resume_from_checkpoint="checkpoint-1", **options)
    pieces = outcome(tmp_path / "pieces", 3, known.trained, known.tensors)
    whole = train(tmp_path / "whole", seed=pieces["manifest"]["seed"], **options)
    assert pieces == outcome(whole, 3, known.trained, known.tensors)


@pytest.mark.parametrize("script", ["prior", "decoder_lora"], indirect=True)
def test_another_seed_is_another_run(train, script, tmp_path):
    """So that the tests above can fail."""
    folders = [train(tmp_path / str(seed), seed=seed) for seed in (3, 4)]
    outcomes = [outcome(folder, 3, SCRIPTS[script].trained, 10) for folder in folders]
    assert outcomes[0]["rows"] != outcomes[1]["rows"]
    assert outcomes[0]["files"] != outcomes[1]["files"]
    assert outcomes[0]["export"] != outcomes[1]["export"]
    assert (ADAPTERS in outcomes[0]["export"]) is SCRIPTS[script].is_lora
