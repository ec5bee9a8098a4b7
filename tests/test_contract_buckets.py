"""Contract: aspect-ratio buckets. An update is of one shape; resumed, cached and on two processes it is the same."""

import itertools
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
from conftest import load_script
from PIL import Image
from runs import LARGE_EPSILON, assert_alike, interrupt, outcome, rows
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import SCRIPTS

from t2i_training.data import buckets, draws, loading, order
from t2i_training.data.inspection import ImageInfo

SCRIPTS_OF_IMAGES = ["sd", "sd_lora", "decoder", "decoder_lora"]  # the torch scripts that train on pixels


def args_of(**changes):
    return SimpleNamespace(
        **{"resolution": 512, "use_aspect_ratio_buckets": True, "aspect_ratio_buckets": None} | changes
    )


def choose(sizes: list[tuple[int, int]], effective_batch: int = 1, **changes):
    """Of images with these (width, height)."""
    infos = [ImageInfo(str(i), *size, None) for i, size in enumerate(sizes)]
    return buckets.choose(args_of(**changes), infos, effective_batch)


# --- which shape


def test_without_the_flag_all_are_squares():
    assert choose([(100, 900), (900, 100)], use_aspect_ratio_buckets=False) == ([(512, 512)] * 2, (512, 512))


def test_shape_of_the_nearest_aspect_ratio():
    """Of diffusers' shapes at 512: squares, 9:7, 10:7 and 11:6, upright and lying."""
    sizes = [(4000, 3000), (3000, 4000), (1920, 1080), (600, 900), (1000, 1000), (5000, 1000)]
    shapes, usual = choose(sizes)
    assert shapes == [(448, 576), (576, 448), (384, 704), (640, 448), (512, 512), (384, 704)]
    assert usual == (384, 704), "the one that two have"


def test_small_images_have_smaller_shapes(caplog):
    """Those of a smaller --resolution, in steps of 64, so that none is enlarged."""
    with caplog.at_level("INFO", "t2i_training"):
        shapes, _ = choose([(400, 300), (512, 511), (512, 512), (1000, 300), (63, 65)])
    assert shapes == [(256, 384), (448, 448), (512, 512), (256, 512), (64, 64)]
    named = '--aspect_ratio_buckets="512,512;576,448;448,576;640,448;448,640;704,384;384,704"'
    small = "4 samples are too small for the buckets of --resolution 512, so they have smaller ones"
    assert f"{small}; {named} would enlarge them" in caplog.text
    assert "1 of 5 samples are smaller than their bucket: enlarged" in caplog.text


def test_named_shapes(caplog):
    """As they are, for small images too."""
    with caplog.at_level("INFO", "t2i_training"):
        shapes, usual = choose(
            [(400, 300), (90, 10), (500, 1000), (30, 30)], aspect_ratio_buckets="256,512;512,256;64,64"
        )
    assert shapes == [(64, 64), (256, 512), (512, 256), (64, 64)]
    assert usual == (64, 64)
    assert "2 of 4 samples are smaller than their bucket: enlarged" in caplog.text
    assert "bucket 64 x 64: 2 samples, 12.5% cut off, 1 enlarged" in caplog.text
    assert "bucket 512 x 256: 1 samples, 0.0% cut off" in caplog.text


def test_what_is_cut_off_is_said(caplog):
    with caplog.at_level("INFO", "t2i_training"):
        choose([(1000, 1000), (2000, 1000), (1000, 2000), (1000, 2000)], aspect_ratio_buckets="512,512;640,320")
    assert "bucket 512 x 512: 2 samples, 25.0% cut off" in caplog.text
    assert "bucket 640 x 320: 2 samples, 0.0% cut off" in caplog.text
    assert "2 buckets, height x width: 12.5% of the images' area is cut off, by squares 37.5%" in caplog.text


