"""Data in all the forms that people have it: read alike by both flags, or refused in one line with the way out."""

import io
import json
import logging
import shutil
import unicodedata
import zipfile
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from bad_samples import _stored, data_args
from conftest import load_script
from PIL import Image

from t2i_training.data import captions, images, inspection, loading
from t2i_training.data.dataset import BadSample, image_file, open_dataset
from t2i_training.sources import data_faults, data_files

ONE_PROCESS = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
PNG = _stored(Image.new("RGB", (8, 8), "red"))


@pytest.fixture
def samples(tmp_path, caplog):
    """samples(folder, ...): what both flags read of it, after inspection; the same, or the test fails."""
    import accelerate

    accelerate.PartialState()
    (tmp_path / "out").mkdir()
    caplog.set_level(logging.INFO, "t2i_training")

    def read(place, caption_column="text", skip=False, image_column="image", **changes):
        outcomes = []
        for flag in ("train_data_dir", "dataset_name"):
            args = data_args(
                **{flag: str(place)}, image_column=image_column, caption_column=caption_column,
                output_dir=str(tmp_path / "out"), skip_bad_samples=skip, cache_dir=str(tmp_path / "cache"), **changes,
            )  # fmt: skip
            try:
                if fault := data_faults.refusal(str(place), args):
                    raise SystemExit(f"error: --{flag} {place} {fault}")
                dataset, _ = inspection.inspect(args, ONE_PROCESS, open_dataset(args, seed=0), caption_column)
                outcomes.append(dataset.to_list())
            except SystemExit as stop:
                outcomes.append(stop.code.replace(flag, "FLAG").replace(f"--FLAG {place}", "FLAG"))
        assert outcomes[0] == outcomes[1]
        assert isinstance(outcomes[0], list) or "\n" not in outcomes[0]
        return outcomes[0]

    return read


