"""Faults in data are found before training, all of them, and named; odd images that are good come out right."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import bad_samples
import datasets
import numpy as np
import pytest
import tiny
import torch
from bad_samples import PIXELS
from conftest import flags, load_script, short_run
from PIL import Image
from runs import after_update, checkpoints, outcome, wait_until
from safetensors.torch import save_file

from t2i_training.data import images, inspection
from t2i_training.data.dataset import open_dataset
from t2i_training.run.checkpoint import verify

ONE_PROCESS = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """(folder, cases) of all bad and odd samples."""
    folder = tmp_path_factory.mktemp("odd") / "pictures"
    return folder, bad_samples.build(folder)


@pytest.fixture
def inspect(tmp_path):
    """inspect(dataset or folder, ...): (data set, images), into tmp_path / "out"."""
    import accelerate

    accelerate.PartialState()
    (tmp_path / "out").mkdir(exist_ok=True)

    def run(source, caption_column="text", skip=False, image_column="image", process=ONE_PROCESS):
        args = bad_samples.data_args(
            train_data_dir=str(source), image_column=image_column, caption_column=caption_column,
            output_dir=str(tmp_path / "out"), skip_bad_samples=skip,
        )  # fmt: skip
        dataset = source if isinstance(source, datasets.Dataset) else open_dataset(args, seed=0)
        return inspection.inspect(args, process, dataset, caption_column)

    return run


def listed(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def refusal(function, *args, **options) -> str:
    with pytest.raises(SystemExit) as stop:
        function(*args, **options)
    assert "\n" not in stop.value.code
    return stop.value.code


# --- the table


def test_at_least_forty_cases_and_as_many_as_stated(odd):
    _, cases = odd
    assert (len(cases), len(bad_samples.bad(cases))) == (87, 41)


def check_list(file, cases) -> None:
    """All bad samples, in order, each with row, file, line and the reason expected."""
    samples, expected = listed(file), bad_samples.bad(cases)
    assert [sample["line"] for sample in samples] == list(expected)
    places = list(cases)
    for sample in samples:
        assert expected[sample["line"]] in sample["reason"]
        assert places[sample["row"]] == sample["line"], "rows count from 0"
    files = {sample["line"]: sample["file"] for sample in samples}
    assert files["metadata.jsonl line 3"].endswith("/pictures/truncated.jpg")


def test_a_run_fails_before_models_are_loaded_and_lists_all(odd, model, tmp_path, caplog):
    """The model's weights are another's, and that would be said if the run came to them."""
    folder, cases = odd
    base = shutil.copytree(model, tmp_path / "model")
    save_file({"other": torch.zeros(1)}, base / "unet" / "diffusion_pytorch_model.safetensors")
    tokens = flags(**short_run(base, folder, tmp_path / "out"))
    with caplog.at_level(logging.WARNING, "t2i_training"):
        message = refusal(load_script("sd").main, tokens)
    first = f"row 2 ({folder}/truncated.jpg, metadata.jsonl line 3): OSError: image file is truncated"
    assert message.startswith(f"error: 41 of 87 samples cannot be used; {first}")
    assert message.endswith(f"{tmp_path}/out/bad_samples.jsonl: fix or remove them, or leave them out with "
                            "--skip_bad_samples")  # fmt: skip
    check_list(tmp_path / "out" / "bad_samples.jsonl", cases)
    rows = [line for line in caplog.messages if line.startswith("row ")]
    assert len(rows) == 20
    assert f"and 21 more, all in {tmp_path}/out/bad_samples.jsonl" in caplog.messages


@pytest.mark.parametrize("script", ["sd", "prior", "decoder_lora"])
def test_skipping_trains_on_the_rest_and_lists_the_dropped(script, odd, command, tmp_path, caplog):
    """One update that sees every sample: each went through the loader, tokenizer and networks. No process count."""
    folder, cases = odd
    good = len(cases) - len(bad_samples.bad(cases))
    changes = {"caption_column": "text"} if script.startswith("decoder") else {}
    tokens = command(
        script, train_data_dir=folder, skip_bad_samples=True, train_batch_size=good, max_train_steps=1,
        output_dir=tmp_path / "out", resolution=32, **changes,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "t2i_training"):
        load_script(script).main(tokens)
    check_list(tmp_path / "out" / "skipped_samples.jsonl", cases)
    assert f"{good} samples of 29 images, {good} an update, 1 updates (1.0 epochs)" in caplog.text
    assert "41 of 87 samples are left out (--skip_bad_samples)" in caplog.text
    (row,) = listed(tmp_path / "out" / "metrics.jsonl")
    assert 0 < row["loss"] < 100


def test_two_processes_find_the_same(odd, command, server, tmp_path):
    folder, cases = odd
    tokens = command("sd", train_data_dir=folder, output_dir=tmp_path / "out")
    run = server.start(tokens, tmp_path, processes=2)
    assert all(run.wait_for_all())
    check_list(tmp_path / "out" / "bad_samples.jsonl", cases)
    assert run.output().count("error: 41 of 87 samples cannot be used") == 1


@pytest.mark.parametrize("world_size", [2, 3, 100])
def test_shares_put_together_are_the_whole(world_size, odd, inspect, monkeypatch):
    """Processes look at their shares apart; gathered in order they are what one process finds. 87 rows for 100, too."""
    whole, pictures = inspect(odd[0], skip=True)
    real, found = inspection._inspect_share, []

    def all_shares(args, _accelerator, *rest):
        for rank in range(world_size):
            process = SimpleNamespace(process_index=rank, num_processes=world_size, is_main_process=rank == 0)
            found.append(real(args, process, *rest))
        return [outcome for share in found for outcome in share]

    monkeypatch.setattr(inspection, "_inspect_share", all_shares)
    both, both_pictures = inspect(odd[0], skip=True)
    assert both_pictures == pictures
    assert both["_line"][:] == whole["_line"][:]
    assert max(map(len, found)) - min(map(len, found)) <= 1


# --- odd images that are good


@pytest.mark.parametrize("name", PIXELS)
def test_odd_picture_comes_out_right(name, odd):
    picture = images.decode(str(odd[0] / name), (1, 1))
    expected = np.array(PIXELS[name], np.uint8)
    assert picture.mode == "RGB"
    if expected.shape[:2] == (1, 1):  # of one colour
        expected = np.broadcast_to(expected, (*picture.size[::-1], 3))
    np.testing.assert_allclose(np.asarray(picture, dtype=int), expected, atol=3 if name.endswith(".jpg") else 0)


def test_pictures_are_described(odd, inspect):
    dataset, pictures = inspect(odd[0], skip=True)
    assert len(dataset) == len(pictures) == 46
    known = {row["path"].rpartition("/")[2]: picture for row, picture in zip(dataset["image"], pictures)}
    assert (known["turned_6.png"].width, known["turned_6.png"].height) == (3, 2)
    assert (known["strip.png"].width, known["strip.png"].height) == (20_000, 10)
    assert (known["plain.jpg"].width, known["plain.jpg"].height) == (64, 48)
    assert known["no_suffix"].digest == known["png_content.jpg"].digest
    assert len({picture.digest for picture in pictures}) < len(pictures)
    assert all(len(picture.digest) == 32 and picture.error is None for picture in pictures)
    assert set(dataset.column_names) == {"image", "text", "_line"}


def test_without_a_caption_column_captions_do_not_matter(inspect, tmp_path):
    folder = tiny.make_pictures(tmp_path / "pictures", count=2)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": 7}\n')
    assert len(inspect(folder, caption_column=None)[0]) == 2
    assert "text is not a text: 7" in refusal(inspect, folder)


# --- columns, and rows without a file


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (["a", None, "b"], "row 1: it has no caption"),
        ([["a"], [], ["b"]], "row 1: its list of captions is empty"),
        ([["a"], ["b", None], ["c"]], "row 1: its list of captions has an empty (null) entry"),
        ([1, 2, 3], "--caption_column 'text' holds int64; it must hold strings or lists of strings"),
        ([[1], [2], [3]], "--caption_column 'text' holds list of int64; it must hold strings or lists of strings"),
    ],
)
def test_what_is_no_caption_is_named(column, reason, inspect):
    assert reason in refusal(inspect, embedded(text=column))


@pytest.mark.parametrize("column", [["a", "", "b"], [["a", "b"], ["c"], [""]]])
def test_strings_and_lists_of_strings_are_captions(column, inspect):
    assert len(inspect(embedded(text=column))[0]) == 3


def test_unknown_caption_column_lists_the_columns(inspect, pictures):
    message = refusal(inspect, pictures, caption_column="caption")
    expected = "--caption_column 'caption' is not a column; there are: image, text; did you mean --caption_column=text?"
    assert message == f"error: {expected}"


def embedded(**columns) -> datasets.Dataset:
    """Three images that are bytes within the data set, such as a parquet file holds."""
    files = [{"bytes": bad_samples._stored(Image.new("RGB", (4, 4), (i, 0, 0))), "path": None} for i in range(3)]
    dataset = datasets.Dataset.from_dict({"image": files, **columns})
    return dataset.cast_column("image", datasets.Image(decode=False))


def test_rows_without_a_picture(inspect):
    dataset = embedded(text=["a", "b", "c"])
    rows = [dataset[0]["image"], None, {"bytes": b"no image", "path": "1.png"}]
    dataset = datasets.Dataset.from_dict({"image": rows, "text": ["a", "b", "c"]}).cast_column(
        "image", datasets.Image(decode=False)
    )
    left, _ = inspect(dataset, skip=True)
    assert left["text"][:] == ["a"]
    assert "2 of 3 samples cannot be used; row 1: it has no image" in refusal(inspect, dataset)


def test_no_usable_sample_at_all(inspect, tmp_path):
    folder = tiny.make_pictures(tmp_path / "pictures", count=2)
    for i in range(2):
        (folder / f"{i}.png").write_bytes(b"")
    message = refusal(inspect, folder, skip=True)
    assert message.startswith(
        f"error: none of the 2 samples can be used; row 0 ({folder}/0.png, metadata.jsonl line 1)"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"file_name": "0.png"}'.encode("utf-16"), "metadata.jsonl is UTF-16: save it as UTF-8"),
        (b"file_name,text\n0.png,a\n", "metadata.jsonl line 1: the line is not JSON"),
        (b"", "holds no samples"),
    ],
)
def test_metadata_that_cannot_be_read_at_all(content, reason, inspect, tmp_path):
    folder = tiny.make_pictures(tmp_path / "pictures", count=1)
    (folder / "metadata.jsonl").write_bytes(content)
    message = refusal(inspect, folder)
    assert message.startswith(f"error: --train_data_dir {folder}")
    assert reason in message


# --- what is only warned of


def test_pictures_without_a_line_are_told(inspect, tmp_path, caplog):
    folder = tiny.make_pictures(tmp_path / "pictures", count=9)
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines[:2]))
    (folder / "notes.txt").write_text("no image")
    assert len(inspect(folder)[0]) == 2
    expected = "have no line in metadata.jsonl and are left out: 2.png, 3.png, 4.png, 5.png, 6.png, ..."
    assert f"7 images in {folder} {expected}" in caplog.messages


def test_repeated_samples_are_told(odd, inspect, caplog):
    """The same file twice, and copies under other names; other captions of an image are no repeat."""
    inspect(odd[0], skip=True)
    told = [line for line in caplog.messages if "repeat an earlier one" in line]
    assert len(told) == 1
    assert told[0].startswith("6 samples repeat an earlier one, image and caption; the first: row ")
    caplog.clear()
    inspect(embedded(text=["a", "b", "c"]))
    assert "repeat" not in caplog.text
    file = odd[0] / "plain.png"
    assert told[0].endswith(f"({file}, metadata.jsonl line 75) as row 0 ({file}, metadata.jsonl line 1)")


# --- the memo


def never(*_args, **_options):
    raise AssertionError("an image was decoded again")


def test_a_second_start_decodes_nothing(pictures, inspect, monkeypatch):
    first = inspect(pictures)[1]
    second_embedded = inspect(embedded(text=["a", "b", "c"]))[1]
    assert inspect(pictures)[1] == first  # the memo was that of the other data set
    monkeypatch.setattr(images, "decode_with_size", never)
    assert inspect(pictures)[1] == first
    assert len(second_embedded) == 3


def test_pictures_within_a_data_set_are_not_read_again(inspect, tmp_path, monkeypatch):
    """As long as the data set is the same by its fingerprint; captions are looked at at every start."""

    def opened():
        options = {"dataset_name": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
        return open_dataset(bad_samples.data_args(**options), seed=0)

    (tmp_path / "data").mkdir()
    stored = embedded(text=["a", None, "c"]).cast_column("image", datasets.Image())
    stored.to_parquet(tmp_path / "data" / "train.parquet")
    first = inspect(opened(), caption_column=None)[1]
    assert [(picture.width, picture.height) for picture in first] == [(4, 4)] * 3
    monkeypatch.setattr(inspection, "_look", never)
    assert inspect(opened(), caption_column=None)[1] == first
    assert "row 1: it has no caption" in refusal(inspect, opened())


def test_a_data_set_that_was_stored_again_is_read_again(inspect, tmp_path):
    """Its fingerprint is that of the names its images were made of, and stays the same."""
    files = sorted(tiny.make_pictures(tmp_path / "pictures", count=2).glob("*.png"))
    seen, marks = [], []
    for _ in range(2):
        stored = datasets.Dataset.from_dict({"image": [str(file) for file in files], "text": ["a", "b"]})
        stored.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "stored")
        dataset = datasets.load_from_disk(tmp_path / "stored").cast_column("image", datasets.Image(decode=False))
        marks.append(dataset._fingerprint)
        seen.append([picture.digest for picture in inspect(dataset)[1]])
        Image.new("RGB", (4, 4)).save(files[1])
    assert marks[0] == marks[1]
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("size_stays", [True, False])
def test_a_changed_file_is_looked_at_again(size_stays, inspect, tmp_path):
    folder = tiny.make_pictures(tmp_path / "pictures", count=2)
    inspect(folder)
    file = folder / "1.png"
    file.write_bytes(bytes(file.stat().st_size) if size_stays else b"no image")
    os.utime(file, ns=(0, 1))
    reason = "it begins with zero bytes only" if size_stays else "not an image"
    assert f"row 1 ({file}, metadata.jsonl line 2): {reason}" in refusal(inspect, folder)


def test_a_bad_file_is_looked_at_again(inspect, tmp_path, monkeypatch):
    """The fault may have been the disk's; and it is not remembered as good."""
    folder = tiny.make_pictures(tmp_path / "pictures", count=2)
    content, status = (folder / "1.png").read_bytes(), (folder / "1.png").stat()
    (folder / "1.png").write_bytes(bytes(len(content)))
    os.utime(folder / "1.png", ns=(0, status.st_mtime_ns))
    refusal(inspect, folder)
    assert (tmp_path / "out" / "bad_samples.jsonl").exists()
    (folder / "1.png").write_bytes(content)
    os.utime(folder / "1.png", ns=(0, status.st_mtime_ns))
    assert len(inspect(folder)[0]) == 2
    assert not (tmp_path / "out" / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pillow": "0", "images": {}}'])
def test_a_damaged_memo_is_passed_over(content, pictures, inspect, tmp_path):
    first = inspect(pictures)[1]
    (tmp_path / "out" / inspection.MEMO).write_bytes(content)
    assert inspect(pictures)[1] == first
    assert json.loads((tmp_path / "out" / inspection.MEMO).read_text())["pillow"] == Image.__version__


def test_ten_thousand_remembered_pictures_are_not_opened(inspect, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    tiny.make_pictures(folder, count=1)
    line = '{"file_name": "0.png", "text": "caption %d"}\n'
    (folder / "metadata.jsonl").write_text("".join(line % i for i in range(10_000)))
    dataset = open_dataset(bad_samples.data_args(train_data_dir=str(folder)), seed=0)
    inspect(dataset.select(range(1)))
    monkeypatch.setattr(images, "decode_with_size", never)
    assert len(inspect(dataset)[1]) == 10_000


# --- stopping


def test_sigterm_ends_the_inspection_at_once(pictures, inspect, tmp_path, monkeypatch):
    """As before the loop: the handler raises SystemExit in the main thread."""
    folder = tiny.make_pictures(tmp_path / "pictures", count=400)
    seen, others = [], threading.enumerate()

    def slow(*_args, **_options):
        seen.append(1)
        time.sleep(0.05)
        return None, (1, 1)

    def stop(_number, _frame):
        raise SystemExit(143)

    monkeypatch.setattr(images, "decode_with_size", slow)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(SystemExit) as stopped:
            inspect(folder)
        assert stopped.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    wait_until(lambda: not [t for t in threading.enumerate() if t not in others and "ThreadPoolExecutor" in t.name])
    assert len(seen) < 200


# --- an image that turns bad while the run goes on


def spoil(folder) -> None:
    for file in folder.glob("*.png"):
        file.write_bytes(b"no image")


@pytest.mark.parametrize(("accumulation", "workers", "updates"), [(1, 0, 5), (3, 0, 5), (1, 2, 12)])
def test_nothing_is_lost_when_a_picture_turns_bad(accumulation, workers, updates, command, tmp_path):
    """The update under way is finished and saved; with the images mended the run goes on as if nothing had been."""
    folder = tiny.make_pictures(tmp_path / "pictures")
    options = {
        "train_data_dir": folder, "max_train_steps": updates, "checkpointing_steps": updates, "train_batch_size": 1,
        "gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers, "use_ema": True,
    }  # fmt: skip
    main = load_script("sd").main
    main(command("sd", output_dir=tmp_path / "whole", **options))
    tokens = command("sd", output_dir=tmp_path / "out", **options)
    with after_update(2, lambda: spoil(folder)):
        message = refusal(main, tokens)
    assert message.startswith("error: row ")
    assert "metadata.jsonl line" in message
    assert "): not an image but a text that begins 'no image'" in message
    (saved,) = checkpoints(tmp_path / "out")
    step = int(saved.removeprefix("checkpoint-"))
    assert step == 3 if workers == 0 else 3 <= step < updates  # workers have read some batches more
    assert len(listed(tmp_path / "out" / "metrics.jsonl")) == step
    tiny.make_pictures(tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        file.rename(folder / file.name)
    main([*tokens, "--resume_from_checkpoint=latest"])
    assert outcome(tmp_path / "out", updates) == outcome(tmp_path / "whole", updates)


def test_a_picture_that_is_needed_no_more_may_turn_bad(command, tmp_path):
    """While the last update is under way all its batches are there, and none is read beyond."""
    folder = tiny.make_pictures(tmp_path / "pictures")
    tokens = command("sd", train_data_dir=folder, output_dir=tmp_path / "out", max_train_steps=4)
    with after_update(3, lambda: spoil(folder)):
        load_script("sd").main(tokens)
    assert (tmp_path / "out" / "model_index.json").exists()


def test_two_processes_save_together_when_one_meets_a_bad_picture(command, server, tmp_path):
    folder, out = tiny.make_pictures(tmp_path / "pictures"), tmp_path / "out"
    tokens = command("sd", train_data_dir=folder, output_dir=out, max_train_steps=10_000, train_batch_size=1)
    run = server.start(tokens, tmp_path, processes=2)
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(listed(out / "metrics.jsonl")) >= 3)
    (folder / "4.png").write_bytes(b"no image")
    assert all(run.wait_for_all())
    assert f"error: row 4 ({folder}/4.png, metadata.jsonl line 5): not an image but a text" in run.output()
    (saved,) = checkpoints(out)
    assert verify(out / saved) is None
    assert listed(out / "metrics.jsonl")[-1]["step"] == int(saved.removeprefix("checkpoint-"))
