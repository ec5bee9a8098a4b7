"""Contract: a checkpoint is whole or absent; "latest" is the newest that verifies; what is the user's stays."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import time

import pytest
import tiny
import torch
from conftest import flags, load_script, short_run
from runs import checkpoints, outcome, rows, wait_until, weights

from t2i_training import files
from t2i_training.run import checkpoint


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def steps_run(folder) -> list[int]:
    return [row["step"] for row in rows(folder)]


def refusal(call, *args, **options) -> str:
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as error:
        call(*args, **options)
    message = str(error.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def trained(model, pictures, tmp_path_factory):
    """A finished run of four updates with an average, and checkpoints 2 and 4. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    load_script("sd").main(flags(**short_run(model, pictures, folder), checkpointing_steps=2, use_ema=True))
    return folder


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture
def resume(train):
    """Continue `trained`, as the same command would."""

    def run(wanted="latest", **changes):
        return train(**{"resume_from_checkpoint": wanted, "use_ema": True, "checkpointing_steps": 2} | changes)

    return run


def test_layout(out):
    assert sorted(str(path.relative_to(out / "checkpoint-4")) for path in (out / "checkpoint-4").rglob("*")) == [
        "manifest.json",
        "optimizer.bin",
        "unet",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema",
        "unet_ema/config.json",
        "unet_ema/diffusion_pytorch_model.safetensors",
    ]
    written = manifest(out / "checkpoint-4")
    assert (written["step"], written["samples_seen"], written["seed"]) == (4, 8, 3)
    assert (written["effective_batch"], written["dataset_size"]) == (2, 6)
    assert set(written["versions"]) == {"torch", "diffusers", "accelerate", "numpy"}
    content = (out / "checkpoint-4" / "optimizer.bin").read_bytes()
    assert written["files"]["optimizer.bin"] == [len(content), hashlib.sha256(content).hexdigest()]
    assert len(written["files"]) == 5, "all but the manifest itself"


@pytest.mark.parametrize("part", ["unet", "unet_ema"])
def test_networks_load_on_their_own(out, model, part):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(out / "checkpoint-4" / part)
    base = UNet2DConditionModel.from_pretrained(model / "unet")
    assert unet.config.block_out_channels == base.config.block_out_channels
    assert not torch.equal(unet.conv_in.weight, base.conv_in.weight)
    assert torch.equal(unet.conv_in.weight, weights(out, f"checkpoint-4/{part}")["conv_in.weight"])


def test_export_is_the_average(out):
    average, exported = weights(out, "checkpoint-4/unet_ema"), weights(out)
    assert all(torch.equal(average[name], exported[name]) for name in exported)
    assert not torch.equal(weights(out, "checkpoint-4/unet")["conv_in.weight"], exported["conv_in.weight"])


def test_average_loads_as_diffusers_own(out):
    """Counters included: https://github.com/huggingface/diffusers EMAModel.from_pretrained reads the folder."""
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    ema = EMAModel.from_pretrained(out / "checkpoint-4" / "unet_ema", UNet2DConditionModel)
    assert ema.optimization_step == 4
    assert torch.equal(ema.shadow_params[0], weights(out, "checkpoint-4/unet_ema")["conv_in.weight"])


DAMAGES = {  # what is done to checkpoint-4 -> why it cannot be used
    "truncated": "unet/diffusion_pytorch_model.safetensors is damaged",
    "a flipped bit": "optimizer.bin is damaged",
    "a missing file": "unet_ema/config.json is missing",
    "a missing manifest": "it has no manifest.json, so it was not written by these scripts or not completely",
    "an empty manifest": "manifest.json cannot be read",
    "a binary manifest": "manifest.json cannot be read",
    "a manifest of nothing": "manifest.json cannot be read",
    "a manifest with a list of files": "manifest.json cannot be read",
    "a later format": "manifest.json is of another format",
}


