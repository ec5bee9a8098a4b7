"""What the trackers are told, read back from their own files."""

import io
import json
import struct

import numpy as np
import pytest
from conftest import flags, load_script
from PIL import Image

ROWS = (
    "train_loss", "lr", "grad_norm", "epoch", "images_per_second", "seconds_per_step", "data_wait", "tflops_per_second",
)  # fmt: skip
ON_A_GPU = {"peak_memory_gib", "mfu"}
SECRET = "hf_" + "LoggedInWithThisOne" * 2


@pytest.fixture(scope="module")
def run(model, pictures, tmp_path_factory):
    """run(**changes): output folder of a run of six updates that logs every two and draws two prompts."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("trackers") / "out"
        defaults = {
            "pretrained_model_name_or_path": model, "train_data_dir": pictures, "output_dir": folder,
            "resolution": 32, "train_batch_size": 2, "max_train_steps": 6, "lr_scheduler": "linear",
            "lr_warmup_steps": 0, "learning_rate": 1e-3, "seed": 3, "logging_steps": 2,
            "validation_prompts": ["a cat", "a dog"], "validation_epochs": 1,
        }  # fmt: skip
        load_script("sd").main(flags(**defaults | changes))
        return folder

    return make


@pytest.fixture(scope="module")
def everywhere(run):
    """(output folder, tracker names): `--report_to all`, with a token in the environment as after a login."""
    pytest.importorskip("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        patch.delenv("WANDB_DIR", raising=False)
        return run(report_to="all", logging_dir="told", tracker_project_name="emoji")


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensorboard(folder):
    """The one event file straight in `folder`; the hyperparameters have another, a folder below."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.glob("events.*")
    events = EventAccumulator(str(path), size_guidance={"images": 0})
    events.Reload()
    return events


def wandb_records(folder) -> list:
    """The records of the one offline run below `folder`: a LevelDB log, 32 kB blocks of (crc, length, type, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, record, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position < len(data):
        if 32768 - position % 32768 < 7:  # no room for a header: the block's end is padding
            position += 32768 - position % 32768
            continue
        if position + 7 > len(data):
            break  # still being written
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(record))
            record = b""
    return records


def check_tensorboard(folder, events):
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert set(events.Tags()["scalars"]) - ON_A_GPU == set(ROWS)
    for name in ROWS:
        told = events.Scalars(name)
        assert [scalar.step for scalar in told] == [2, 4, 6]
        wanted = [row["loss" if name == "train_loss" else name] for row in rows]
        assert [scalar.value for scalar in told] == pytest.approx(wanted, rel=1e-6)
    assert [scalar.value for scalar in events.Scalars("lr")] == pytest.approx([8.333333e-4, 5e-4, 1.666667e-4])


def check_tensorboard_pictures(folder, events):
    """Epochs of three updates: drawn before training and after updates 3 and 6; the two prompts side by side."""
    assert events.Tags()["images"] == ["validation"]
    told = events.Images("validation")
    assert [image.step for image in told] == [0, 3, 6]
    for image in told:
        shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        pictures = [folder / "validation" / f"step-{image.step:06d}" / name for name in ("00.png", "01.png")]
        assert np.array_equal(shown, np.hstack([np.asarray(Image.open(path)) for path in pictures]))


def test_tensorboard_scalars_and_pictures(run):
    folder = run(report_to="tensorboard")
    events = tensorboard(folder / "logs" / "text2image-fine-tune")
    check_tensorboard(folder, events)
    check_tensorboard_pictures(folder, events)
    (hyperparameters,) = (folder / "logs").rglob("hparams.yml")
    text = hyperparameters.read_text()
    assert "learning_rate: 0.001" in text
    assert "hub_token" not in text


def test_none_leaves_no_logs(run):
    folder = run(report_to="none", max_train_steps=2)
    assert [path for path in folder.rglob("*") if "tfevents" in path.name or path.suffix == ".wandb"] == []
    assert [row["step"] for row in metrics(folder)] == [2]


def test_all_tells_tensorboard(everywhere):
    events = tensorboard(everywhere / "told" / "emoji")
    check_tensorboard(everywhere, events)
    check_tensorboard_pictures(everywhere, events)


def test_all_tells_wandb(everywhere):
    """Its files lie in --logging_dir too, and hold the same numbers, the images and the configuration."""
    records = wandb_records(everywhere / "told")
    assert next(record.run.project for record in records if record.HasField("run")) == "emoji"
    history = {}  # {(step, name): value}
    for record in records:
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            history[record.history.step.num, name] = json.loads(item.value_json)
    losses = {step: value for (step, name), value in history.items() if name == "train_loss"}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in metrics(everywhere)})
    rates = {step: value for (step, name), value in history.items() if name == "lr"}
    assert rates == pytest.approx({2: 8.333333e-4, 4: 5e-4, 6: 1.666667e-4})
    captions = {step: value for (step, name), value in history.items() if name == "validation/captions"}
    assert captions == {step: ["a cat", "a dog"] for step in (0, 3, 6)}
    for step in captions:
        names = history[step, "validation/filenames"]
        told = [next((everywhere / "told").glob(f"wandb/offline-run-*/files/{name}")) for name in names]
        saved = sorted((everywhere / "validation" / f"step-{step:06d}").glob("*.png"))
        for one, other in zip(told, saved, strict=True):
            assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    values = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert values["learning_rate"] == 0.001
    assert values["validation_prompts"] == "['a cat', 'a dog']"
    assert "hub_token" not in values


def test_wandb_alone_writes_below_the_logging_folder(run, monkeypatch, tmp_path):
    """Of a relative output folder, too, while wandb's service, which an earlier run started, works in another one."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run(report_to="wandb", max_train_steps=2, output_dir="out", validation_prompts=None)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["out"]
    assert [path.name for path in tmp_path.iterdir()] == ["first", "second"]
    folder = tmp_path / "second" / "out"
    assert len(list(folder.glob("logs/wandb/offline-run-*/*.wandb"))) == 1
    assert list(folder.rglob("*tfevents*")) == []


def test_no_tracker_file_holds_a_token(everywhere):
    files = [path for path in everywhere.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