def test_buckets_with_too_few_images_are_merged(caplog):
    """Into the nearest shape, the smallest first, until an update fits into each."""
    sizes = [(100, 100)] * 5 + [(100, 200)] * 4 + [(100, 210)] * 3 + [(300, 100)]
    named = "96,96;192,96;208,96;96,288"
    shapes, _ = choose(sizes, 4, aspect_ratio_buckets=named)
    assert Counter(shapes) == {(96, 96): 6, (192, 96): 7}
    merged = "merged: 1 of 96 x 288 in 96 x 96, 3 of 208 x 96 in 192 x 96"
    assert f"buckets with fewer samples than an update has (4) are {merged}" in caplog.text
    shapes, _ = choose(sizes, 100, aspect_ratio_buckets=named)
    assert len(set(shapes)) == 1, "fewer images than an update has: it goes through several epochs"
    assert len(set(choose(sizes, 1, aspect_ratio_buckets=named)[0])) == 4


def test_what_cannot_be_is_refused(refused):
    assert "--aspect_ratio_buckets does nothing without --use_aspect_ratio_buckets: add" in refused(
        "sd", aspect_ratio_buckets="64,64"
    )
    too_small = refused("decoder", use_aspect_ratio_buckets=True, resolution=192)
    assert (
        "--use_aspect_ratio_buckets at --resolution 192: its shapes are multiples of 64, too coarse below" in too_small
    )
    for text, line in {
        "64x64": "must be \"height,width;height,width\", not '64x64'", "64,60": "64,60: a side must be a multiple of 8",
        "0,64": "0,64: a side must be positive, not 0", "64,64; 64,64": "names 64,64 twice", "": "must be \"height",
    }.items():  # fmt: skip
        assert line in refused("sd", use_aspect_ratio_buckets=True, aspect_ratio_buckets=text)
    assert "unrecognized arguments: --use_aspect_ratio_buckets" in refused("prior", use_aspect_ratio_buckets=True)


# --- the order

SHAPES = [(32, 32)] * 9 + [(24, 40)] * 7 + [(40, 24)] * 5 + [(16, 64)] * 4


def stream(effective_batch: int, start: int, count: int, waiting=None, seed: int = 3) -> list:
    visits = order.visits(seed, SHAPES, effective_batch, start, {} if waiting is None else waiting)
    return list(itertools.islice(visits, count))


@pytest.mark.parametrize("effective_batch", [1, 2, 3, 4])
def test_each_visit_comes_once_in_an_update_of_one_shape(effective_batch):
    """Those of ten epochs and of what follows, without a gap but for those that wait; they wait for their shape."""
    waiting = {}
    count = 10 * len(SHAPES) // effective_batch * effective_batch
    seen = stream(effective_batch, 0, count, waiting)
    for first in range(0, count, effective_batch):
        assert len({SHAPES[row] for _, row in seen[first : first + effective_batch]}) == 1
    left = [visit for update in waiting.values() for visit in update]
    plain = [(epoch, row) for epoch in range(12) for row in draws.permutation(3, epoch, len(SHAPES)).tolist()]
    assert len(set(seen)) == len(seen)
    assert sorted(seen + left) == sorted(plain[: count + len(left)])
    assert all(
        len(update) < effective_batch and len({SHAPES[row] for _, row in update}) == 1 for update in waiting.values()
    )
    times = Counter(row for _, row in seen)
    assert sum(times.values()) / len(SHAPES) == pytest.approx(10, abs=0.2)
    assert {times[row] for row in range(len(SHAPES))} <= {9, 10, 11}


def test_every_start_continues_the_stream():
    whole = stream(4, 0, 400)
    assert all(stream(4, start, 40) == whole[start : start + 40] for start in range(0, 360, 4))
    assert stream(4, 6, 40) == whole[8:48], "within an update, since the effective batch has changed: from the next"


def test_the_order_differs_between_seeds_and_epochs():
    assert stream(4, 0, 40) != stream(4, 0, 40, seed=4)
    of_shapes = [SHAPES[row] for _, row in stream(4, 0, 400)[::4]]
    runs = [len(list(alike)) for _, alike in itertools.groupby(of_shapes)]
    assert len(set(of_shapes)) == 4
    assert max(runs) < 10, "shapes take turns"