def damage(checkpoint, how):
    if how == "truncated":
        file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
    elif how == "a flipped bit":
        content = bytearray((checkpoint / "optimizer.bin").read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / "optimizer.bin").write_bytes(content)
    elif how == "a missing file":
        (checkpoint / "unet_ema" / "config.json").unlink()
    elif how == "a missing manifest":
        (checkpoint / "manifest.json").unlink()
    else:
        text = {
            "an empty manifest": b"", "a binary manifest": b"\xff\x00\xfe", "a manifest of nothing": b"null",
            "a manifest with a list of files": json.dumps(manifest(checkpoint) | {"files": [1]}).encode(),
            "a later format": json.dumps(manifest(checkpoint) | {"format": 2}).encode(),
        }[how]  # fmt: skip
        (checkpoint / "manifest.json").write_bytes(text)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_newest_is_passed_over(resume, out, trained, how, caplog):
    damage(out / "checkpoint-4", how)
    resume()
    passed = f"{out / 'checkpoint-4'} is not usable ({DAMAGES[how]}"
    (warning,) = [record.message for record in caplog.records if "not usable" in record.message]
    assert passed in warning
    assert f"resumed from {out / 'checkpoint-2'}" in caplog.text
    assert outcome(out, 4) == outcome(trained, 4), "and made anew"


@pytest.mark.parametrize("how", ["a flipped bit", "a missing manifest", "a manifest with a list of files"])
def test_damaged_one_asked_for_by_name_is_refused(resume, out, how):
    damage(out / "checkpoint-4", how)
    message = refusal(resume, "checkpoint-4")
    assert message.startswith(f"error: --resume_from_checkpoint checkpoint-4: {DAMAGES[how]}")


def test_all_damaged_is_refused(resume, out):
    """Not a new beginning, which would overwrite days of work behind one line in a log."""
    for name in ("checkpoint-2", "checkpoint-4"):
        damage(out / name, "a flipped bit")
    before = rows(out)
    assert "none of the 2 checkpoints in" in refusal(resume)
    assert rows(out) == before


def test_rotation_keeps_the_newest(train):
    out = train(max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    assert checkpoints(out) == ["checkpoint-4", "checkpoint-6"]


def test_rotation_goes_on_after_a_resume(resume, out):
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    resume("checkpoint-4", max_train_steps=8, checkpoints_total_limit=2)
    assert checkpoints(out) == ["checkpoint-6", "checkpoint-8"]


def test_rotation_that_fails_is_made_up_for(train, monkeypatch, caplog):
    """On NFS a folder with a file that is open elsewhere cannot be removed. The checkpoint is whole all the same."""
    remove, refusals = checkpoint.remove_folder, [OSError(errno.EBUSY, "Device or resource busy")]

    def refuse_once(folder):
        if folder.name == "checkpoint-1" and refusals:
            raise refusals.pop()
        remove(folder)

    monkeypatch.setattr(checkpoint, "remove_folder", refuse_once)
    out = train(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-4"]
    assert "checkpoint-1 cannot be removed: Device or resource busy" in caplog.text


def test_rotation_counts_in_numbers_not_letters(resume, out):
    resume(max_train_steps=12, checkpoints_total_limit=3)
    assert checkpoints(out) == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]


def test_going_back_sets_the_later_ones_aside(resume, out, trained):
    """Neither "latest" nor the rotation may meet the course that was left; nor is it deleted."""
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-1000")
    resume("checkpoint-2", checkpoints_total_limit=1)
    assert checkpoints(out) == ["checkpoint-1000.1", "checkpoint-4", "checkpoint-4.1"]
    assert outcome(out, 4) == outcome(trained, 4)


def test_the_course_that_was_left_can_be_taken_up_again(resume, out, trained):
    resume("checkpoint-2", learning_rate=5e-4)
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-4.1"]
    resume("checkpoint-4.1", max_train_steps=6)
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4.1", "checkpoint-4.2", "checkpoint-6"]


def test_flags_of_the_optimizer_act_on_a_resumed_run(resume, out):
    resume("checkpoint-2", adam_beta1=0.5, adam_beta2=0.7, adam_weight_decay=0.3, adam_epsilon=1e-5)
    group = torch.load(out / "checkpoint-4" / "optimizer.bin", weights_only=True)["param_groups"][0]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.7), 0.3, 1e-5)


