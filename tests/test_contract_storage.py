"""Contract: a disk that fills up or cannot be written ends a run in one line and costs nothing that was saved before.

What lies in an output folder and is not ours stays. `python tests/faults/table.py` prints a line a case.
"""

import contextlib
import os
import resource
import shutil
import subprocess

import pytest
import torch
from conftest import load_quick_flax_script, load_script
from runs import checkpoints, outcome, rows, weights
from scripts import SCRIPTS

from t2i_training.encodings import cache
from t2i_training.report.progress import Progress
from t2i_training.run import checkpoint

RUN = {"max_train_steps": 4, "checkpointing_steps": 1, "use_ema": True}
PARTS = {"sd": RUN, "prior_lora": {"max_train_steps": 4, "checkpointing_steps": 1}}


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB of its own, where that is permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk, kilobytes_free: int) -> None:
    """Leave so much; what is written then is real, and so is the error."""
    status = os.statvfs(disk)
    with open(disk / "ballast", "wb") as file:
        file.write(b"\0" * max(0, status.f_bavail * status.f_frsize - 1024 * kilobytes_free))


def free(disk) -> None:
    (disk / "ballast").unlink()


@contextlib.contextmanager
def at_update(update: int, act):
    """Inside, `act()` is called right after the `update`-th weight update of this process."""
    seen, counted = [], Progress.count_update

    def count(*arguments):
        seen.append(update)
        if len(seen) == update:
            act()
        counted(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "count_update", count)
        yield


@pytest.fixture
def run(command):
    """run(script, output_dir, **changes): a run in this process."""

    def call(script, output_dir, **changes):
        load_script(script).main(command(script, output_dir=output_dir, **{**PARTS.get(script, {}), **changes}))

    return call


def last_line(call, *arguments, **options) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*arguments, **options)
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def hidden(folder) -> set[str]:
    return {path.name for path in folder.rglob(".*")} - {".lock", ".inspected_pictures.json"}


# A full disk


@pytest.mark.parametrize("script", PARTS)
def test_full_during_a_checkpoint(run, disk, tmp_path, case, script):
    case(f"{script}: disk full in checkpoint 3", "one line, checkpoints 1 and 2 whole, resumed run the same")
    run(script, tmp_path / "whole")
    out = disk / "out"
    with at_update(3, lambda: fill(disk, 12)):
        message = last_line(run, script, out)
    assert message.startswith(f"error: checkpoint-3 cannot be saved in {out}, where ")
    assert (checkpoints(out), hidden(out)) == (["checkpoint-1", "checkpoint-2"], set()), "nor is the disk left full"
    assert [checkpoint.verify(out / name) for name in checkpoints(out)] == [None, None]
    free(disk)
    run(script, out, resume_from_checkpoint="latest")
    assert outcome(out, 4, SCRIPTS[script].trained, 15) == outcome(tmp_path / "whole", 4, SCRIPTS[script].trained, 15)
    case.seen(message)


def test_limit_on_files_during_a_checkpoint(run, tmp_path, case):
    """As `ulimit -f` or a quota sets it."""
    case("sd: file size limit in checkpoint 3", "one line, checkpoints 1 and 2 whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    try:
        with at_update(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))):
            message = last_line(run, "sd", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"error: checkpoint-3 cannot be saved in {out}, where ")
    assert (checkpoints(out), hidden(out)) == (["checkpoint-1", "checkpoint-2"], set())
    assert [checkpoint.verify(out / name) for name in checkpoints(out)] == [None, None]
    case.seen(message)


@pytest.mark.parametrize("script", PARTS)
def test_full_during_the_export(run, disk, tmp_path, case, script):
    case(f"{script}: disk full in a second export", "one line, the first export as it was; resumed, the same")
    out, options = disk / "out", {"checkpointing_steps": 2}
    run(script, tmp_path / "whole", max_train_steps=5, **options)
    run(script, out, **options)
    before = (out / SCRIPTS[script].trained).read_bytes()
    with at_update(1, lambda: fill(disk, 4)):
        message = last_line(run, script, out, max_train_steps=5, resume_from_checkpoint="latest", **options)
    assert message.startswith(f"error: the trained model cannot be saved in {out}, where ")
    assert ((out / SCRIPTS[script].trained).read_bytes(), hidden(out)) == (before, set())
    free(disk)
    run(script, out, max_train_steps=5, resume_from_checkpoint="latest", **options)
    assert outcome(out, 4, SCRIPTS[script].trained, 15)["export"] == outcome(
        tmp_path / "whole", 4, SCRIPTS[script].trained, 15
    )["export"]  # fmt: skip
    case.seen(message)