def test_updates_are_the_same_however_they_are_split():
    whole = [sorted(stream(4, 0, 40)[first : first + 4]) for first in range(0, 40, 4)]
    for world_size, batch_size in ((1, 4), (1, 2), (2, 2), (2, 1), (4, 1)):
        ranks = [
            list(
                loading.StreamSampler(
                    order.visits(3, SHAPES, 4, 0, {}), batch_size, rank, world_size, 40 // (world_size * batch_size), {}
                )
            )
            for rank in range(world_size)
        ]
        flat = [visit for batches in zip(*ranks, strict=True) for batch in batches for visit in batch]
        assert [sorted(flat[first : first + 4]) for first in range(0, 40, 4)] == whole


# --- whole runs


RUN = {
    **tiny.BUCKETS, "train_batch_size": 2,
    "gradient_accumulation_steps": 2, "max_train_steps": 8, "checkpointing_steps": 8, "learning_rate": 1e-4,
    **LARGE_EPSILON,
}  # fmt: skip


@pytest.fixture(scope="session")
def bucketed(command, photographs):
    """bucketed(script, **changes): tokens of a run in buckets."""

    def make(script, **changes):
        crops = {"center_crop": True} if script.startswith("sd") else {"center_crop": None}
        return command(script, train_data_dir=photographs, **RUN | crops | changes)

    return make


@pytest.mark.parametrize("script", SCRIPTS_OF_IMAGES)
def test_resumed_and_cached(bucketed, script, tmp_path, caplog):
    """Bit for bit as uninterrupted, and as without the cache."""
    main, trained = load_script(script).main, SCRIPTS[script].trained
    with caplog.at_level("INFO", "t2i_training"):
        main(bucketed(script, output_dir=tmp_path / "plain"))
    found = dict(re.findall(r"bucket (\d+ x \d+): (\d+) samples", caplog.text))
    assert found == {"32 x 32": "5", "40 x 24": "5", "24 x 40": "5", "16 x 64": "4", "64 x 16": "4"}
    assert re.search(r"training ends while \d+ samples of \d buckets wait for others of their shape", caplog.text)
    main(bucketed(script, output_dir=tmp_path / "cached", cache_encodings=True))
    for update in (3, 4, 1):
        with interrupt(update, last=update == 1):
            main(
                bucketed(script, output_dir=tmp_path / "pieces", cache_encodings=True, resume_from_checkpoint="latest")
            )
    assert outcome(tmp_path / "pieces", 8, trained, 10) == outcome(tmp_path / "cached", 8, trained, 10)
    assert_alike(tmp_path / "cached", tmp_path / "plain", trained)
    held = [load_file(path) for path in tmp_path.glob("cached/encodings/images-*/*")]
    latents = "latents" if script.startswith("decoder") else "latents_mean"
    assert Counter({tuple(shard[latents].shape[2:]): len(shard["keys"]) for shard in held}) == {
        (16, 16): 5, (20, 12): 5, (12, 20): 5, (8, 32): 4, (32, 8): 4,
    }  # fmt: skip


def test_ten_epochs(bucketed, tmp_path, monkeypatch, caplog):
    """58 updates of four samples: each of 23 images ten times, but for those that are one ahead or still wait."""
    seen, generator = Counter(), draws.generator

    def spy(seed, epoch, index, name):
        seen[(epoch, index)] += name == "timestep"
        return generator(seed, epoch, index, name)

    monkeypatch.setattr(draws, "generator", spy)
    changes = {"num_train_epochs": 10, "max_train_steps": None, "cache_encodings": True, "dataloader_num_workers": 0}
    with caplog.at_level("INFO", "t2i_training"):
        load_script("sd").main(bucketed("sd", output_dir=tmp_path / "out", **changes))
    visits = [visit for visit, number in seen.items() if number]
    assert (rows(tmp_path / "out")[-1]["step"], len(visits), max(seen.values())) == (58, 58 * 4, 1)
    times = Counter(index for _, index in visits)
    assert len(times) == 23
    assert set(times.values()) <= {9, 10, 11}
    waiting = int(re.search(r"training ends while (\d+) samples of \d buckets wait", caplog.text)[1])
    prefix = [(epoch, row) for epoch in range(11) for row in draws.permutation(3, epoch, 23).tolist()]
    assert len(set(prefix[: 232 + waiting]) - set(visits)) == waiting, "all that came, but for those that wait"


