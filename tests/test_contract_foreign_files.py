"""Contract: files are whole or absent, whatever happens while they are written; what is the user's is never deleted."""

import errno
import os
import shutil
import time
from types import SimpleNamespace

import pytest
from conftest import load_script
from PIL import Image
from runs import checkpoints, interrupt, outcome
from scripts import SCRIPTS

from t2i_training import files
from t2i_training.encodings.store import Store
from t2i_training.report import curves, hub, validation
from t2i_training.run import checkpoint, output_folder
from t2i_training.run.export import export_atomically
from t2i_training.stopping import StopRequest

MAIN = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1, trackers=[])


@pytest.fixture
def run(command):
    """run(script, output_dir, **changes): a run of two updates in this process."""

    def call(script, output_dir, **changes):
        options = {"max_train_steps": 2, "checkpointing_steps": 1} | changes
        load_script(script).main(command(script, output_dir=output_dir, **options))
        return output_dir

    return call


# Whole or absent


def fail(_path):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def write_validation(folder):
    validation.validate(lambda i: Image.new("RGB", (8, 8)), ["a"], 0, folder, MAIN, StopRequest())


def write_curves(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1, "lr": 1, "grad_norm": 1}\n')
    curves.plot_curves(folder)


def write_card(folder):
    args = SimpleNamespace(
        output_dir=folder, dataset_name=None, train_data_dir="x", learning_rate=1, lr_scheduler="constant",
        train_batch_size=1, gradient_accumulation_steps=1, resolution=8,
        validation_prompts=[],
    )  # fmt: skip
    hub.write_card(args, title="x", base_model="x", tags=[], usage="x", steps=1, seed=1, precision="no")


def write_config(folder):
    output_folder.write_config({"output_dir": str(folder), "seed": 1}, resumed=True)


