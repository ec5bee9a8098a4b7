"""Contract: captions in files beside the images, and folders as other trainers have them."""

import json
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
from test_contract_data_forms import PNG, fill, pack, samples, texts  # noqa: F401


def beside(folder, suffix=".txt", **captions: str | bytes):
    """Images 0.png, 1.png, ... by the names of `captions`, each with its caption file."""
    fill(folder, *(f"{name}.png" for name in captions))
    for name, caption in captions.items():
        (folder / f"{name}{suffix}").write_bytes(caption.encode() if isinstance(caption, str) else caption)
    return folder


READ = {  # a folder -> the captions that are read
    "a line each": (lambda f: beside(f, a="a red fox\n", b="café"), ["a red fox", "café"]),
    "with a byte order mark": (lambda f: beside(f, a="\ufeffa red fox"), ["a red fox"]),
    "with Windows' line ends": (lambda f: beside(f, a="a red fox\r\n\r\n"), ["a red fox"]),
    "several lines are several captions": (
        lambda f: beside(f, a="a fox\n\n  red fur \n", b="a dog"),
        [["a fox", "red fur"], ["a dog"]],
    ),
    "no line ends but paragraph separators": (
        lambda f: beside(f, a="a fox\u2028red\x0bfur"),
        ["a fox\u2028red\x0bfur"],
    ),
    ".caption": (lambda f: beside(f, ".caption", a="a fox"), ["a fox"]),
    "suffixes in capitals": (lambda f: (fill(f, "a.PNG"), (f / "a.TXT").write_text("a fox")), ["a fox"]),
    "in nested folders": (lambda f: (beside(f / "x" / "y", a="a"), beside(f, b="b")), ["b", "a"]),
    "of the training split": (lambda f: (beside(f / "train", a="a"), beside(f / "test", b="b")), ["a"]),
    "dots in names": (lambda f: beside(f, **{"a.b.c": "a fox"}), ["a fox"]),
    "in a zip": (lambda f: pack(f / "d.zip", **{"d/a.png": PNG, "d/a.txt": b"a fox"}), ["a fox"]),
    "one caption for two images of a name": (lambda f: (beside(f, a="a fox"), fill(f, "a.jpg")), ["a fox", "a fox"]),
    "more of .caption than of .txt": (
        lambda f: (beside(f, ".caption", a="a", b="b"), (f / "a.txt").write_text("x")),
        ["a", "b"],
    ),
    "and a notebook's table": (lambda f: (beside(f, a="a"), fill(f, log_csv="x,y\n1,2\n")), ["a"]),
    "and other trainers' files": (
        lambda f: (
            beside(f, a="a", b="b"),
            fill(f, Thumbs_db=b"\xd0\xcf", a_npz=b"PK", b_npz=b"PK", a_json="{}", b_json="{}", dataset_toml="x=1"),
            (f / ".DS_Store").write_bytes(b"x"),
        ),
        ["a", "b"],
    ),
    "with gallery-dl's notes": (lambda f: (beside(f, a="a"), (f / "a.png.json").write_text("{}")), ["a"]),
    "and metadata, which wins": (
        lambda f: (beside(f, a="x"), fill(f, metadata_jsonl='{"file_name": "a.png", "text": "a"}')),
        ["a"],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case, samples, tmp_path):  # noqa: F811
    make, captions = READ[case]
    make(tmp_path / "set")
    assert texts(samples(tmp_path / "set")) == captions


FAULTS = {  # a caption file -> what is said of it
    "Windows-1252": (
        "café".encode("cp1252"),
        "a.txt line 1 is not UTF-8 (byte 0xe9), most likely Windows-1252: save it as UTF-8",
    ),
    "UTF-16": ("a fox".encode("utf-16"), "a.txt is UTF-16: save it as UTF-8"),
    "UTF-16 without its mark": ("a fox".encode("utf-16-le"), "a.txt is UTF-16: save it as UTF-8"),
    "zeros": (b"a fox\0 b", "a.txt holds a null character"),
    "nothing": (b"", "a.txt is empty: with --caption_dropout such images are trained with the empty caption"),
    "nothing but space": (b" \n\t\n", "a.txt is empty"),
    "a web page": (b"<!DOCTYPE html><html></html>", "a.txt is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a.txt is a Git LFS pointer"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_read(case, samples, tmp_path):  # noqa: F811
    content, said = FAULTS[case]
    folder = beside(tmp_path / "set", a=content, b="b")
    line = samples(folder)
    assert isinstance(line, str), line
    assert line.startswith("error: 1 of 2 samples cannot be used; row 0 ("), line
    assert said in line, line
    assert texts(samples(folder, skip=True)) == ["b"]


def test_an_image_without_a_caption_file_is_no_silent_loss(samples, tmp_path, caplog):  # noqa: F811
    folder = fill(beside(tmp_path / "set", a_fox_1="a", b="b"), "a_fox_01.png", "lone.png")
    (folder / "a_fox_001.txt").write_text("x")
    line = samples(folder)
    assert line.startswith("error: 2 of 4 samples cannot be used; "), line
    assert "it has no caption: there is no a_fox_01.txt beside it; did you mean a_fox_001.txt?" in caplog.text
    assert "it has no caption: there is no lone.txt beside it" in caplog.text
    assert "1 caption file has no image of its name, and is left out: a_fox_001.txt" in caplog.text
    assert texts(samples(folder, skip=True)) == ["a", "b"]


def test_empty_captions_are_trained_where_flags_say_so(samples, tmp_path, caplog):  # noqa: F811
    folder = beside(tmp_path / "set", a="", b="b")
    assert texts(samples(folder, caption_dropout=0.1)) == ["", "b"]
    assert texts(samples(folder, caption_prefix="zwx")) == ["", "b"]
    assert "1 caption file is empty: a.txt" in caplog.text


def test_the_extension_can_be_named(samples, tmp_path):  # noqa: F811
    folder = beside(tmp_path / "set", a="a")
    beside(folder, ".tags", a="fox, red")
    assert texts(samples(folder, caption_extension=".tags")) == ["fox, red"]
    assert "holds no .text beside its images" in samples(folder, caption_extension=".text")
    fill(folder, metadata_jsonl='{"file_name": "a.png", "text": "a"}')
    assert "holds metadata.jsonl, which is read: leave --caption_extension out" in samples(
        folder, caption_extension=".tags"
    )


def test_an_extension_that_does_nothing_is_refused(samples, refused, tmp_path):  # noqa: F811
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [{"bytes": PNG, "path": None}], "text": ["a"]}), tmp_path / "train.parquet"
    )
    assert "is read as a data set, not as images and caption files" in samples(tmp_path, caption_extension=".txt")
    hub = {"train_data_dir": None, "dataset_name": "someone/images"}
    assert "--caption_extension does nothing here: it is for a folder" in refused("sd", caption_extension="txt", **hub)
    assert "--caption_extension does nothing here: it is for a folder" in refused("decoder", caption_extension="txt")