def test_faults_of_the_flax_script(run, disk, case, monkeypatch, model, caplog):
    """It writes its files by functions of its own. Here each update takes a tenth off the weights."""
    pytest.importorskip("flax")
    load_quick_flax_script(monkeypatch)
    case("sd_flax: disk full in checkpoint 2, in the export; checkpoint 2 damaged", "a line each, whole ones are used")
    out, again = disk / "out", {**RUN, "checkpointing_steps": 2, "max_train_steps": 3}
    with at_update(2, lambda: fill(disk, 12)):
        first = last_line(run, "sd_flax", out, **RUN)
    assert first.startswith(f"error: checkpoint-2 cannot be saved in {out}, where ")
    assert (checkpoints(out), hidden(out)) == (["checkpoint-1"], set())
    free(disk)
    with at_update(2, lambda: fill(disk, 4)):
        second = last_line(run, "sd_flax", out, resume_from_checkpoint="latest", **again)
    assert second.startswith(f"error: the trained model cannot be saved in {out}, where ")
    assert (checkpoints(out), hidden(out)) == (["checkpoint-1", "checkpoint-2"], set())
    assert not (out / "unet").exists()
    free(disk)
    os.truncate(out / "checkpoint-2" / "optimizer.safetensors", 99)
    run("sd_flax", out, resume_from_checkpoint="latest", **again)
    third = f"{out / 'checkpoint-2'} is not usable (optimizer.safetensors is damaged); trying the one before"
    assert third in caplog.text
    before, after = (weights(folder)["conv_in.weight"] for folder in (model, out))
    assert torch.allclose(after, 0.9**3 * before)
    case.seen("; ".join([first, second, third]))


def test_full_while_encoding(run, disk, case, monkeypatch):
    case("sd: disk full in --cache_encodings", "one line; what was written is used by the next run")
    monkeypatch.setattr(cache, "BATCH", 2)
    monkeypatch.setattr(cache, "SHARD", 2)
    fill(disk, 56)  # a few of six shards of 17 KB
    message = last_line(run, "sd", disk / "out", cache_encodings=True)
    assert message.startswith(f"error: --encodings_dir {disk / 'out' / 'encodings'}/images-")
    written = set(disk.glob("out/encodings/*/*.safetensors"))
    assert written
    assert hidden(disk / "out") == set()
    free(disk)
    run("sd", disk / "out", cache_encodings=True, max_train_steps=1)
    assert written < set(disk.glob("out/encodings/*/*.safetensors"))
    case.seen(message)


def test_full_at_a_row_of_metrics(run, disk, case):
    case("sd: disk full at the first row of metrics.jsonl", "one line; the next run is whole")
    with at_update(1, lambda: fill(disk, 0)):
        message = last_line(run, "sd", disk / "out")
    assert message.startswith("error: metrics.jsonl cannot be saved in ")
    free(disk)
    run("sd", disk / "out", resume_from_checkpoint="latest")
    assert [row["step"] for row in rows(disk / "out")] == [1, 2, 3, 4]
    case.seen(message)


def test_full_at_validation_pictures(run, disk, case):
    case("sd: disk full at validation", "one line, the images before are whole")
    options = {"validation_prompts": ["a"], "validation_epochs": 1, "checkpointing_steps": 2}
    with at_update(3, lambda: fill(disk, 1)):  # enough for the row
        message = last_line(run, "sd", disk / "out", **options)
    assert message.startswith("error: 00.png cannot be saved in ")
    assert not list(disk.glob("out/validation/**/.*"))
    free(disk)
    run("sd", disk / "out", resume_from_checkpoint="latest", **options)
    assert len(list(disk.glob("out/validation/step-*.png"))) == 3
    case.seen(message)


# A folder that cannot be written


def test_read_only_output_folder(run, disk, case):
    case("sd: output folder on a read-only disk", "one line, at once")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    message = last_line(run, "sd", disk / "out")
    assert message == f"error: --output_dir {disk / 'out'} cannot be written: Read-only file system"
    case.seen(message)


def test_file_in_the_way_of_the_output_folder(run, tmp_path, case):
    case("sd: a file in the way of the output folder", "one line, at once")
    (tmp_path / "file").write_text("mine")
    message = last_line(run, "sd", tmp_path / "file" / "out")
    assert message.startswith(f"error: --output_dir {tmp_path / 'file' / 'out'} cannot be written: ")
    case.seen(message)


def test_disk_turns_read_only(run, disk, case):
    """As after an error of the device."""
    case("sd: disk turns read-only in the run", "one line, checkpoints 1 and 2 whole; resumed")
    out = disk / "out"

    def turn():
        for options in (["--bind", str(out)], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, str(out)], check=True)

    with at_update(3, turn):
        message = last_line(run, "sd", out)
    assert message.startswith("error: metrics.jsonl cannot be saved in ")
    subprocess.run(["umount", str(out)], check=True)
    assert [checkpoint.verify(out / name) for name in checkpoints(out)] == [None, None]
    case.seen(message)