def test_files_have_the_modes_that_the_umask_asks_for(out):
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    umask = os.umask(0)
    os.umask(umask)
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}


def test_no_local_path_is_written_into_a_model(out, model):
    """diffusers notes where a network came from; checkpoints and exports are handed on."""
    files = [path for path in out.rglob("*.json") if path.name != "run_config.yaml"]
    assert len(files) > 10
    for path in files:
        assert str(model.parent) not in path.read_text(), path


def test_limit_of_one_always_leaves_a_whole_one(server, sd_flags, tmp_path):
    """Seen from outside, at any moment after the first save."""
    from t2i_training.run.checkpoint import verify

    out = tmp_path / "out"
    run = server.start(sd_flags(max_train_steps=10, checkpointing_steps=1, checkpoints_total_limit=1), tmp_path)
    wait_until((out / "checkpoint-1").is_dir)
    seen = set()
    while not (out / "checkpoint-10").is_dir():
        time.sleep(0.001)
        found = {folder.name for folder in out.glob("checkpoint-*")}
        assert found, "a moment without a checkpoint"
        assert len(found) <= 2, "the new one and the one before"
        seen |= found
    assert run.wait() == 0
    assert len(seen) > 3
    assert checkpoints(out) == ["checkpoint-10"]
    assert verify(out / "checkpoint-10") is None


def test_what_is_not_ours_stays(train, tmp_path):
    """Folders that look like checkpoints, and files of the user's, survive rotation and cleaning up."""
    out = tmp_path / "out"
    foreign = ["checkpoint-best", "checkpoint-1", "checkpoint-7", "checkpoint-3.bak", "checkpoint-"]
    for name in foreign:
        (out / name).mkdir(parents=True)
        (out / name / "notes.txt").write_text(name)
    (out / "checkpoint-5").write_text("a file")
    (out / "my_notes.txt").write_text("mine")
    train(max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=1)
    for name in foreign:
        assert (out / name / "notes.txt").read_text() == name
    assert (out / "checkpoint-5").read_text() == "a file"
    assert (out / "my_notes.txt").read_text() == "mine"
    assert checkpoints(out) == sorted([*foreign, "checkpoint-5", "checkpoint-6"])


def test_a_foreign_folder_of_the_same_number_is_not_destroyed(train, tmp_path):
    """For instance a checkpoint of the scripts that these replace: it is set aside."""
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    (out / "checkpoint-2" / "notes.txt").write_text("mine")
    train(max_train_steps=2, checkpointing_steps=2)
    assert manifest(out / "checkpoint-2")["step"] == 2
    assert [path.read_text() for path in out.glob("*/notes.txt")] == ["mine"]


def test_leftovers_of_dead_runs_are_cleaned(resume, out):
    for name in (".checkpoint-6.partial", ".checkpoint-2.removed"):
        shutil.copytree(out / "checkpoint-4", out / name)
    (out / ".export.partial").mkdir()
    resume(max_train_steps=6)
    hidden = {path.name for path in out.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock", ".inspected_pictures.json"}
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_death_between_the_two_renames_of_a_replacement_loses_nothing(resume, out, caplog):
    """A checkpoint is replaced by two renames; here the run died after the first."""
    before = (out / "checkpoint-4" / "manifest.json").read_bytes()
    (out / "checkpoint-4").rename(out / ".checkpoint-4.removed")
    shutil.rmtree(out / "checkpoint-2")
    resume()
    assert (out / "checkpoint-4" / "manifest.json").read_bytes() == before
    assert "starting from the beginning" not in caplog.text


def test_resume_without_an_average_that_was_saved(resume, out):
    """Leaving --use_ema out at resume is a choice; the export then holds the raw weights."""
    resume(use_ema=False, max_train_steps=6)
    assert "unet_ema/config.json" not in manifest(out / "checkpoint-6")["files"]
    assert torch.equal(weights(out)["conv_in.weight"], weights(out, "checkpoint-6/unet")["conv_in.weight"])


def test_average_that_was_not_saved_is_named(train, tmp_path):
    train(max_train_steps=2, checkpointing_steps=2)
    message = refusal(train, resume_from_checkpoint="latest", use_ema=True)
    assert message.startswith("error: --use_ema: ")
    assert str(tmp_path / "out" / "checkpoint-2") in message


def test_checkpoint_of_another_model_is_named(train, resume, out, tmp_path):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    folder = tiny.make_stable_diffusion(tmp_path / "other")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "block_out_channels": (16, 16)})
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(folder)
    message = refusal(resume, pretrained_model_name_or_path=folder)
    assert message.startswith(f"error: {out / 'checkpoint-4'} does not fit this model: ")
    assert "size mismatch" in message


