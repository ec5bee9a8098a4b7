"""Contract, for every script but the first: a run depends on its effective batch, not on how it is shared."""

import json

import pytest
import torch
from runs import LARGE_EPSILON, assert_alike, rows
from safetensors.torch import load_file
from scripts import SCRIPTS, TORCH

# Six images and an effective batch of four: the second update crosses the border of an epoch.
RUN = {"max_train_steps": 3, "checkpointing_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
       "learning_rate": 1e-4, **LARGE_EPSILON}  # fmt: skip


@pytest.fixture
def whole(finished):
    """whole(script): output folder of one process that takes one batch of four."""
    return lambda script: finished(script, train_batch_size=4, **RUN | SCRIPTS[script].draws)


def assert_close(folder, expected, script):
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    trained = SCRIPTS[script].trained
    assert_alike(folder, expected, trained, f"checkpoint-3/{trained}")
    positions = [json.loads((run / "checkpoint-3" / "manifest.json").read_text()) for run in (folder, expected)]
    for name in ("step", "samples_seen", "seed", "effective_batch"):
        assert positions[0][name] == positions[1][name]


SLOW = pytest.mark.slow("a second each: two times two is accumulated as four times one is")


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), pytest.param(1, 4, marks=SLOW)])
@pytest.mark.parametrize("script", list(TORCH)[1:])
def test_accumulation(finished, whole, script, batch, accumulation):
    """One batch of four, two times two, and four times one; but not once two."""
    sizes = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert_close(finished(script, **sizes, **RUN | SCRIPTS[script].draws), whole(script), script)
    other = finished(script, train_batch_size=2, **RUN | SCRIPTS[script].draws | {"max_train_steps": 1})
    assert rows(other)[0]["loss"] != pytest.approx(rows(whole(script))[0]["loss"], rel=1e-3)


DRIVER = """
import os, sys
import torch
from conftest import load_script
from torch.optim.optimizer import register_optimizer_step_post_hook

def keep(optimizer, _args, _kwargs):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    buckets = {{p.grad.untyped_storage().data_ptr() for p in parameters}}
    saved = {{"parameters": [p.detach().clone() for p in parameters], "buckets": len(buckets)}}
    torch.save(saved, os.path.join({folder!r}, "rank-" + os.environ["RANK"] + ".pt"))

register_optimizer_step_post_hook(keep)
load_script({script!r}).main(sys.argv[1:])
"""


@pytest.mark.parametrize("script", list(TORCH)[1:])
def test_two_processes(command, whole, server, script, tmp_path):
    """Under DDP, no parameter is waited for in vain, and what is trained is the same on both ranks."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(folder=str(tmp_path), script=script))
    tokens = command(script, output_dir=tmp_path / "out", train_batch_size=2, **RUN | SCRIPTS[script].draws)
    run = server.start(tokens, tmp_path, driver, processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    assert_close(tmp_path / "out", whole(script), script)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(rank["buckets"] <= 3 for rank in ranks), "gradients lie in what is sent: no second copy"
    ranks = [rank["parameters"] for rank in ranks]
    assert len(ranks[0]) > 10
    assert all(torch.equal(*pair) for pair in zip(*ranks, strict=True))
    trained = load_file(tmp_path / "out" / SCRIPTS[script].trained).values()
    assert all(any(torch.equal(p, tensor) for tensor in trained) for p in ranks[1]), "and the one that is exported"