def test_what_is_said_of_a_folder(samples, tmp_path, caplog):  # noqa: F811
    folder = beside(tmp_path / "set", a="a\nb", b="b")
    fill(folder, a_npz=b"PK", b_npz=b"PK", Thumbs_db=b"x")
    samples(folder)
    said = "2 samples of images and .txt files beside them; "
    said += "1 of them with several captions, one a line, of which each visit draws one"
    assert f"--train_data_dir {folder}: {said}; not read: 2 .npz, 1 .db" in caplog.messages


def test_a_decoder_needs_no_captions(samples, tmp_path, caplog):  # noqa: F811
    folder = fill(beside(tmp_path / "set", a="a"), "b.png")
    assert len(samples(folder, caption_column=None)) == 2
    assert "2 samples from images without metadata; not read: 1 .txt" in caplog.text


# --- the folders of other trainers


def kohya(folder, captions=True):
    """img/10_zwx dog: repeats, then a name that stands for captions that are not there."""
    fill(folder, "10_zwx dog/a.png", "10_zwx dog/b.png", "2_dog/c.png")
    for name in ("10_zwx dog/a", "10_zwx dog/b", "2_dog/c") if captions else ():
        (folder / f"{name}.caption").write_text(f"caption of {name[-1]}")
    return folder


def test_kohya_with_captions(samples, tmp_path, caplog):  # noqa: F811
    folder = kohya(tmp_path / "set")
    assert texts(samples(folder)) == ["caption of a", "caption of b", "caption of c"]
    assert "folders such as 10_zwx dog name repeats: with --repeats_from_folders their images" in caplog.text
    caplog.clear()
    rows = samples(folder, repeats_from_folders=True)
    assert texts(rows) == ["caption of a"] * 10 + ["caption of b"] * 10 + ["caption of c"] * 2
    assert "repeats: 2_dog 2 times (1 images), 10_zwx dog 10 times (2 images)" in caplog.text
    assert "22 samples with repeats" in caplog.text