def test_optimizer_of_another_run_is_named(train, out, tmp_path):
    """The network fits, its optimizer state does not."""
    state = torch.load(out / "checkpoint-4" / "optimizer.bin", weights_only=True)
    state["param_groups"][0]["params"].pop()
    replace(out / "checkpoint-4", "optimizer.bin", lambda file: torch.save(state, file))
    message = refusal(train, resume_from_checkpoint="latest", max_train_steps=6)
    assert str(out / "checkpoint-4") in message


def test_folder_in_use_is_refused_within_seconds(server, sd_flags, tmp_path):
    run = server.start(sd_flags(max_train_steps=10000), tmp_path)
    wait_until((tmp_path / "out" / ".lock").exists)
    wait_until((tmp_path / "out" / "metrics.jsonl").exists)
    message = refusal(load_script("sd").main, sd_flags())
    assert message == f"error: --output_dir {tmp_path / 'out'} is in use by another run"
    run.kill(9)
    assert run.wait() == -9
    load_script("sd").main(sd_flags())  # a killed run holds nothing
    assert steps_run(tmp_path / "out") == [1, 2, 3, 4]


def test_earlier_checkpoints_are_not_run_over(train, out, capsys):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as error:
        train()
    assert error.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: --output_dir {out} holds checkpoints of an earlier run" in last_line
    assert "--resume_from_checkpoint latest" in last_line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


class Bomb:
    def __init__(self, crater):
        self.crater = crater

    def __reduce__(self):
        return (open, (str(self.crater), "w"))


def replace(checkpoint, name, write):
    """Let `write(file)` make a file anew, and correct the manifest: all verifies."""
    write(checkpoint / name)
    content = (checkpoint / name).read_bytes()
    written = manifest(checkpoint)
    written.pop("digest")  # the manifest's own
    written["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (checkpoint / "manifest.json").write_text(json.dumps(written))


def save_plainly(bomb, file):
    file.write_bytes(pickle.dumps(bomb, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_plainly])
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_no_code_in_a_checkpoint_is_run(resume, out, tmp_path, name, save):
    """A checkpoint of a stranger's, in order to all appearances, whose pickle would create a file."""
    crater = tmp_path / "crater"
    replace(out / "checkpoint-4", name, lambda file: save(Bomb(crater), file))
    if name == "optimizer.bin":
        assert str(out / "checkpoint-4") in refusal(resume, max_train_steps=6)
    else:  # accelerate would read it, if it were there; ours are not
        resume(max_train_steps=6)
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater)))  # it is a live one
    assert crater.exists()


def test_disk_that_fails_while_training_goes_on(train, tmp_path, monkeypatch):
    """The run ends after the step under way, and is saved as it then stands."""

    def sync(path):
        if ".checkpoint-4." in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        files.sync(path)

    monkeypatch.setattr("t2i_training.run.manifest.sync", sync)
    message = refusal(train, max_train_steps=1000, checkpointing_steps=2)
    assert message.startswith(f"error: checkpoint-4 cannot be saved in {tmp_path / 'out'}, where ")
    last = rows(tmp_path / "out")[-1]["step"]
    assert 4 < last < 1000
    assert checkpoints(tmp_path / "out")[:1] == ["checkpoint-2"]
    assert f"checkpoint-{last}" in checkpoints(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".checkpoint-*"))
    train(max_train_steps=last + 1, resume_from_checkpoint="latest")