def fill(folder, *files: str, **texts: str | bytes):
    """A folder of image files, and of others with what they hold: fill(folder, "a.png", metadata_csv=...)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    for name, content in texts.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(rows) -> list:
    assert isinstance(rows, list), rows
    return [row["text"] for row in rows]


# --- splits


def test_other_splits_are_left_out_by_both_flags_and_named(samples, tmp_path, caplog):
    for split, count in (("train", 3), ("test", 2), ("Validation", 1)):
        tiny.make_pictures(tmp_path / "set" / split, count)
    assert texts(samples(tmp_path / "set")) == ["image 0", "image 1", "image 2"]
    said = "3 samples of train/metadata.jsonl; left out as other splits: Validation/metadata.jsonl, test/metadata.jsonl"
    assert f"--train_data_dir {tmp_path / 'set'}: {said}" in caplog.messages
    assert "have no line" not in caplog.text
    assert len(samples(tmp_path / "set" / "test")) == 2, "asked for by its own name"


def test_a_split_that_the_training_metadata_lists_itself_is_read(samples, tmp_path):
    folder = fill(tmp_path / "set", "test/0.png", "1.png")
    (folder / "metadata.jsonl").write_text(lines({"file_name": "test/0.png", "text": "a"}))
    assert texts(samples(folder)) == ["a"]


def test_only_other_splits(samples, tmp_path):
    tiny.make_pictures(tmp_path / "set" / "test", 2)
    expected = "has no split named train, only: test; to train on one of them, name its folder, e.g. "
    assert samples(tmp_path / "set") == f"error: FLAG {expected}{tmp_path / 'set' / 'test'}"


def test_splits_of_tables_are_named_when_left_out(samples, tmp_path, caplog):
    (tmp_path / "set").mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = {"image": [{"bytes": PNG, "path": None}] * count, "text": ["a"] * count}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "set" / f"{split}.parquet")
    assert len(samples(tmp_path / "set")) == 3
    assert "3 samples of the split train, read as parquet; left out as other splits: test (2)" in caplog.text


def test_images_without_captions_are_for_the_decoder_alone(samples, tmp_path, caplog):
    folder = fill(tmp_path / "set", "train/steam_train.png", "train/b.png", "test/c.png")
    assert len(samples(folder, caption_column=None)) == 2
    assert "2 samples from images without metadata; left out as other splits: test (1 images)" in caplog.text
    assert "holds no captions: write each into a file beside its image, e.g. 0001.txt for 0001.jpg" in samples(folder)


# --- zip


def pack(path, **members: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


LISTED = lines(*({"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(4)))


@pytest.mark.parametrize("inside", [True, False])
def test_images_in_a_zip(inside, samples, tmp_path, caplog, monkeypatch):
    """With their metadata.jsonl in it, or beside it. Nothing is unpacked; what was good is remembered."""
    members = {f"{i}.png": _stored(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(4)}
    members |= {"__MACOSX/._0.png": b"", "metadata.jsonl": LISTED.encode()} if inside else {}
    pack(tmp_path / "set" / "images.zip", **members)
    if not inside:
        (tmp_path / "set" / "metadata.jsonl").write_text(LISTED)
    rows = samples(tmp_path / "set")
    assert texts(rows) == [f"caption {i}" for i in range(4)]
    assert rows[2]["image"] == {"bytes": None, "path": f"zip://2.png::{tmp_path}/set/images.zip"}
    with Image.open(io.BytesIO(image_file(rows[2]["image"]))) as image:
        assert image.getpixel((0, 0)) == (2, 0, 0)
    assert "4 samples of metadata.jsonl, with what images.zip holds" in caplog.text
    monkeypatch.setattr(images, "decode_with_size", None)
    assert len(samples(tmp_path / "set")) == 4


@pytest.mark.parametrize(("workers", "cached"), [(2, False), (0, True)])
def test_a_run_trains_on_a_zip(workers, cached, command, tmp_path):
    members = {f"{i}.png": (PNG + bytes(i)) for i in range(4)} | {"metadata.jsonl": LISTED.encode()}
    pack(tmp_path / "set" / "images.zip", **members)
    tokens = command(
        "sd_lora", train_data_dir=tmp_path / "set", output_dir=tmp_path / "out", dataloader_num_workers=workers,
        cache_encodings=cached,
    )  # fmt: skip
    load_script("sd_lora").main(tokens)
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04 cut", "images.zip cannot be read as a zip: File is not a zip file"),
        (b"", "cannot be read as a zip"),
    ],
)
def test_a_damaged_zip_is_named(content, reason, samples, tmp_path):
    fill(tmp_path / "set", images_zip=content)
    assert reason in samples(tmp_path / "set")


def test_a_damaged_member_of_a_zip_is_named(samples, tmp_path):
    path = pack(
        tmp_path / "set" / "images.zip", **{f"{i}.png": PNG for i in range(4)}, **{"metadata.jsonl": LISTED.encode()}
    )
    content = path.read_bytes()
    place = content.index(PNG) + 40
    path.write_bytes(content[:place] + b"\xff\xff" + content[place + 2 :])
    message = samples(tmp_path / "set")
    assert f"row 0 (zip://0.png::{path}, metadata.jsonl line 1): the file is damaged (BadZipFile: Bad CRC-32" in message


def test_a_zip_leads_nowhere_else(samples, tmp_path):
    fill(tmp_path, "outside.png")
    listed = lines({"file_name": "../outside.png", "text": "a"}, {"file_name": "in.png", "text": "b"})
    pack(tmp_path / "set" / "i.zip", **{"../outside.png": PNG, "in.png": PNG, "metadata.jsonl": listed.encode()})
    assert texts(samples(tmp_path / "set", skip=True)) == ["b"]


def test_a_path_within_a_zip_as_datasets_gives_it(tmp_path):
    """What `load_dataset` makes of a zip of the hub, once it is downloaded."""
    path = pack(tmp_path / "i.zip", **{"a/b.png": PNG})
    assert image_file({"bytes": None, "path": f"zip://a/b.png::{path}"}) == PNG
    with pytest.raises(images.UnreadableImage, match="no item named 'c"):
        image_file({"bytes": None, "path": f"zip://c.png::{path}"})


# --- tables


def test_images_of_a_table_are_cast(samples, tmp_path):
    """Bytes, structures of bytes and path, pixels, and names of files below the folder."""
    folder = fill(tmp_path / "set", "images/0.png", "1.png")
    pixels = np.zeros((4, 4, 3), np.uint8).tolist()
    columns = {
        "bytes": [PNG, PNG], "struct": [{"bytes": PNG, "path": None}] * 2, "half": [{"bytes": PNG}] * 2,
        "pixels": [pixels, pixels], "names": ["images/0.png", str(folder / "1.png")], "text": ["a", "b"],
        "number": [1, 2],
    }  # fmt: skip
    for name in ("a", "b", "c"):  # more tables than images
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"train-{name}.parquet")
    for column in ("bytes", "struct", "half", "pixels", "names"):
        assert texts(samples(folder, image_column=column)) == ["a", "b"] * 3, column
    assert "'number' holds int64, not images" in samples(folder, image_column="number")
    message = samples(folder, image_column="image")
    assert "--image_column 'image' is not a column; there are: bytes, struct, half, pixels, names" in message


def test_names_in_a_table_that_no_file_has(samples, tmp_path):
    folder = fill(tmp_path / "set", "0.png", "1.JPG")
    fill(tmp_path, "outside.png")
    names = ["0.png", "1.jpg", "../outside.png", str(tmp_path / "outside.png"), None]
    (folder / "train.json").write_text(lines(*({"image": name, "text": "a"} for name in names)))
    for name in ("validation.json", "test.json"):
        (folder / name).write_text(lines({"image": "0.png", "text": "a"}))
    message = samples(folder)
    assert "4 of 5 samples cannot be used; row 1 (" in message
    assert "No such file: 1.jpg; did you mean 1.JPG?" in message
    assert len(samples(folder, skip=True)) == 1
    listed = [
        json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped_samples.jsonl").read_text().splitlines()
    ]
    assert "leads outside of the folder" in listed[1]
    assert "is an absolute path that leads outside" in listed[2]


def test_columns_that_are_probably_meant(samples, tmp_path):
    (tmp_path / "set").mkdir()
    features = datasets.Features(
        {"photo": datasets.Image(), "prompt": datasets.Value("string"), "id": datasets.Value("string")}
    )
    rows = {"photo": [{"bytes": PNG, "path": None}], "prompt": ["a"], "id": ["b"]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    assert samples(tmp_path / "set").endswith("did you mean --image_column=photo?")
    assert samples(tmp_path / "set", image_column="photo").endswith("did you mean --caption_column=prompt?")


# --- metadata.csv

CSV = {  # what metadata.csv holds -> captions of its two samples
    "comma": "file_name,text\n0.png,a fox\n1.png,a hen\n",
    "semicolon": "file_name;text\n0.png;a fox\n1.png;a hen\n",
    "tab": "file_name\ttext\n0.png\ta fox\n1.png\ta hen\n",
    "captions first": "text,file_name\na fox,0.png\na hen,1.png\n",
    "byte order mark": "\ufefffile_name,text\n0.png,a fox\n1.png,a hen\n",
    "line ends": "file_name,text\r\n0.png,a fox\r\n\r\n1.png,a hen\r\n",
    "sep": "sep=;\r\nfile_name;text\r\n0.png;a fox\r\n1.png;a hen\r\n",
    "spaces": 'file_name, text\n0.png, "a fox"\n1.png,a hen\n',
    "quotes": '"file_name","text"\n"0.png","a fox"\n"1.png","a hen"\n',
    "empty columns": "file_name,text,,\n0.png,a fox,,\n1.png,a hen,,\n",
}


@pytest.mark.parametrize("case", CSV)
def test_csv_of_any_spreadsheet(case, samples, tmp_path):
    folder = fill(tmp_path / "set", "0.png", "1.png", metadata_csv=CSV[case])
    assert texts(samples(folder)) == ["a fox", "a hen"]


def test_words_and_numbers_of_a_csv_stand_as_they_are(samples, tmp_path):
    words = ["NA", "None", "null", "nan", "42", "1e3", "True", "2024-01-01", "a, b", "two\nlines", 'a "fox"', "  x "]
    text = "file_name,text\n" + "".join(
        '{}.png,"{}"\n'.format(i, word.replace('"', '""')) for i, word in enumerate(words)
    )
    folder = fill(tmp_path / "set", *(f"{i}.png" for i in range(len(words))), metadata_csv=text)
    assert texts(samples(folder)) == words


CSV_FAULTS = [  # (a line after two good ones, what is said of it)
    ("2.png", "the line has 1 field, the header 2"),
    ("2.png,a fox, a hen", "the line has 3 fields, the header 2: a caption that holds ',' must stand in double quotes"),
    ("2.png,", "it has no caption"),
    (",a fox", "file_name is missing"),
    ("gone.png,a fox", "No such file: gone.png"),
    ('2.png,"a" fox', "the line is not CSV: ',' expected after '\"'"),
    ('2.png,"a fox', "the line is not CSV: unexpected end of data (read until line 5; is a quote not closed?)"),
    ("https://a.org/2.png,a", "is a URL: download the image, and name its file"),
    ("../outside.png,a", "leads outside of the folder of its metadata.csv"),
]


@pytest.mark.parametrize(("line", "reason"), CSV_FAULTS)
def test_every_fault_of_a_csv_has_its_line(line, reason, samples, tmp_path, caplog):
    text = f'file_name,text\n0.png,"two\nlines"\n1.png,b\n{line}\n'
    folder = fill(tmp_path / "set", "0.png", "1.png", "2.png", "left.png", metadata_csv=text)
    message = samples(folder)
    assert "1 of 3 samples cannot be used; row 2 (" in message
    assert "metadata.csv line 5): " in message
    assert reason in message
    assert "left.png" in caplog.text
    assert "have no line in metadata.csv and are left out: " in caplog.text
    assert texts(samples(folder, skip=True)) == ["two\nlines", "b"]


CSV_REFUSED = {  # what metadata.csv holds -> what is said
    "Windows": ("file_name,text\n0.png,café\n".encode("cp1252"), "metadata.csv line 2 is not UTF-8 (byte 0xe9)"),
    "UTF-16": ("file_name,text\n".encode("utf-16"), "metadata.csv is UTF-16: save it as UTF-8"),
    "UTF-16 without mark": ("file_name,text\n".encode("utf-16-le"), "metadata.csv is UTF-16: save it as UTF-8"),
    "twice": ("file_name,text,text\n0.png,a,b\n", "metadata.csv line 1 names the column 'text' twice"),
    "no header": ("0.png,a fox\n", "metadata.csv line 1 holds values: the first line must name the columns"),
    "other header": (
        "filename,caption\n0.png,a fox\n",
        "metadata.csv line 2 has no file_name, only: filename, caption; rename 'filename' to file_name, and pass "
        "--caption_column=caption",
    ),
    "empty": ("file_name,text\n", "holds no samples"),
    "Git LFS": (
        "version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer in place of it: run `git lfs pull`",
    ),
}


@pytest.mark.parametrize("case", CSV_REFUSED)
def test_a_csv_that_cannot_be_read_at_all(case, samples, tmp_path):
    content, expected = CSV_REFUSED[case]
    message = samples(fill(tmp_path / "set", "0.png", metadata_csv=content))
    assert message.startswith("error: FLAG")
    assert expected in message
    assert "Error:" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '[{"file_name": "0.png"}]',
            "the line is not a JSON object but a list of them: write each on a line of its own",
        ),
        ('{\n"file_name": "0.png"\n}', "; an object, {...}, must stand on one line"),
        ('{"file_name": "0.png", "text": "caf\u00e9"}'.encode("cp1252"), "it is not UTF-8"),
    ],
)
def test_json_that_is_not_one_object_a_line(content, expected, samples, tmp_path):
    assert expected in samples(fill(tmp_path / "set", "0.png", metadata_jsonl=content))


def test_a_row_without_a_name_says_what_it_has(samples, tmp_path):
    rows = lines({"file_name": "0.png", "text": "a"}, {"image": "1.png", "text": "b"})
    folder = fill(tmp_path / "set", "0.png", "1.png", metadata_jsonl=rows)
    assert "row 1 (metadata.jsonl line 2): it has no image: no file_name, only: image, text" in samples(folder)


def test_metadata_parquet_is_checked_alike(samples, tmp_path):
    folder = fill(tmp_path / "set", "0.png", "1.png")
    table = pyarrow.table({"file_name": ["0.png", "gone.png"], "text": ["a", "b"]})
    pyarrow.parquet.write_table(table, folder / "metadata.parquet")
    assert f"row 1 ({folder}/gone.png, metadata.parquet row 2): No such file: gone.png" in samples(folder)
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    assert "metadata.parquet cannot be read as Parquet: " in samples(folder)


def test_two_metadata_files_in_one_folder(samples, tmp_path):
    folder = fill(tmp_path / "set", "0.png", metadata_csv="file_name,text\n0.png,a\n", metadata_jsonl="{}")
    assert "metadata.csv and metadata.jsonl are in one folder: keep one of them" in samples(folder)


# --- names

MEANT = [  # (file_name, the file on the disk)
    ("IMG_0.jpg", "IMG_0.JPG"), ("img_0.png", "IMG_0.png"), ("0.jpg", "0.png"), ("0", "0.png"),
    ("0.png", "images/0.png"), ("images/0.png", "0.png"), ("a%20fox.png", "a fox.png"), ("a fox.png", "a_fox.png"),
    (" 0.png ", "0.png"), ("1.png", "0001.png"), ("forrest.png", "forest.png"),
    ("caf\u00c3\u00a9.png", "caf\u00e9.png"),
    ("./Images/0.JPEG", "images/0.jpg"), ("/old/place/0.png", None),
]  # fmt: skip


@pytest.mark.parametrize(("named", "there"), MEANT)
def test_the_file_that_was_probably_meant(named, there, samples, tmp_path):
    folder = fill(tmp_path / "set", there or "0.png", "other.png")
    (folder / "metadata.jsonl").write_text(
        lines({"file_name": named, "text": "a"}, {"file_name": "other.png", "text": "b"})
    )
    message = samples(folder)
    if there is None:
        assert "is an absolute path that leads outside of the folder" in message
    else:
        assert f"; did you mean {there}?" in message


@pytest.mark.parametrize(("named", "there"), [("p9.png", "p4.png"), ("photo_a.png", "photo_b.png"), ("x.png", "y.png")])
def test_no_file_is_proposed_that_was_hardly_meant(named, there, samples, tmp_path):
    folder = fill(tmp_path / "set", there)
    (folder / "metadata.jsonl").write_text(lines({"file_name": named, "text": "a"}))
    message = samples(folder)
    assert f"No such file: {named}" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(("stored", "named"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_compared_after_normalisation(stored, named, samples, tmp_path, caplog):
    """macOS takes accents apart in the names of files."""
    name = "caf\u00e9 \u0439\u30ac.png"
    folder = fill(tmp_path / "set", unicodedata.normalize(stored, name))
    listed = lines({"file_name": unicodedata.normalize(named, name), "text": "a"})
    (folder / "metadata.jsonl").write_text(listed)
    assert texts(samples(folder)) == ["a"]
    assert "left out" not in caplog.text


def test_an_absolute_name_inside_the_folder(samples, tmp_path):
    folder = fill(tmp_path / "set", "0.png")
    (tmp_path / "link").symlink_to(folder)
    (folder / "metadata.jsonl").write_text(lines({"file_name": str(folder / "0.png"), "text": "a"}))
    for place in (folder, tmp_path / "link"):
        assert texts(samples(place)) == ["a"]


KEYS = [  # (rows, what is said)
    ([{"image": "0.png", "prompt": "a"}], "rename 'image' to file_name, and pass --caption_column=prompt"),
    ([{"file": "0.png", "text": "a"}], "metadata.jsonl line 1 has no file_name, only: file, text; rename 'file'"),
    (
        [{"filename": "gone.jpg", "caption": ["a", "b"]}],
        "rename 'filename' to file_name, and pass --caption_column=cap",
    ),
    (
        [{"text": "a"}],
        "metadata.jsonl line 1 has no file_name, only: text; each line needs a file_name that names its image",
    ),
]


@pytest.mark.parametrize(("rows", "expected"), KEYS)
def test_other_keys(rows, expected, samples, tmp_path):
    assert expected in samples(fill(tmp_path / "set", "0.png", metadata_jsonl=lines(*rows)))


def test_a_caption_column_of_another_name(samples, tmp_path):
    folder = fill(tmp_path / "set", "0.png", metadata_jsonl=lines({"file_name": "0.png", "prompt": "a"}))
    expected = (
        "--caption_column 'text' is not a column; there are: image, prompt; did you mean --caption_column=prompt?"
    )
    assert samples(folder) == f"error: {expected}"


NEAR = {  # a file in place of metadata.jsonl -> what is to be done with it
    "metadata.json1": "metadata.json1 must be named metadata.jsonl",
    "metadata.jsonl.txt": "metadata.jsonl.txt must be named metadata.jsonl",
    "Metadata.JSONL": "Metadata.JSONL must be named metadata.jsonl",
    "meta_data.csv": "meta_data.csv must be named metadata.csv",
    "metdata.csv": "metdata.csv must be named metadata.csv",
    "metadata.tsv": "metadata.tsv must be named metadata.csv",
    "metadata.xlsx": "metadata.xlsx must be saved as metadata.csv",
    "metadata.jsonl.gz": "metadata.jsonl.gz must be unpacked",
    "metadata.json": "metadata.json must become metadata.jsonl, with each entry as one line",
    "captions.csv": "if captions.csv lists the images, it must be named metadata.csv",
}


@pytest.mark.parametrize("name", NEAR)
def test_what_is_there_in_place_of_metadata(name, samples, tmp_path):
    folder = fill(tmp_path / "set", "0.png", "1.png")
    (folder / name).write_text('[\n  {"file_name": "0.png"}\n]' if name.endswith(".json") else LISTED)
    message = samples(folder)
    assert message.startswith("error: FLAG holds no metadata.jsonl, with a line for each image such as ")
    assert message.endswith(NEAR[name]) or NEAR[name] in message


# --- captions that are cut


def test_captions_that_are_cut_are_counted_once(samples, tmp_path, base_tokenizer, caplog):
    """The tokenizer of the tests reads 16 tokens, two of them the ends, and makes one of each letter."""
    texts = ["short", "x" * 14, "y" * 15, "many words " * 30, "many words " * 30, "", "a b c d"]
    folder = fill(tmp_path / "set", *(f"{i}.png" for i in range(len(texts))))
    (folder / "metadata.jsonl").write_text(lines(*({"file_name": f"{i}.png", "text": t} for i, t in enumerate(texts))))
    args = data_args(train_data_dir=str(folder))
    dataset = open_dataset(args, seed=0)
    assert captions.report_cuts(base_tokenizer, dataset, args, ONE_PROCESS) is base_tokenizer
    (said,) = [line for line in caplog.messages if "are longer than" in line]
    assert said == (
        "2 of 6 different captions are longer than the 14 tokens that are read, and the rest is cut off; the longest, "
        f"of row 3 ({folder}/3.png, metadata.jsonl line 4), has 270, and what follows '...many words many w' is "
        "lost: shorten them"
    )
    caplog.clear()
    captions.report_cuts(base_tokenizer, dataset, args, ONE_PROCESS, 2)
    assert "1 of 6 different captions are longer than the 28 tokens that are read" in caplog.text
    assert caplog.text.strip().endswith("is lost: shorten them, or give --max_token_length")
    caplog.clear()
    captions.report_cuts(base_tokenizer, dataset.select([0, 1, 5, 6]), args, ONE_PROCESS)
    assert caplog.messages == []
    args.validation_prompts = ["a cat", "a prompt of many letters", "a prompt of many letters"]
    captions.report_cuts(base_tokenizer, dataset.select([0, 1, 5, 6]), args, ONE_PROCESS)
    said = "1 validation prompts are longer than these 14 tokens and cut off, e.g. 'a prompt of many letters'"
    assert caplog.messages == [said]


@pytest.fixture(scope="module")
def base_tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def test_a_run_says_that_captions_are_cut(command, tmp_path, caplog):
    folder = fill(
        tmp_path / "set", "0.png", metadata_jsonl=lines({"file_name": "0.png", "text": "a long caption " * 9})
    )
    load_script("prior").main(command("prior", train_data_dir=folder, output_dir=tmp_path / "out", max_train_steps=1))
    assert caplog.text.count("1 of 1 different captions are longer than the ") == 1


# --- what is no image

KINDS = {  # content -> what is said
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "a HEIC image, which Pillow reads with the package pillow-heif: pip install",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "not an image but an SVG drawing, which Pillow cannot read: convert",
    b"<?xml version='1.0'?>\n<!-- x -->\n<svg width='1'/>": "not an image but an SVG drawing",
    b"\n<!DOCTYPE html><html><title>404</title>": "not an image but an HTML page, saved in place of the image",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "not an image but an XML text, saved in place",
    b'{"error": "not found"}': "not an image but a JSON text, saved in place of the image",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "a Git LFS pointer in place of it: run `git",
    b"%PDF-1.7\n": "not an image but a PDF document: convert it",
    b"\0\0\0\x18ftypmp42\0\0\0\0isom": "not an image but a video: take single images out of it",
    b"RIFF\0\0\0\0AVI LIST": "not an image but a video (AVI)",
    b"\xff\x0a\x00\x00": "a JPEG XL image, which Pillow reads with a package: pip install pillow-jxl",
    b"PK\x03\x04\x14": "not an image but a zip archive: unpack it",
    bytes(500): "it begins with zero bytes only",
    b"": "the file is empty",
    b"hello there": "not an image but a text that begins 'hello there'",
    b"\x9c\x01\xfe\xfa\x88": "not an image, or of a format that Pillow cannot read",
}


@pytest.mark.parametrize("content", KINDS, ids=lambda content: str(content[:20]))
def test_a_file_that_is_no_image_says_what_it_is(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    for source in (content, str(tmp_path / "a.jpg")):
        with pytest.raises(images.UnreadableImage) as fault:
            images.decode(source, (8, 8))
        assert KINDS[content] in str(fault.value)


def test_more_pixels_than_pillow_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(images.UnreadableImage) as fault:
        images.decode(_stored(Image.new("RGB", (2000, 1500))))
    assert "the image has 3 million pixels; above 2 million Pillow takes it for a decompression bomb" in str(
        fault.value
    )
    assert "make it smaller" in str(fault.value)


# --- faults that are not the sample's


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(24, "Too many open files"), MemoryError()])
def test_a_fault_of_the_machine_ends_the_inspection(error, samples, tmp_path, monkeypatch):
    """Also with --skip_bad_samples: the images are good."""
    folder = tiny.make_pictures(tmp_path / "set", 3)

    def fail(_path):
        raise error

    monkeypatch.setattr(data_files, "stamped", fail)
    message = samples(folder, skip=True)
    assert message.startswith(f"error: {folder}/0.png could not be read: {type(error).__name__}")
    assert "not the image's: start again once it is fixed" in message
    assert not (tmp_path / "out" / "skipped_samples.jsonl").exists()


def loader(dataset, make_sample):
    return loading.TrainingDataset(dataset, [(8, 8)] * len(dataset), make_sample, "image", seed=0)


@pytest.mark.parametrize("error", [OverflowError("int too big"), KeyError("width"), ValueError("a bug")])
def test_a_fault_of_the_code_is_not_put_on_the_sample(error, pictures):
    """It goes its way, with a note on the sample that was at hand."""

    def make_sample(row, draw):
        image_file(row["image"])
        raise error

    args = data_args(train_data_dir=str(pictures))
    with pytest.raises(type(error)) as raised:
        loader(open_dataset(args, seed=0), make_sample)[(0, 1)]
    assert raised.value is error
    assert f"raised while row 1 ({pictures}/1.png, metadata.jsonl line 2) was prepared" in raised.value.__notes__[0]


def test_a_fault_of_the_disk_ends_a_run_without_blaming_the_image(pictures):
    def make_sample(row, draw):
        raise OSError(5, "Input/output error")

    args = data_args(train_data_dir=str(pictures))
    with pytest.raises(BadSample, match=r"row 1 \(.*could not be read: OSError: .*the fault is the machine's"):
        loader(open_dataset(args, seed=0), make_sample)[(0, 1)]


def test_a_copy_of_save_to_disk_is_read_by_both_flags(samples, tmp_path, pictures):
    rows = {"image": [{"bytes": PNG, "path": None}] * 2, "text": ["a", "b"]}
    stored = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=stored, test=stored).save_to_disk(tmp_path / "set")
    assert texts(samples(tmp_path / "set")) == ["a", "b"]
    shutil.rmtree(tmp_path / "set")
    stored.save_to_disk(tmp_path / "set")
    assert texts(samples(tmp_path / "set")) == ["a", "b"]
