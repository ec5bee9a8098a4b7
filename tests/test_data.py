"""Captioned images: what is refused and how it is said; which samples every update sees; what a visit draws."""

import copy
import errno
import io
import json
import os
import signal
import time
from collections import Counter
from functools import partial
from multiprocessing import resource_sharer
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from t2i_training.data import captions, draws, loading, order
from t2i_training.data.dataset import ROW_INDEX, BadSample, describe, image_file, image_source, open_dataset
from t2i_training.report.progress import plan_updates
from t2i_training.stopping import StopRequest


def options(**changes):
    defaults = {
        "dataset_name": None, "dataset_config_name": None, "train_data_dir": None, "cache_dir": None,
        "resolution": 32, "image_column": "image", "max_train_samples": None, "train_batch_size": 2,
        "dataloader_num_workers": 0, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "max_train_steps": None,
        "cache_encodings": False, "caption_column": "text", "caption_dropout": 0.0, "caption_prefix": None,
        "caption_suffix": None, "shuffle_caption": False, "caption_tag_dropout_rate": 0.0, "keep_tokens": 0,
        "caption_extension": None, "repeats_from_folders": False, "num_repeats": 1,
    }  # fmt: skip
    return SimpleNamespace(**defaults | changes)


def table_of(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def refusal(function, *args) -> str:
    """The one line with which the run ends."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    message = str(stop.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


# --- opening


def test_data_set_of_save_to_disk(tmp_path):
    """Alone, or as the splits of a dictionary."""
    pixels = np.zeros((2, 2, 3), np.uint8)
    stored = table_of(image=[Image.fromarray(pixels)], text=["a"]).cast_column("image", datasets.Image())
    stored.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=stored).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        dataset = open_dataset(options(dataset_name=str(tmp_path / name)), seed=0)
        assert dataset["text"][:] == ["a"]


def test_folder_of_pictures(pictures):
    dataset = open_dataset(options(train_data_dir=str(pictures)), seed=0)
    assert dataset["text"][:] == [f"image {i}" for i in range(tiny.PICTURES)]
    assert image_file(dataset[2]["image"]) == str(pictures / "2.png")  # not decoded yet
    assert image_source(dataset[2] | {ROW_INDEX: 2}, options()) == str(pictures / "2.png")
    assert image_source(dataset[2] | {ROW_INDEX: 2}, options(cache_encodings=True)) == 2  # not opened at all


def test_local_folder_as_dataset_name(pictures):
    dataset = open_dataset(options(dataset_name=str(pictures)), seed=0)
    assert len(dataset) == tiny.PICTURES


def test_pictures_within_a_parquet_file(tmp_path):
    """Such images are bytes without a file."""
    rows = {"image": [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")], "text": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    dataset = open_dataset(options(dataset_name=str(tmp_path / "set")), seed=0)
    source = image_source(dataset[0] | {ROW_INDEX: 0}, options())
    assert source == image_file(dataset[0]["image"])
    with Image.open(io.BytesIO(source)) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert describe(dataset, "image", 1) == "row 1"


def test_subfolders_are_no_splits_unless_named_like_one(tmp_path):
    for name in ("steam_train", "latest", "night"):
        tiny.make_pictures(tmp_path / "set" / name, count=2)
    assert len(open_dataset(options(train_data_dir=str(tmp_path / "set")), seed=0)) == 6


def test_folder_without_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    message = refusal(open_dataset, options(train_data_dir=str(tmp_path)), 3)
    assert f"--train_data_dir {tmp_path}" in message


def test_missing_split(tmp_path):
    (tmp_path / "set").mkdir()
    table_of(text=["a"]).to_parquet(tmp_path / "set" / "test.parquet")
    message = refusal(open_dataset, options(dataset_name=str(tmp_path / "set")), 3)
    assert "no split named train, only: test" in message


def test_unknown_image_column_lists_the_columns(pictures):
    message = refusal(open_dataset, options(train_data_dir=str(pictures), image_column="photo"), 3)
    expected = "--image_column 'photo' is not a column; there are: image, text; did you mean --image_column=image?"
    assert message == f"error: {expected}"


def test_image_column_without_pictures(pictures):
    message = refusal(open_dataset, options(train_data_dir=str(pictures), image_column="text"), 3)
    assert message == "error: --image_column 'text' holds string, not images; columns with images: image"


# --- some of the samples


def test_max_train_samples_are_chosen_by_the_seed(pictures):
    chosen = {}
    for seed in range(5):
        dataset = open_dataset(options(train_data_dir=str(pictures), max_train_samples=3), seed)
        again = open_dataset(options(train_data_dir=str(pictures), max_train_samples=3), seed)
        chosen[seed] = tuple(dataset["text"])
        assert chosen[seed] == tuple(again["text"])
        assert len(set(chosen[seed])) == 3
    assert len({frozenset(texts) for texts in chosen.values()}) > 1


def test_max_train_samples_may_be_all_but_no_more(pictures):
    everything = options(train_data_dir=str(pictures), max_train_samples=tiny.PICTURES)
    assert len(open_dataset(everything, seed=0)) == tiny.PICTURES
    message = refusal(open_dataset, options(train_data_dir=str(pictures), max_train_samples=tiny.PICTURES + 1), 3)
    assert message == "error: --max_train_samples 7 is more than the 6 samples there are"


# --- captions


def pick(caption, draw, dropout=0.0) -> str:
    return captions.pick_caption(caption, draw, options(caption_dropout=dropout))


def visits(count: int):
    """The draw of each of `count` visits."""
    return [partial(draws.generator, 0, 0, index) for index in range(count)]


def test_each_of_several_captions_is_picked_equally_often():
    picked = Counter(pick(["a", "b", "c"], draw, 0.0) for draw in visits(3000))
    assert set(picked) == {"a", "b", "c"}
    assert all(abs(count - 1000) < 104 for count in picked.values())  # 4 standard deviations


def test_captions_are_dropped_at_the_rate_asked_for():
    dropped = sum(pick("a", draw, 0.1) == "" for draw in visits(10_000))
    assert abs(dropped - 1000) < 120  # 4 standard deviations
    assert all(pick("a", draw, 0.0) == "a" for draw in visits(100))


def test_dropout_does_not_shift_the_choice():
    texts = ["a", "b", "c"]
    for draw in visits(200):
        assert pick(texts, draw, 0.5) in ("", pick(texts, draw, 0.0))


@pytest.mark.parametrize("texts", [["a", "b", "a", ""], [["a", "b"], ["a"], ["", "b"]]])
def test_all_captions_are_those_that_may_be_picked(texts):
    table = table_of(text=texts)
    assert captions.all_captions(table, options()) == ["", "a", "b"], "in an order that does not depend on the process"
    picked = {pick(caption, draw, 0.3) for caption in texts for draw in visits(50)}
    assert picked == set(captions.all_captions(table, options(caption_dropout=0.3))) == {"", "a", "b"}


def test_the_empty_caption_is_among_them_if_captions_are_dropped():
    table = table_of(words=["a", "b"])
    assert captions.all_captions(table, options(caption_column="words")) == ["a", "b"]
    assert captions.all_captions(table, options(caption_column="words", caption_dropout=0.1)) == ["", "a", "b"]


def test_tokens_are_padded_and_cut(model):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    start, end = 512, 513
    empty, short, long = (captions.tokenize(tokenizer, caption) for caption in ("", "ab", "x" * 500))
    assert empty.tolist() == [start] + 15 * [end]
    assert short.shape == long.shape == (16,)
    assert short.dtype == torch.int64
    assert (short == end).sum() == 16 - 3
    assert (long[0], long[-1]) == (start, end)


# --- the stream of samples


def stream(count: int, size=7, seed=3, start=0, **options) -> list:
    """The first `count` batches."""
    visits = order.visits(seed, [(8, 8)] * size, 1, start, {})
    alone = {"rank": 0, "world_size": 1, "count": None, "waiting": {}}
    batches = iter(loading.StreamSampler(visits, **alone | options))
    return [next(batches) for _ in range(count)]


def flat(batches) -> list:
    return [visit for batch in batches for visit in batch]


def test_stream_is_epoch_after_epoch_in_orders_of_their_own():
    expected = [(epoch, int(index)) for epoch in range(3) for index in draws.permutation(3, epoch, 7)]
    assert flat(stream(21, batch_size=1)) == expected


@pytest.mark.parametrize("start", [0, 12, 35])
@pytest.mark.parametrize(
    ("world_size", "accumulation", "batch_size"), [(1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 1, 3), (12, 1, 1)]
)
def test_updates_see_the_same_samples_however_they_are_split(world_size, accumulation, batch_size, start):
    """Over ranks and accumulation, update u sees positions 12 u to 12 u + 11 of the single-process stream."""
    updates = 4
    expected = flat(stream(start + 12 * updates, batch_size=1))[start:]
    split = {"batch_size": batch_size, "world_size": world_size, "start": start}
    ranks = [stream(updates * accumulation, rank=rank, **split) for rank in range(world_size)]
    seen = [visit for micro_batches in zip(*ranks) for visit in flat(micro_batches)]
    assert seen == expected


def test_any_start_continues_the_stream():
    whole = flat(stream(40, batch_size=1))
    for start in range(20):
        assert flat(stream(4, batch_size=5, start=start)) == whole[start : start + 20]


def test_batch_larger_than_the_data_set():
    (batch,) = stream(1, size=2, batch_size=7)
    assert [epoch for epoch, _ in batch] == [0, 0, 1, 1, 2, 2, 3]
    assert all({index for e, index in batch if e == epoch} == {0, 1} for epoch in range(3))


@pytest.mark.parametrize(
    ("changes", "world_size", "plan"),
    [
        ({}, 1, (2, 5)),  # 10 samples, batches of 2
        ({"num_train_epochs": 3}, 1, (2, 15)),
        ({"gradient_accumulation_steps": 2}, 2, (8, 2)),  # 10 / 8, rounded up
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 2}, 2, (8, 4)),  # 30 / 8, rounded up once
        ({"max_train_steps": 7, "num_train_epochs": 3}, 1, (2, 7)),
        ({"train_batch_size": 64}, 1, (64, 1)),
    ],
)
def test_number_of_updates(changes, world_size, plan):
    assert plan_updates(options(**changes), 10, world_size) == plan


# --- the loader

CPU = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"), gradient_accumulation_steps=1)


def visit_record(row, draw):
    """What a sample is made of here: the row and one number drawn for the visit."""
    number = int(row["text"].split()[1])
    assert row[ROW_INDEX] == number
    return {"row": torch.tensor(number), "drawn": torch.tensor(draw("noise").random(), dtype=torch.float64)}


def shapes(dataset) -> list:
    return [(8, 8)] * len(dataset)


def record(dataset, count: int, **changes) -> list:
    stream = loading.batches(
        loading.make_loader(dataset, shapes(dataset), visit_record, options(**changes), CPU, seed=3, start=3), CPU,
        StopRequest(),
    )  # fmt: skip
    return [{name: tensor.tolist() for name, tensor in next(stream).items()} for _ in range(count)]


def test_loader_draws_for_every_visit(pictures):
    dataset = open_dataset(options(train_data_dir=str(pictures)), seed=0)
    visits = flat(stream(12, size=6, batch_size=1))[3:]
    batches = record(dataset, 4)
    assert [index for batch in batches for index in batch["index"]] == [index for _, index in visits[:8]]
    assert all(batch["row"] == batch["index"] for batch in batches)
    expected = [draws.generator(3, epoch, index, "noise").random() for epoch, index in visits[:8]]
    assert [number for batch in batches for number in batch["drawn"]] == expected


def test_workers_change_nothing_and_touch_no_global_generator(pictures):
    dataset = open_dataset(options(train_data_dir=str(pictures)), seed=0)
    before = torch.get_rng_state()
    assert record(dataset, 5, dataloader_num_workers=2) == record(dataset, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_picture_is_named_in_one_line(tmp_path, workers):
    """Row, file and reason, from a worker as from the main process."""
    from t2i_training.data import images

    folder = tiny.make_pictures(tmp_path / "set")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / rows[4]["file_name"]).write_bytes(b"not an image")
    args = options(train_data_dir=str(folder), dataloader_num_workers=workers)
    dataset = open_dataset(args, seed=0)

    def make_sample(row, draw):
        return {"pixels": images.fill(images.decode(image_file(row["image"])), (8, 8), "nearest")}

    loader = loading.make_loader(dataset, shapes(dataset), make_sample, args, CPU, seed=3, start=0)
    message = refusal(list, loading.batches(loader, accumulating(100), StopRequest()))
    assert message.startswith(f"error: row 4 ({folder / '4.png'}, metadata.jsonl line 5): not an image but a text")


class Source:
    """Batches 0, 1, 2, ... of which number `bad` cannot be had."""

    def __init__(self, bad: int | None = None, count: int = 100):
        self.bad, self.count, self.taken = bad, count, 0

    def __iter__(self):
        for number in range(self.count):
            if number == self.bad:
                raise BadSample("row 7 (7.png): gone")
            self.taken += 1
            yield {"number": torch.tensor(number)}


def accumulating(steps: int):
    return SimpleNamespace(**vars(CPU) | {"gradient_accumulation_steps": steps})


@pytest.mark.parametrize("accumulation", [1, 3, 200])
def test_batches_come_in_order_and_all(accumulation):
    numbers = [int(batch["number"]) for batch in loading.batches(Source(), accumulating(accumulation), StopRequest())]
    assert numbers == list(range(100))


def test_no_more_is_held_back_than_an_update_and_not_without_limit():
    for accumulation, held in ((1, 1), (3, 3), (5000, loading.MAX_LOOKAHEAD)):
        source = Source()
        next(loading.batches(source, accumulating(accumulation), StopRequest()))
        assert source.taken == held + 1


@pytest.mark.parametrize(("bad", "updates"), [(0, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (8, 2), (9, 3)])
def test_updates_before_a_bad_sample_are_finished(bad, updates):
    """Of three batches each. The bad sample is known before the last of them begins to be given out."""
    stop, given = StopRequest(), []
    stream = loading.batches(Source(bad), accumulating(3), stop)
    if updates == 0:
        assert refusal(next, stream) == "error: row 7 (7.png): gone"
        return
    while not stop.failure:
        given += [int(next(stream)["number"]) for _ in range(3)]
    assert given == list(range(3 * updates))
    assert str(stop.failure) == "error: row 7 (7.png): gone"


def test_loader_ends_with_the_last_update(pictures):
    dataset = open_dataset(options(train_data_dir=str(pictures)), seed=0)
    args = options(gradient_accumulation_steps=2)
    position = {"seed": 3, "start": 3, "updates": 4}
    loader = loading.make_loader(dataset, shapes(dataset), visit_record, args, accumulating(2), **position)
    assert len(list(loading.batches(loader, accumulating(2), StopRequest()))) == 8


def test_loader_workers_are_counted_for_the_batch_of_all_devices(monkeypatch):
    sizes = []
    monkeypatch.setattr(loading, "loader_workers", lambda _args, pixels: sizes.append(pixels) or 0)
    args, rows = options(train_batch_size=2), [{"image": None}] * 2
    loading.make_loader(rows, [(8, 8), (4, 32)], visit_record, args, CPU, seed=3, start=0, devices=4)
    assert sizes == [8 * 4 * 32]


def test_sample_carries_its_index(pictures):
    samples = loading.TrainingDataset(
        open_dataset(options(train_data_dir=str(pictures)), seed=0), [(8, 8)] * 6, visit_record, "image", seed=3
    )
    sample = samples[(2, 5)]
    assert (sample["index"].item(), sample["row"].item()) == (5, 5)
    assert sample["drawn"].item() == draws.generator(3, 2, 5, "noise").random()
    assert np.unique([samples[(epoch, 5)]["drawn"].item() for epoch in range(9)]).size == 9


class Gone:
    """Stands for a sample's memory whose owner, a worker, no longer answers."""

    def detach(self):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_worker_that_is_killed_while_a_sample_is_on_its_way(pictures, place):
    """Its sockets break before its end is known, as when the kernel takes a process apart; with a GPU, another thread
    notices it.
    """
    dataset = open_dataset(options(train_data_dir=str(pictures)), seed=0)

    def make_sample(row, draw):
        if row[ROW_INDEX] == 0:  # the third visit
            resource_sharer.DupFd = lambda _file: Gone()
        if row[ROW_INDEX] == 3:  # the fourth
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"pixels": torch.zeros(3)}

    args, accelerator = options(dataloader_num_workers=1, train_batch_size=1), copy.copy(CPU)
    accelerator.device = torch.device(place)
    loader = loading.make_loader(dataset, shapes(dataset), make_sample, args, accelerator, seed=3, start=0)
    stream = loading.batches(loader, accelerator, StopRequest())
    next(stream)  # torch listens to its workers' end from now on
    listening = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    time.sleep(0.5)  # in which the third sample has come
    try:
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\) exited unexpectedly"):
            list(stream)
    finally:
        signal.signal(signal.SIGCHLD, listening)


CRASH = """
from types import SimpleNamespace
import torch
from t2i_training.data import loading
from t2i_training.stopping import StopRequest

def make_sample(row, draw):
    return {}

def main():
    args = SimpleNamespace(image_column="image", train_batch_size=1, dataloader_num_workers=2,
                           cache_encodings=False, gradient_accumulation_steps=1)
    cpu = SimpleNamespace(
        process_index=0, num_processes=1, device=torch.device("cpu"), gradient_accumulation_steps=1
    )
    loader = loading.make_loader([{"image": None}], [(8, 8)], make_sample, args, cpu, seed=3, start=0)
    stream = loading.batches(loader, cpu, StopRequest())
    next(stream)
    raise RuntimeError("out of memory")

main()
"""


def test_crash_ends_the_process_although_workers_ignore_sigterm(server, tmp_path):
    """At exit multiprocessing ends leftover children with SIGTERM and waits for them, without a limit."""
    (tmp_path / "crash.py").write_text(CRASH)
    run = server.start([], tmp_path, tmp_path / "crash.py", whole_exit=True)
    assert run.wait() == 1, "-14 would be an alarm's, after minutes"
    assert run.output().endswith("RuntimeError: out of memory\n")
