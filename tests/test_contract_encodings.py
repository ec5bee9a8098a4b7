"""Contract: --cache_encodings changes nothing but the time: the same losses, the same resume, nothing encoded twice."""

import functools
import gc
import shutil
import signal

import numpy as np
import pytest
import tiny
import torch
from conftest import load_script
from PIL import Image
from runs import LARGE_EPSILON, assert_alike, interrupt, outcome, wait_until
from safetensors.torch import load_file, save_file
from scripts import SCRIPTS, TORCH
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from t2i_training.encodings import cache

# Six images of 40 x 32, two times two an update.
RUN = {
    "max_train_steps": 3, "checkpointing_steps": 3, "gradient_accumulation_steps": 2, "lr_warmup_steps": 0,
    "learning_rate": 1e-4, **LARGE_EPSILON,
}  # fmt: skip
# The centre alone is the same with the cache as without; of other places the cache has a few, chosen beforehand.
VIEWS = {script: {"center_crop": True} if script.startswith("sd") else {} for script in TORCH}
ENCODED = {script: (12 if script.startswith("sd") else 6, 0 if "decoder" in script else 7) for script in TORCH}


@pytest.fixture(scope="module")
def train(command):
    """train(script, output_dir, **changes): a run in this process; returns its output folder."""

    def run(script, output_dir, **changes):
        load_script(script).main(
            command(script, output_dir=output_dir, **RUN | SCRIPTS[script].draws | VIEWS[script] | changes)
        )
        return output_dir

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """whole(script): output folder of an uninterrupted cached run, one for all tests: leave it as it is."""
    return functools.cache(lambda script: train(script, tmp_path_factory.mktemp("whole") / "out", cache_encodings=True))


def shards(folder, kind="*") -> set:
    """The cache's files, which are named by their content, below an output folder or an --encodings_dir."""
    return set(folder.glob(f"**/{kind}-*/*.safetensors"))


def count(folder, kind) -> int:
    return sum(len(load_file(path)["keys"]) for path in shards(folder, kind))


# The same training


@pytest.mark.parametrize("script", TORCH)
def test_cached_training_is_the_same_training(train, whole, script, tmp_path):
    plain, cached = train(script, tmp_path / "plain"), whole(script)
    assert (count(cached, "images"), count(cached, "captions")) == ENCODED[script], "both mirrorings, and no caption"
    assert_alike(cached, plain, SCRIPTS[script].trained)


@pytest.mark.parametrize("script", TORCH)
def test_resumed_cached_run_is_bit_identical(train, whole, script, tmp_path):
    pieces = tmp_path / "pieces"
    for _ in range(2):
        with interrupt(1):
            train(script, pieces, cache_encodings=True, resume_from_checkpoint="latest")
    train(script, pieces, cache_encodings=True, resume_from_checkpoint="latest", dataloader_num_workers=2)
    assert outcome(pieces, 3, SCRIPTS[script].trained, 15) == outcome(whole(script), 3, SCRIPTS[script].trained, 15)


def test_more_processes_than_encodings(command, server, tmp_path):
    """One has nothing to encode, and waits for the other."""
    data = tiny.make_pictures(tmp_path / "one", count=1)
    options = {"center_crop": True, "cache_encodings": True, "max_train_steps": 1}
    tokens = command("sd", train_data_dir=data, output_dir=tmp_path / "out", **options)
    run = server.start(tokens, tmp_path, "sd", processes=2)
    assert run.wait_for_all() == [0, 0], run.output()