WRITERS = {
    "validation/step-000000/00.png": write_validation, "training_curves.png": write_curves, "README.md": write_card,
    "run_config.yaml": write_config,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_file_is_put_in_place_when_it_is_whole(tmp_path, monkeypatch, name):
    """The disk fails as the file is synced: what stood there stays, and nothing else."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("earlier")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", fail)
        with pytest.raises(SystemExit, match=f"error: {file.name} cannot be saved in "):
            WRITERS[name](tmp_path)
    assert file.read_text() == "earlier"
    assert not list(tmp_path.rglob(".*"))
    WRITERS[name](tmp_path)
    assert file.read_bytes() != b"earlier"


def test_a_result_that_will_be_replaced_is_told(run, tmp_path, caplog):
    for told in (False, True):
        run("sd", tmp_path / "out", max_train_steps=1, checkpointing_steps=500)
        assert ("holds the result of an earlier run" in caplog.text) == told


def test_a_readme_of_the_users_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    for _ in range(2):
        write_card(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "README.md.1"]
    assert (tmp_path / "README.md.1").read_text() == "my notes"


def test_a_model_is_there_at_every_moment_of_a_second_export(tmp_path, monkeypatch):
    """Its folders change places with the new ones: there is no moment without them."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")

    def write(folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text('{"new": 1}')

    seen, rename = [], files.Path.rename

    def look(path, target):
        seen.append((tmp_path / "unet" / "config.json").exists())
        result = rename(path, target)
        seen.append((tmp_path / "unet" / "config.json").exists())
        return result

    monkeypatch.setattr(files.Path, "rename", look)
    export_atomically(tmp_path, write, MAIN)
    assert seen
    assert all(seen)
    assert (tmp_path / "unet" / "config.json").read_text() == '{"new": 1}'
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # a system that cannot
    export_atomically(tmp_path, write, MAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet"]


def test_rotation_that_a_kill_prevented_is_made_up_for(run, tmp_path, monkeypatch, case):
    case("sd: killed after the last save, before the rotation", "resumed run keeps to --checkpoints_total_limit")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointManager, "_rotate", lambda self, keep: None)
        out = run("sd", tmp_path / "out", max_train_steps=3, checkpoints_total_limit=1)
    assert len(checkpoints(out)) == 3
    run("sd", out, max_train_steps=3, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert checkpoints(out) == ["checkpoint-3"]
    case.seen(", ".join(checkpoints(out)))


@pytest.mark.parametrize(("age", "seconds", "stays"), [(7200, 3600, False), (60, 3600, True), (0, 0, False)])
def test_what_a_dead_process_was_writing_is_removed_once_it_is_old(tmp_path, age, seconds, stays):
    partial = tmp_path / ".0123456789abcdef.partial"
    partial.write_text("half")
    os.utime(partial, (time.time() - age,) * 2)
    Store(tmp_path).remove_stale(seconds)
    assert partial.exists() is stays


# What is the user's

FOREIGN = ("checkpoint-best/notes.txt", "checkpoint-1.bak/notes.txt", "notes.txt", "validation/notes.txt",
           "validation/step-notes.txt", "logs/notes.txt", "encodings/notes.txt", "samples/step-000000.png")  # fmt: skip


@pytest.mark.parametrize("script", ["sd", "prior_lora"])
def test_a_users_files_outlive_it_all(run, tmp_path, case, script):
    case(f"{script}: user's files and folders in the output folder", "there after rotation, resume and two exports")
    out = tmp_path / "out"
    for name in FOREIGN:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    options = {"checkpoints_total_limit": 1, "cache_encodings": True, "max_train_steps": 3}
    options |= {"validation_prompts": ["a"]} if script == "sd" else {"validation_prompt": "a"}
    with interrupt(2):
        run(script, out, **options)
    run(script, out, resume_from_checkpoint="latest", **options)
    run(script, out, resume_from_checkpoint="latest", **options)
    assert [name for name in FOREIGN if (out / name).read_text() == name] == list(FOREIGN)
    assert checkpoints(out) == ["checkpoint-1.bak", "checkpoint-3", "checkpoint-best"]
    case.seen(f"{len(FOREIGN)} of {len(FOREIGN)} are there")


def test_a_users_file_in_an_exported_folder(run, tmp_path, case):
    """The folder that held it is kept under another name; so is another model's that was exported there."""
    case("sd: user's notes in unet/, and a file named vae", "set aside, not deleted by an export")
    out = run("sd", tmp_path / "out")
    (out / "unet" / "notes.txt").write_text("mine")
    shutil.rmtree(out / "vae")
    (out / "vae").write_text("mine")
    run("sd", out, resume_from_checkpoint="latest")
    assert ((out / "unet.1" / "notes.txt").read_text(), (out / "vae.1").read_text()) == ("mine", "mine")
    assert (out / "vae" / "config.json").exists()
    run("sd", out, resume_from_checkpoint="latest")
    assert not (out / "unet.2").exists()
    case.seen("unet.1, vae.1")


@pytest.mark.parametrize("script", ["sd_lora", "decoder"])
def test_resume_of_a_finished_run(run, tmp_path, case, script):
    case(f"{script}: resume of a finished run", "exits 0, everything equal")
    out = run(script, tmp_path / "out")
    before = outcome(out, 2, SCRIPTS[script].trained, 15)
    run(script, out, resume_from_checkpoint="latest")
    assert outcome(out, 2, SCRIPTS[script].trained, 15) == before
    case.seen("equal")


@pytest.mark.parametrize("script", ["sd_lora", "prior_lora"])
def test_damaged_newest_adapters_are_passed_over(run, tmp_path, case, script, caplog):
    case(f"{script}: newest checkpoint truncated", "falls back to the one before, says so, same result")
    out = run(script, tmp_path / "out")
    before, file = outcome(out, 2, SCRIPTS[script].trained, 15), out / "checkpoint-2" / SCRIPTS[script].trained
    os.truncate(file, file.stat().st_size - 1)
    caplog.clear()
    run(script, out, resume_from_checkpoint="latest")
    assert (
        f"{out / 'checkpoint-2'} is not usable ({SCRIPTS[script].trained} is damaged); trying the one before"
        in caplog.text
    )
    assert outcome(out, 2, SCRIPTS[script].trained, 15) == before
    case.seen(next(record.message for record in caplog.records if "not usable" in record.message))
