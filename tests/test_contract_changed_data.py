"""Contract: a resumed run says what has changed in its data since the checkpoint, and encodes only what is new."""

import json
import shutil

import pytest
from conftest import load_script
from PIL import Image

RUN = {"max_train_steps": 2, "checkpointing_steps": 2, "cache_encodings": True}
SAID = "the data set has changed since the checkpoint: "


@pytest.fixture(scope="module")
def stopped(command, pictures, tmp_path_factory):
    """(data folder, output folder) of a run of two updates; leave both as they are."""
    root = tmp_path_factory.mktemp("changed")
    shutil.copytree(pictures, root / "data")
    load_script("sd_lora").main(command("sd_lora", train_data_dir=root / "data", output_dir=root / "out", **RUN))
    return root


@pytest.fixture
def resume(stopped, command, tmp_path, caplog):
    """resume(change): what a run that goes on says of its data, after `change` of a copy of the folder."""

    def call(change=lambda folder: None, **options) -> list[str]:
        shutil.copytree(stopped, tmp_path / "copy")
        change(tmp_path / "copy" / "data")
        caplog.clear()
        folders = {"train_data_dir": tmp_path / "copy" / "data", "output_dir": tmp_path / "copy" / "out"}
        tokens = command("sd_lora", **folders, **RUN | options, resume_from_checkpoint="latest")
        load_script("sd_lora").main(tokens)
        return [record.getMessage() for record in caplog.records]

    return call


def rows(folder, change):
    file = folder / "metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def painted(folder):
    Image.new("RGB", (40, 32), "red").save(folder / "3.png")


def recaptioned_and_painted(folder):
    rows(folder, lambda lines: [*lines[:-1], lines[-1] | {"text": "a red square"}])
    painted(folder)


def exchanged(lines):
    first, second, *rest = lines
    return [first | {"text": second["text"]}, second | {"text": first["text"]}, *rest]


CHANGES = {
    "a caption": (
        lambda f: rows(f, lambda lines: [lines[0] | {"text": "a hen"}, *lines[1:]]), "some of its captions have changed"
    ),
    "a list in place of a caption": (
        lambda f: rows(f, lambda lines: [line | {"text": [line["text"], "b"]} for line in lines]),
        "some of its captions have changed",
    ),
    "an image in place": (painted, "some of its images have changed"),
    "both": (recaptioned_and_painted, "some of its images and captions have changed"),
    "rows sorted anew": (lambda f: rows(f, lambda lines: lines[::-1]), "its samples are in another order"),
    "two captions exchanged": (lambda f: rows(f, exchanged), "some captions belong to other images"),
    "a row more": (lambda f: rows(f, lambda lines: [*lines, lines[0]]), "it had 6 samples and has 7"),
    "two rows fewer": (lambda f: rows(f, lambda lines: lines[2:]), "it had 6 samples and has 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_has_changed_is_said(case, resume):
    change, said = CHANGES[case]
    (line,) = [message for message in resume(change) if "data set" in message]
    assert line.startswith(SAID + said)


def as_csv(folder):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in lines))
    (folder / "metadata.jsonl").unlink()


def renamed(folder):
    (folder / "images").mkdir()
    for file in folder.glob("*.png"):
        file.rename(folder / "images" / f"a{file.name}")
    rows(folder, lambda lines: [line | {"file_name": f"images/a{line['file_name']}"} for line in lines])


@pytest.mark.parametrize("change", [lambda folder: None, as_csv, renamed], ids=["nothing", "another form", "new names"])
def test_nothing_is_said_of_the_same_images_and_captions(change, resume):
    assert not [message for message in resume(change) if "data set" in message]


def test_a_checkpoint_from_before_there_was_a_record_of_data(resume):
    """Its number of samples is all that is known."""

    def forget(folder):
        painted(folder)
        file = folder.parent / "out" / "checkpoint-2" / "manifest.json"
        manifest = json.loads(file.read_text())
        assert set(manifest.pop("data")) == {"images", "captions", "samples", "order"}
        manifest.pop("digest")
        file.write_text(json.dumps(manifest))

    assert not [message for message in resume(forget) if "data set" in message]


def test_encodings_of_what_stayed_are_found_again(resume):
    """Of six images, with four crops each, and as many captions, one of each is new."""
    wanted = [line.partition(" are in ")[0] for line in resume(recaptioned_and_painted) if "encodings needed" in line]
    assert wanted == ["images: 24 encodings needed, 20", "captions: 6 encodings needed, 5"]