@pytest.mark.parametrize("script", ["sd", "prior"])
def test_two_processes(command, whole, server, script, tmp_path):
    """Each encodes half of it; both read all of it."""
    options = {
        **RUN,
        **SCRIPTS[script].draws,
        **VIEWS[script],
        "cache_encodings": True,
        "gradient_accumulation_steps": 1,
    }
    tokens = command(script, output_dir=tmp_path / "two", **options)
    run = server.start(tokens, tmp_path, script, processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    assert len(shards(tmp_path / "two", "images")) == 2
    assert_alike(tmp_path / "two", whole(script))


# What it saves


@pytest.mark.parametrize("script", TORCH)
def test_a_step_costs_the_trained_network_alone(train, script, tmp_path, monkeypatch):
    """An update more costs two forward and backward passes of the trained network."""
    module, seen = load_script(script), []
    compute_loss = module.compute_loss
    monkeypatch.setattr(module, "compute_loss", lambda *inputs: seen.append(inputs) or compute_loss(*inputs))

    def flops_of_a_micro_batch(name, **options):
        """Counted from the end of the first update to that of the second, which takes two micro-batches."""
        counts = []
        hook = register_optimizer_step_post_hook(lambda *_: counts.append(counter.get_total_flops()))
        try:
            with FlopCounterMode(display=False) as counter:
                train(script, tmp_path / name, max_train_steps=2, **options)
        finally:
            hook.remove()
        return (counts[1] - counts[0]) / 2

    cached, plain = flops_of_a_micro_batch("cached", cache_encodings=True), flops_of_a_micro_batch("plain")
    with FlopCounterMode(display=False) as counter:
        compute_loss(*seen[-1]).backward()
    assert cached == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert plain > 1.05 * cached


def networks_run(train, *arguments, **options) -> set[str]:
    """The classes of the frozen networks that compute during a run."""
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module).__name__))
    try:
        train(*arguments, **options)
    finally:
        hook.remove()
    return seen & {"Encoder", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"}


@pytest.mark.parametrize("script", TORCH)
def test_warm_run_encodes_nothing(train, script, tmp_path):
    """Of the same run, in another output folder; nor does it write anything."""
    shared = tmp_path / "shared"
    options = {"cache_encodings": True, "encodings_dir": shared}
    if "decoder" in script:
        options["image_embeds_dropout"] = 0  # else the empty embedding is computed, one forward pass a run
    assert networks_run(train, script, tmp_path / "first", **options)
    written = {path: path.stat().st_mtime_ns for path in shards(shared)}
    assert networks_run(train, script, tmp_path / "second", **options) == set()
    assert {path: path.stat().st_mtime_ns for path in shards(shared)} == written
    assert not (tmp_path / "second" / "encodings").exists()
    assert outcome(tmp_path / "first", 3, SCRIPTS[script].trained, 15) == outcome(
        tmp_path / "second", 3, SCRIPTS[script].trained, 15
    )


def test_full_and_lora_runs_share(train, whole, tmp_path):
    options = {"cache_encodings": True, "encodings_dir": whole("sd") / "encodings", "max_train_steps": 1}
    assert networks_run(train, "sd_lora", tmp_path / "lora", **options) == set()


# What is encoded anew


def test_what_has_changed_is_encoded_anew(train, pictures, model, v_model, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(pictures, data)
    shutil.copy(pictures / "0.png", data / "6.png")
    metadata = (pictures / "metadata.jsonl").read_text() + '{"file_name": "6.png", "text": "image 1"}\n'
    (data / "metadata.jsonl").write_text(metadata)

    def run(script="sd", **changes):
        shutil.rmtree(out, ignore_errors=True)
        options = {"caption_dropout": 0, "train_data_dir": data, "encodings_dir": tmp_path / "shared"} | changes
        train(script, out, cache_encodings=True, max_train_steps=1, **options)
        return count(tmp_path / "shared", "images"), count(tmp_path / "shared", "captions")

    assert run() == (12, 6), "an image and a caption that are there twice are encoded once"
    assert run(caption_dropout=0.1) == (12, 7), "the empty caption"
    Image.new("RGB", (32, 32)).save(data / "6.png")
    assert run() == (14, 7), "an edited image, and its mirror image"
    (data / "metadata.jsonl").write_text(metadata.replace("image 5", "image five"))
    assert run() == (14, 8), "an edited caption"
    assert run(image_interpolation_mode="bicubic") == (28, 8), "all images, resized otherwise"
    assert run(resolution=16) == (42, 8), "all images, in another size"
    assert run(pretrained_model_name_or_path=other_weights(model, tmp_path, "vae")) == (56, 8), "another VAE"
    assert run(pretrained_model_name_or_path=other_weights(model, tmp_path, "text_encoder")) == (56, 14)
    assert run(mixed_precision="bf16") == (70, 20), "in another precision"
    assert run(pretrained_model_name_or_path=v_model, seed=9) == (70, 20), "with another scheduler nothing changes"
    assert run("sd_lora") == (70, 20)


def other_weights(model, folder, part):
    """A copy of the model, of which one number of a network is another."""
    copy = folder / f"other-{part}"
    shutil.copytree(model, copy)
    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 0.5
    from safetensors.torch import save_file

    save_file(weights, file, metadata={"format": "pt"})
    return copy


def test_crops(train, pictures, tmp_path):
    """Of an image that is not square a few random crops are kept, the same for every run, and each is used."""
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    for i in range(6):
        Image.effect_noise((50, 50) if i == 0 else (500, 32), 90).convert("RGB").save(data / f"{i}.png")
    options = {
        "center_crop": None, "train_data_dir": data, "cache_encodings": True, "encodings_dir": tmp_path / "shared",
        "max_train_steps": 1,
    }  # fmt: skip
    train("sd", tmp_path / "three", cache_crops=3, **options)
    assert count(tmp_path / "shared", "images") == 2 * (5 * 3 + 1)
    train("sd", tmp_path / "four", **options)
    assert count(tmp_path / "shared", "images") == 2 * (5 * 4 + 1), "three of four are there"
    train("sd", tmp_path / "again", cache_crops=3, seed=8, **options)
    assert count(tmp_path / "shared", "images") == 2 * (5 * 4 + 1), "where they lie does not depend on the seed"
    folder = {path.parent for path in shards(tmp_path / "shared", "images")}.pop()
    latents = torch.cat([load_file(path)["latents_mean"] for path in folder.glob("*.safetensors")])
    assert len(latents.flatten(1).unique(dim=0)) == 2 * (5 * 4 + 1), "no two are the same"


# Faults


SLOWLY = """
import sys, time
from conftest import load_script
from t2i_training.encodings import cache, store

def add(*arguments, add=store.Store.add):
    add(*arguments)
    time.sleep(0.3)

cache.BATCH, cache.SHARD, store.Store.add = 1, 2, add
load_script("sd").main(sys.argv[1:])
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_stopped_while_encoding(train, command, server, tmp_path, monkeypatch, number, status):
    """What was written stays and is not encoded again; SIGTERM also writes what was encoded since."""
    monkeypatch.setattr(cache, "BATCH", 1)
    monkeypatch.setattr(cache, "SHARD", 2)
    whole = train("sd", tmp_path / "whole", cache_encodings=True)
    out, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text(SLOWLY)
    tokens = command("sd", output_dir=out, cache_encodings=True, **RUN | SCRIPTS["sd"].draws | VIEWS["sd"])
    run = server.start(tokens, tmp_path, program)
    written = wait_until(lambda: len(shards(out)) >= 2 and shards(out))
    run.kill(number)
    assert run.wait() == status
    committed = shards(out)
    assert written <= committed
    assert 4 <= count(out, "images") < 12
    train("sd", out, cache_encodings=True)
    assert committed <= shards(out), "files of before are as they were"
    assert (count(out, "images"), count(out, "captions")) == (12, 7), "and nothing is there twice"
    assert [path for path in out.glob("encodings/*/*") if path.suffix != ".safetensors"] == []
    assert outcome(out, 3, SCRIPTS["sd"].trained, 15) == outcome(whole, 3, SCRIPTS["sd"].trained, 15)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit": flip,
    "the end": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "all": lambda path: path.write_bytes(b""),
    "the header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "not there": lambda path: path.unlink(),
    "another's content": lambda path: shutil.copy(next(p for p in shards(path.parents[1]) if p != path), path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_encoded_again(train, whole, tmp_path, caplog, damage):
    first = whole("sd")
    shutil.copytree(first / "encodings", tmp_path / "shared")
    (path,) = shards(tmp_path / "shared", "images")
    DAMAGE[damage](path)
    caplog.clear()
    second = train("sd", tmp_path / "second", cache_encodings=True, encodings_dir=tmp_path / "shared")
    assert ("is damaged" in caplog.text) is (damage not in ("not there", "another's content"))
    assert count(tmp_path / "shared", "images") == 12
    assert outcome(first, 3, SCRIPTS["sd"].trained, 15) == outcome(second, 3, SCRIPTS["sd"].trained, 15)


def test_unwritable_folder(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: --encodings_dir .*file"):
        train("sd", tmp_path / "out", cache_encodings=True, encodings_dir=tmp_path / "file")


def test_foreign_files_are_left_alone(train, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "notes.txt").write_text("mine")
    train("sd", tmp_path / "out", cache_encodings=True, encodings_dir=shared, max_train_steps=1)
    assert (shared / "notes.txt").read_text() == "mine"


def test_validation_draws_as_without_the_cache(train, tmp_path):
    options = {"validation_prompts": ["a", "b"], "max_train_steps": 1}
    folders = [train("sd", tmp_path / str(cached), cache_encodings=cached, **options) for cached in (False, True)]
    for step in (0, 1):  # before the first update and after it: what was rounded there is a level of 255 at most
        grids = [Image.open(folder / "validation" / f"step-{step:06d}.png") for folder in folders]
        first, second = (np.asarray(grid, dtype=int) for grid in grids)
        assert np.abs(first - second).max() <= step


def overflowing(folder, source, part: str, factor: float):
    """A copy of a model whose VAE, or MoVQ, gives latents `factor` times as large."""
    shutil.copytree(source, folder)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight"):  # each of them is finite
        weights[name] *= factor**0.5
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def check_overflow(train, script, models: dict, tmp_path, said: str, **flags):
    """Nothing that is not finite is cached, or trained on. The rest of what was encoded stays."""
    latents = "latents_mean" if script == "sd" else "latents"
    for cached in (True, False):
        out = tmp_path / str(cached)
        with pytest.raises(SystemExit) as stop:
            train(script, out, cache_encodings=cached, train_batch_size=1, logging_steps=1, **models, **flags)
        line = str(stop.value)
        assert f"the frozen networks' {latents} is not finite for row " in line
        assert line.startswith("error: the frozen" if cached else "error: loss nan at step 1, nothing saved since; ")
        assert line.endswith(said)
        stored = [load_file(path) for path in shards(out, "images")]
        assert all(tensor.isfinite().all() for shard in stored for tensor in shard.values())
        assert not list(out.glob("checkpoint-*"))


@pytest.mark.parametrize("script", ["sd", "decoder"])
def test_encodings_that_are_not_finite(train, script, model, decoder_model, tmp_path):
    source, part = (model, "vae") if script == "sd" else (decoder_model, "movq")
    name = "pretrained_model_name_or_path" if script == "sd" else "pretrained_decoder_model_name_or_path"
    models = {name: overflowing(tmp_path / "model", source, part, 1e50)}
    said = ": the weights of a frozen network may be damaged, or too large"
    check_overflow(train, script, models, tmp_path, said)


@pytest.mark.gpu
@pytest.mark.parametrize("script", ["sd", "decoder"])
def test_encoders_that_overflow_in_fp16(train, script, model, decoder_model, tmp_path):
    source, part = (model, "vae") if script == "sd" else (decoder_model, "movq")
    name = "pretrained_model_name_or_path" if script == "sd" else "pretrained_decoder_model_name_or_path"
    models = {name: overflowing(tmp_path / "model", source, part, 1e6)}
    said = "a frozen network overflows in fp16: take --mixed_precision=bf16 or no, or a model with another VAE"
    check_overflow(train, script, models, tmp_path, said, mixed_precision="fp16")
    train(script, tmp_path / "bf16", mixed_precision="bf16", cache_encodings=True, **models)


@pytest.mark.gpu
@pytest.mark.parametrize("script", TORCH)
def test_encoders_leave_the_device(train, script, tmp_path, monkeypatch):
    module, seen = load_script(script), []
    compute_loss = module.compute_loss

    def measure(*inputs, **options):
        seen[-1].append(torch.cuda.memory_allocated())
        return compute_loss(*inputs, **options)

    monkeypatch.setattr(module, "compute_loss", measure)
    for cached in (False, True):
        gc.collect()  # networks are in cycles: those of the run before would count
        seen.append([])
        train(script, tmp_path / str(cached), cache_encodings=cached, max_train_steps=1)
    plain, cached = map(min, seen)
    assert cached < plain


def test_flags_that_need_the_cache(command):
    for flags in ({"encodings_dir": "x"}, {"cache_crops": 2}):
        with pytest.raises(SystemExit) as stop:
            load_script("sd").parse_args(command("sd", **flags))
        assert stop.value.code == 2
