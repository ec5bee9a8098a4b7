"""Contract: more folders as people bring them. Both flags read the same of each, or say in one line what is wrong."""

import io
import os
import tarfile
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from bad_samples import _stored
from PIL import Image
from test_contract_data_forms import PNG, fill, lines, pack, samples  # noqa: F401

from t2i_training.data.dataset import image_file

A, B = {"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": "b"}
BOTH = lines(A, B)


def two(folder, **texts):
    return fill(folder, "0.png", "1.png", **texts)


def tar(path, mode="w", **members: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def listed(folder, **texts):
    """Metadata that lists images which are not there, and what is there in their place."""
    return fill(folder, metadata_jsonl=BOTH, **texts)


def of_one_name(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(PNG)
    (folder / "metadata.jsonl").write_text(lines({"file_name": name, "text": "a"}))


def table(folder, **columns):
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")


def metadata_table(folder, **columns):
    two(folder)
    pyarrow.parquet.write_table(
        pyarrow.table({"file_name": ["0.png", "1.png"], **columns}), folder / "metadata.parquet"
    )


def instead(folder, name, make):
    two(folder, metadata_jsonl=BOTH)
    (folder / name).unlink()
    make(folder / name)


READ = {  # a folder -> the captions that are read
    "csv with an index": (lambda f: two(f, metadata_csv=",file_name,text\n0,0.png,a\n1,1.png,b\n"), ["a", "b"]),
    "csv of old Macs": (lambda f: two(f, metadata_csv="file_name,text\r0.png,a\r1.png,b\r"), ["a", "b"]),
    "csv with bars": (lambda f: two(f, metadata_csv="file_name|text\n0.png|a\n1.png|b\n"), ["a", "b"]),
    "csv with inches": (lambda f: two(f, metadata_csv='file_name,text\n0.png,a 5" fox\n1.png,b\n'), ['a 5" fox', "b"]),
    "csv with semicolons in captions": (
        lambda f: two(f, metadata_csv="file_name,text\n0.png,a; b; c\n1.png,b\n"),
        ["a; b; c", "b"],
    ),
    "csv with captions of several lines": (
        lambda f: two(f, metadata_csv='file_name,text\n0.png,"a\nfox"\n1.png,b\n'),
        ["a\nfox", "b"],
    ),
    "captions of few values": (
        lambda f: metadata_table(f, text=pyarrow.array(["a", "b"]).dictionary_encode()),
        ["a", "b"],
    ),
    "captions of large strings": (
        lambda f: metadata_table(f, text=pyarrow.array(["a", "b"], pyarrow.large_string())),
        ["a", "b"],
    ),
    "captions in .txt files, and an archive": (
        lambda f: (two(f, old_tar="x"), (f / "0.txt").write_text("a"), (f / "1.txt").write_text("b")),
        ["a", "b"],
    ),
    "captions in lists": (lambda f: metadata_table(f, text=[["a", "c"], ["b"]]), [["a", "c"], ["b"]]),
    "brackets": (lambda f: of_one_name(f, "[1] a*b?.png"), ["a"]),
    "colons": (lambda f: of_one_name(f, "a::b.png"), ["a"]),
    "like an address": (lambda f: of_one_name(f, "zip:/a#b%20c.png"), ["a"]),
    "a line feed": (lambda f: of_one_name(f, "a\nb.png"), ["a"]),
    "a space at its end": (lambda f: of_one_name(f, "a.png "), ["a"]),
    "of 244 letters": (lambda f: of_one_name(f, "a" * 240 + ".png"), ["a"]),
    "metadata in each folder, of two kinds": (
        lambda f: (
            fill(f / "x", "0.png", metadata_jsonl=lines(A)),
            fill(f / "y", "1.png", metadata_csv="file_name,text\n1.png,b\n"),
        ),
        ["a", "b"],
    ),
    "metadata by a link": (
        lambda f: (
            two(f),
            (f.parent / "m.jsonl").write_text(BOTH),
            (f / "metadata.jsonl").symlink_to(f.parent / "m.jsonl"),
        ),
        ["a", "b"],
    ),
    "a link to the folder itself": (lambda f: (two(f, metadata_jsonl=BOTH), (f / "loop").symlink_to(f)), ["a", "b"]),
    "two links that lead in a circle": (
        lambda f: (
            two(f, metadata_jsonl=BOTH),
            (f / "x").mkdir(),
            (f / "x" / "up").symlink_to(f),
            (f / "y").symlink_to(f / "x"),
        ),
        ["a", "b"],
    ),
    "a folder linked twice": (
        lambda f: (
            fill(f.parent / "away", "0.png"),
            f.mkdir(),
            (f / "x").symlink_to(f.parent / "away"),
            (f / "y").symlink_to(f.parent / "away"),
            (f / "metadata.jsonl").write_text(
                lines({"file_name": "x/0.png", "text": "a"}, {"file_name": "y/0.png", "text": "b"})
            ),
        ),
        ["a", "b"],
    ),
    "a folder within a zip": (
        lambda f: pack(f / "d.zip", **{"d/0.png": PNG, "d/1.png": PNG, "d/metadata.jsonl": BOTH.encode()}),
        ["a", "b"],
    ),
    "two zips, each with metadata": (
        lambda f: (
            pack(f / "a.zip", **{"0.png": PNG, "metadata.jsonl": lines(A).encode()}),
            pack(f / "b.zip", **{"0.png": PNG, "metadata.jsonl": lines(A | {"text": "b"}).encode()}),
        ),
        ["a", "b"],
    ),
    "two zips of images, and metadata beside them": (
        lambda f: (listed(f), pack(f / "a.zip", **{"0.png": PNG}), pack(f / "b.zip", **{"1.png": PNG})),
        ["a", "b"],
    ),
    "macOS' forks": (
        lambda f: (two(f, metadata_jsonl=BOTH), (f / "._0.png").write_bytes(b"x"), (f / ".DS_Store").write_bytes(b"x")),
        ["a", "b"],
    ),
    "Windows' slashes": (
        lambda f: (
            fill(f, "images/0.png"),
            (f / "metadata.jsonl").write_text(lines({"file_name": "images\\0.png", "text": "a"})),
        ),
        ["a"],
    ),
}
REFUSED = {  # a folder -> what is said
    "images in a tar": (
        lambda f: (listed(f), tar(f / "images.tar", **{"0.png": PNG})),
        "No such file: 0.png; unpack images.tar: such archives are not read",
    ),
    "images in a tar.gz": (
        lambda f: (listed(f), tar(f / "images.tar.gz", "w:gz", **{"0.png": PNG})),
        "; unpack images.tar.gz: such archives",
    ),
    "images in a 7z": (
        lambda f: (listed(f), (f / "images.7z").write_bytes(b"7z")),
        "; unpack images.7z: such archives",
    ),
    "images in several rars": (
        lambda f: (listed(f), (f / "a.part1.rar").write_bytes(b"R"), (f / "a.part2.rar").write_bytes(b"R")),
        "; unpack a.part1.rar, a.part2.rar: such archives are not read",
    ),
    "a tar with metadata": (
        lambda f: tar(f / "d.tar", **{"0.png": PNG, "metadata.jsonl": lines(A).encode()}),
        "; unpack d.tar: such archives are not read",
    ),
    "a zip in a zip": (
        lambda f: pack(f / "out.zip", **{"in.zip": pack(f.parent / "in.zip", **{"0.png": PNG}).read_bytes()}),
        "holds no images; unpack in.zip: such archives are not read",
    ),
    "images of one name in two zips": (
        lambda f: (listed(f), pack(f / "a.zip", **{"0.png": PNG}), pack(f / "b.zip", **{"0.png": PNG, "1.png": PNG})),
        "a.zip and b.zip both hold 0.png: unpack them into folders of their own",
    ),
    "nothing": (lambda f: f.mkdir(), "is empty"),
    "no images": (lambda f: fill(f, notes_md="x"), "holds no images"),
    "a web page as metadata": (
        lambda f: two(f, metadata_jsonl="<!DOCTYPE html><html></html>"),
        "metadata.jsonl is a web page, saved in its place",
    ),
    "a web page as csv": (
        lambda f: two(f, metadata_csv="\n<html></html>"),
        "metadata.csv is a web page, saved in its place",
    ),
    "a folder as metadata": (lambda f: (two(f), (f / "metadata.jsonl").mkdir()), "metadata.jsonl is a folder"),
    "metadata by a link to nothing": (
        lambda f: (two(f), (f / "metadata.jsonl").symlink_to("/nowhere/m.jsonl")),
        "metadata.jsonl is a link to nothing: /nowhere/m.jsonl",
    ),
    "an image by a link to nothing": (
        lambda f: instead(f, "1.png", lambda p: p.symlink_to("/nowhere/1.png")),
        "it is a link to nothing: /nowhere/1.png",
    ),
    "a link to itself as image": (
        lambda f: instead(f, "1.png", lambda p: p.symlink_to("1.png")),
        "it is a link to nothing: 1.png",
    ),
    "a folder as image": (lambda f: instead(f, "1.png", lambda p: p.mkdir()), "Is a directory"),
    "a pipe as image": (lambda f: instead(f, "1.png", os.mkfifo), "it is not a file, but a pipe, socket or device"),
    "jsonl in Windows' code page": (
        lambda f: two(f, metadata_jsonl='{"file_name": "0.png", "text": "café"}\n'.encode("cp1252")),
        "it is not UTF-8",
    ),
    "quotes with backslashes": (
        lambda f: two(f, metadata_csv='file_name,text\n0.png,"a \\"fox\\""\n1.png,b\n'),
        'a double quote within quotes is written twice, "", and not',
    ),
    "a comment before the header": (
        lambda f: two(f, metadata_csv="# captions\nfile_name,text\n0.png,a\n"),
        "metadata.csv line 1 names no columns: the header must stand there",
    ),
    "a column of bytes": (
        lambda f: table(f, jpg=[PNG], txt=["a"]),
        "there are: jpg, txt; did you mean --image_column=jpg?",
    ),
    "a column of addresses": (
        lambda f: table(f, image=["https://a.org/0.png"], text=["a"]),
        "is a URL: download the image",
    ),
    "a column of base64": (
        lambda f: table(f, image=["iVBORw0KGgo="], text=["a"]),
        "--image_column 'image' holds string, not images",
    ),
    "a copy of save_to_disk without a training split": (
        lambda f: datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(f),
        "has no split named train, only: test",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case, samples, tmp_path):  # noqa: F811
    make, captions = READ[case]
    make(tmp_path / "set")
    rows = samples(tmp_path / "set")
    assert isinstance(rows, list), rows
    assert [row["text"] for row in rows] == captions


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, samples, tmp_path):  # noqa: F811
    make, said = REFUSED[case]
    make(tmp_path / "set")
    line = samples(tmp_path / "set")
    assert isinstance(line, str), line
    assert said in line.replace(f"{tmp_path}/set/", "")


def test_zips_with_metadata_do_not_mix_their_images(samples, tmp_path):  # noqa: F811
    for name, colour in (("a", "red"), ("b", "blue")):
        image = _stored(Image.new("RGB", (8, 8), colour))
        pack(tmp_path / "set" / f"{name}.zip", **{"0.png": image, "metadata.jsonl": lines(A | {"text": name}).encode()})
    rows = samples(tmp_path / "set")
    colours = {}
    for row in rows:
        with Image.open(io.BytesIO(image_file(row["image"]))) as image:
            colours[row["text"]] = image.getpixel((0, 0))
    assert colours == {"a": (255, 0, 0), "b": (0, 0, 255)}
    assert zipfile.is_zipfile(tmp_path / "set" / "a.zip"), "nothing is unpacked"