def test_kohya_without_captions(samples, tmp_path, caplog):  # noqa: F811
    folder = kohya(tmp_path / "set", captions=False)
    assert "its folders' names, such as 10_zwx dog, are captions with --repeats_from_folders" in samples(folder)
    assert texts(samples(folder, repeats_from_folders=True)) == ["zwx dog"] * 20 + ["dog"] * 2
    assert "3 without a caption file have the name of their folder as caption" in caplog.text


def test_repeats_multiply_and_count_what_is_used(samples, tmp_path, caplog):  # noqa: F811
    """On top of each other; of usable rows alone; --max_train_samples chooses before."""
    folder = kohya(tmp_path / "set")
    (folder / "10_zwx dog" / "b.caption").write_bytes(b"")
    rows = samples(folder, repeats_from_folders=True, num_repeats=3, skip=True)
    assert texts(rows) == ["caption of a"] * 30 + ["caption of c"] * 6
    few = texts(samples(folder, num_repeats=3, max_train_samples=2, skip=True, caption_dropout=0.1))
    assert len(few) == 6
    assert len(set(few)) == 2
    assert "--repeats_from_folders finds no folder named as `10_zwx dog`" in samples(
        beside(tmp_path / "plain", a="a"), repeats_from_folders=True
    )


def test_repeats_in_a_zip(samples, tmp_path):  # noqa: F811
    pack(tmp_path / "set" / "d.zip", **{"2_dog/a.png": PNG, "2_dog/a.txt": b"a", "b.png": PNG, "b.txt": b"b"})
    assert texts(samples(tmp_path / "set", repeats_from_folders=True)) == ["a", "a", "b"]


def test_kohya_fine_tuning(samples, tmp_path):  # noqa: F811
    """Its metadata is refused with the command that makes what is read."""
    folder = fill(tmp_path / "set", "a.png", "b.png")
    entries = {str(folder / "a.png"): {"caption": "a fox"}, "b.png": {"caption": "a dog", "tags": "brown, big"}}
    (folder / "it's meta_cap.json").write_text(json.dumps(entries, indent=2))
    line = samples(folder)
    run(line.partition("makes a metadata.jsonl of it: ")[2])
    assert texts(samples(folder)) == ["a fox", "a dog, brown, big"]


def run(command: str):
    subprocess.run(command.replace("python -c", "python3 -c"), shell=True, check=True)


def test_one_trainer(samples, tmp_path, caplog):  # noqa: F811
    folder = beside(tmp_path / "concept", a="a fox\na red fox", b="b")
    fill(folder, "a-masklabel.png", "b-condlabel.png")
    assert texts(samples(folder)) == [["a fox", "a red fox"], ["b"]]
    assert "left out: 2 masks (-masklabel, -condlabel)" in caplog.text


def test_automatic1111(samples, tmp_path):  # noqa: F811
    """Its preprocessing wrote captions beside the images, or made them their names."""
    assert texts(samples(beside(tmp_path / "txt", **{"00000-0-IMG_1": "a fox"}))) == ["a fox"]
    folder = fill(tmp_path / "names", "00000-0-a red fox.png", "00001-0-a dog.png")
    line = samples(folder)
    assert "holds no captions" in line
    run(line.partition("makes captions of its file names: ")[2])
    assert texts(samples(folder)) == ["a red fox", "a dog"]


def test_everydream(samples, tmp_path):  # noqa: F811
    folder = fill(tmp_path / "names", "a photo of ted, laying down_1.jpg", "x/a dog_2_x.png")
    line = samples(folder)
    run(line.partition("makes captions of its file names: ")[2])
    assert texts(samples(folder)) == ["a photo of ted, laying down", "a dog"]
    folder = fill(beside(tmp_path / "multiplied", a="a"), multiply_txt="2.5")
    assert "holds EveryDream's multiply.txt, which is not read: " in samples(folder)
    assert "--repeats_from_folders" in samples(folder)
    assert "multiply.txt, which is not read" in samples(folder, caption_column=None), "of the decoder, too"
    folder = fill(tmp_path / "yaml", "a.png", a_yaml="main_prompt: a fox")
    assert "has captions in .yaml files such as a.yaml, which are not read: " in samples(folder)
    folder = fill(beside(tmp_path / "tags", a="a"), local_yaml="tags:\n  - tag: x")
    assert "holds EveryDream's local.yaml, which is not read: " in samples(folder)


def test_captions_in_a_folder_of_their_own(samples, tmp_path):  # noqa: F811
    folder = fill(tmp_path / "set", "images/a.png", "images/b.png")
    beside(folder / "captions", a="a", b="b")
    for image in (folder / "captions").glob("*.png"):
        image.unlink()
    assert "has captions in .txt files such as captions/a.txt, but not beside its images: move each" in samples(folder)