def test_crops_are_cached_where_there_are_several(bucketed, tmp_path):
    """Of the five squares there is one, of the others --cache_crops; each in both mirrorings. Resumed as it was."""
    main, changes = load_script("sd").main, {"center_crop": None, "random_flip": True, "cache_encodings": True}
    main(bucketed("sd", output_dir=tmp_path / "whole", cache_crops=3, **changes))
    held = [load_file(path)["keys"] for path in tmp_path.glob("whole/encodings/images-*/*")]
    assert sum(map(len, held)) == (5 + 18 * 3) * 2
    with interrupt(5):
        main(bucketed("sd", output_dir=tmp_path / "pieces", cache_crops=3, **changes))
    main(bucketed("sd", output_dir=tmp_path / "pieces", cache_crops=3, **changes, resume_from_checkpoint="latest"))
    assert outcome(tmp_path / "pieces", 8) == outcome(tmp_path / "whole", 8)


def test_what_a_run_leaves(bucketed, tmp_path):
    """Validation images in the shape of most images, and the flags in card and header."""
    out, changes = tmp_path / "out", {"aspect_ratio_buckets": "32,32;16,64", "max_train_steps": 2}
    drawing = SCRIPTS["sd_lora"].validates
    load_script("sd_lora").main(bucketed("sd_lora", output_dir=out, save_kohya=True, **drawing, **changes))
    for step in (0, 2):
        with Image.open(out / "validation" / f"step-00000{step}" / "00.png") as image:
            assert image.size == (32, 32)
    card = (out / "README.md").read_text().replace("`", "")
    assert "| use aspect ratio buckets | True |" in card
    assert "| aspect ratio buckets | 32,32;16,64 |" in card
    with safe_open(out / "kohya_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["ss_enable_bucket"] == "True"
    lying = {"aspect_ratio_buckets": "16,64", "output_dir": tmp_path / "lying", "validation_prompt": "a cat"}
    load_script("decoder_lora").main(bucketed("decoder_lora", num_validation_images=1, **changes | lying))
    with Image.open(tmp_path / "lying" / "validation" / "step-000002" / "00.png") as image:
        assert image.width > image.height


def test_resumed_with_another_effective_batch(bucketed, tmp_path, caplog):
    """It trains on, from the next whole update of the new order, and says so."""
    main, changes = load_script("sd").main, {"output_dir": tmp_path / "out", "resume_from_checkpoint": "latest"}
    with interrupt(3):
        main(bucketed("sd", **changes))
    main(bucketed("sd", **changes, train_batch_size=1))
    assert (
        "the effective batch is now 2, not 4, and buckets have another order: some images are seen again" in caplog.text
    )
    assert rows(tmp_path / "out")[-1]["step"] == 8


@pytest.mark.parametrize("script", ["sd", "sd_lora", "decoder"])
def test_two_processes(bucketed, server, script, tmp_path):
    views = {"center_crop": None, "random_flip": True} if script == "sd" else {}
    whole = bucketed(script, output_dir=tmp_path / "one", max_train_steps=4, checkpointing_steps=4, **views)
    load_script(script).main(whole)
    shared = bucketed(
        script, output_dir=tmp_path / "two", max_train_steps=4, checkpointing_steps=4, train_batch_size=1, **views
    )
    run = server.start(shared, tmp_path, script, processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    assert_alike(tmp_path / "two", tmp_path / "one", SCRIPTS[script].trained)
