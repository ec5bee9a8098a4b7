"""The Flax script: the torch script's losses, on any number of devices, resumed bit for bit; diffusers loads it.

Compiling is most of the time here, so nearly all runs are of one program, which a cache on disk keeps.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, load_quick_flax_script, load_script, short_run
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from runs import LARGE_EPSILON, _digest, checkpoints, rows, wait_until, weights
from safetensors.torch import load_file, save_file
from scripts import SCRIPTS
from transformers import CLIPTextModel

jax = pytest.importorskip("jax")
flax = pytest.importorskip("flax")
pytest.importorskip("optax")

import jax.numpy as jnp
from test_contract_buckets import bucketed  # noqa: F401
from test_contract_captions import changed, deep_model, tagged  # noqa: F401
from test_flax_models import old_flax_tree

from t2i_training.report import validation
from t2i_training.run import lifecycle
from t2i_training.run.output_folder import read_metrics
from t2i_training.sd_flax import devices, flops, networks, train_state
from t2i_training.sd_flax import pipeline as flax_pipeline

RUN = {  # six images, four an update
    "resolution": 16, "max_train_steps": 6, "gradient_accumulation_steps": 2, "use_ema": True, "snr_gamma": 5,
    "random_flip": True, "caption_dropout": 0.5, "noise_offset": 0.1, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
    "checkpointing_steps": 6, **LARGE_EPSILON,
}  # fmt: skip
OUTSIDE = (  # flags that are changed here and that a step's program does not depend on: rates are inputs, as weights
    "max_train_steps", "checkpointing_steps", "resume_from_checkpoint", "dataloader_num_workers", "seed",
    "validation_prompts", "center_crop", "learning_rate", "lr_scheduler", "lr_warmup_steps", "logging_steps",
)  # fmt: skip
FROZEN = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
JAX = {  # setting -> its value here, and its default
    "jax_disable_most_optimizations": (True, False), "jax_persistent_cache_min_compile_time_secs": (0, 1.0),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Programs are compiled quickly, and once: here and in the processes that are started here with what it gives."""
    settings = JAX | {"jax_compilation_cache_dir": (str(tmp_path_factory.mktemp("programs")), None)}
    with pytest.MonkeyPatch.context() as patch:
        for name, (value, _) in settings.items():
            jax.config.update(name, value)
        patch.setattr(flops, "count", lambda *_: 10**6)  # a second in each run: test_flax_flops.py counts
        yield {name.upper(): str(value) for name, (value, _) in settings.items()}
    for name, (_, default) in settings.items():
        jax.config.update(name, default)


@pytest.fixture(scope="module")
def tokens(small_model, pictures):
    return lambda output_dir, **changes: flags(**short_run(small_model, pictures, output_dir) | RUN | changes)


@pytest.fixture(scope="module")
def train(tokens):
    """train(output_dir, **changes): a short run in this process; returns its output folder.

    Runs of one program trace its step once, unless they are told to start `anew`.
    """
    steps = {}

    def run(output_dir, script="sd_flax", *, anew=False, **changes):
        def begin(trained, train_step, begin=train_state.TrainState.begin):
            begin(trained, train_step)
            trained.train_step = steps.setdefault(program, trained.train_step)

        program = repr(sorted(item for item in changes.items() if item[0] not in OUTSIDE))
        with pytest.MonkeyPatch.context() as patch:
            if script == "sd_flax" and not anew:
                patch.setattr(train_state.TrainState, "begin", begin)
            load_script(script).main(tokens(output_dir, **changes))
        return output_dir

    return run


programs = []  # how many there were of the step, after each update of `whole`


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        after_steps(patch, lambda trained: programs.append(trained.train_step._cache_size()))
        return train(tmp_path_factory.mktemp("whole") / "out")


def after_steps(patch, look):
    """Let `look(trained)` be called after each update."""
    step = train_state.TrainState.step

    def stepped(self, *inputs):
        result = step(self, *inputs)
        look(self)
        return result

    patch.setattr(train_state.TrainState, "step", stepped)


def outcome(folder: Path, step: int = 6) -> dict:
    """All that a finished run must leave bit for bit: the last checkpoint, the exported pipeline and the metrics."""
    checkpoint = folder / f"checkpoint-{step}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    names = {"unet/diffusion_pytorch_model.safetensors", "unet_ema/diffusion_pytorch_model.safetensors"}
    assert names | {"optimizer.safetensors"} <= set(manifest["files"])
    assert manifest["versions"].items() >= {"jax": jax.__version__, "flax": flax.__version__}.items()
    saved = {name: _digest(checkpoint / name) for name in sorted(manifest.pop("files"))}
    exported = [path for path in folder.glob("[!.cl]*/*") if path.is_file()]
    exported = {str(path.relative_to(folder)): _digest(path) for path in sorted(exported)}
    assert "unet/diffusion_pytorch_model.safetensors" in exported
    return {"manifest": manifest, "saved": saved, "exported": exported, "rows": rows(folder)}


def distance(ours: dict, theirs: dict) -> float:
    """Of weights, relative to their norm."""
    assert ours.keys() == theirs.keys()
    squares = [[(ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()] for name in ours]
    difference, norm = torch.tensor(squares).sum(0)
    return float((difference / norm).sqrt())


# The same training as in torch


def test_same_losses_and_weights_as_the_torch_script(train, tmp_path):
    """Of one command line, for fifty updates: with accumulation, average, Min-SNR, flips and dropped captions."""
    torch_run = train(tmp_path / "torch", script="sd", max_train_steps=50, checkpointing_steps=50)
    ours = train(tmp_path / "flax", max_train_steps=50, checkpointing_steps=50)
    assert len(rows(ours)) == 50
    for row, wanted in zip(rows(ours), rows(torch_run), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4), "step, epoch, loss, learning rate, gradient norm"
    assert rows(ours)[-1]["loss"] < 0.8 * rows(ours)[0]["loss"]
    for folder in ("unet", "checkpoint-50/unet", "checkpoint-50/unet_ema"):
        assert distance(weights(ours, folder), weights(torch_run, folder)) < 1e-5
        config, wanted = (json.loads((run / folder / "config.json").read_text()) for run in (ours, torch_run))
        assert {name: config.get(name) for name in wanted} == wanted
    assert distance(weights(ours), weights(ours, "checkpoint-50/unet")) > 1e-4, "the average is exported"


def test_what_the_torch_script_leaves(train, whole, tmp_path):
    folder = train(tmp_path / "torch", script="sd", max_train_steps=1, checkpointing_steps=9)
    here, there = ({path.name for path in run.iterdir()} for run in (whole, folder))
    assert here - {"checkpoint-6"} == there
    for part in ("vae", "scheduler", "tokenizer"):
        names = {path.name for path in (folder / part).iterdir()}
        assert {path.name for path in (whole / part).iterdir()} == names
        for name in names - {"config.json"}:
            assert _digest(whole / part / name) == _digest(folder / part / name), f"{part}/{name}"
    ours, theirs = (CLIPTextModel.from_pretrained(run / "text_encoder").state_dict() for run in (whole, folder))
    assert distance(ours, theirs) == 0
    ours, theirs = (json.loads((run / "model_index.json").read_text()) for run in (whole, folder))
    assert ours == theirs


# The result


def test_exported_pipeline_loads_and_is_what_was_trained(whole):
    pipeline = StableDiffusionPipeline.from_pretrained(whole)
    averaged = weights(whole, "checkpoint-6/unet_ema")
    state = pipeline.unet.state_dict()
    assert state.keys() == averaged.keys()
    assert all(torch.equal(state[name], averaged[name]) for name in averaged)
    folders = [whole / "checkpoint-6" / name for name in ("unet", "unet_ema")]
    (trained, report), (_, other) = (
        UNet2DConditionModel.from_pretrained(folder, output_loading_info=True) for folder in folders
    )
    assert not any([*report.values(), *other.values()]), "no tensor is missing, none is left over"
    text_encoder = load_file(whole / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in text_encoder), "as older libraries name them"
    assert any(not torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("image 1", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)


def test_no_program_is_compiled_after_the_first_step(whole):
    assert programs == [1] * 6


def test_rows_say_how_fast_it_was(whole):
    for row in read_metrics(whole):
        assert row["tflops_per_second"] == pytest.approx(1e-6 * row["images_per_second"] / 4, rel=1e-3)


def test_validation_draws_what_the_pipeline_draws(train, tmp_path, monkeypatch):
    """In as many steps as a user's takes: the scheduler comes to its full formula after several."""
    monkeypatch.setattr(validation, "STEPS", 20)
    prompts = ["image 1", "a green one"]
    options = {"validation_prompts": prompts, "max_train_steps": 2, "checkpointing_steps": 2}
    ours = train(tmp_path / "flax", **options)
    theirs = train(tmp_path / "torch", script="sd", **options)
    for step in (0, 2):
        assert (ours / "validation" / f"step-00000{step}.png").is_file()
        for i in range(len(prompts)):
            name = f"validation/step-00000{step}/{i:02d}.png"
            picture, wanted = (np.asarray(Image.open(run / name)).astype(int) for run in (ours, theirs))
            assert wanted.std() > 5
            assert np.abs(picture - wanted).max() <= 1


def kinds(folder) -> tuple[set, set]:
    """The dtypes of the captions' encodings, and of all that is trained."""
    saved = {file: {tensor.dtype for tensor in load_file(file).values()} for file in folder.rglob("*.safetensors")}
    encoded = {file.parent.name[:8]: kinds for file, kinds in saved.items() if "encodings" in file.parts}
    kept = [kinds for file, kinds in saved.items() if "encodings" not in file.parts]
    return encoded["captions"], set().union(*kept)


HALF = {"mixed_precision": "bf16", "cache_encodings": True, "center_crop": True}


def test_half_precision_is_of_the_frozen_networks(tokens, tmp_path, monkeypatch):
    """They compute in bfloat16; weights, average and moments stay float32."""
    script = load_quick_flax_script(monkeypatch)
    script.main(tokens(tmp_path / "out", **HALF, max_train_steps=1, checkpointing_steps=1))
    encoded, kept = kinds(tmp_path / "out")
    assert torch.bfloat16 in encoded
    assert kept == {torch.float32, torch.int32}


@pytest.mark.slow(
    "17 s, a program of its own: test_flax_models.py has the UNet's bfloat16, that above all that is kept"
)
def test_half_precision(train, whole, tmp_path):
    """The networks compute in bfloat16; weights, average and moments stay float32."""
    folder = train(tmp_path / "out", **HALF)
    in_full = [row["loss"] for row in rows(whole)]
    losses = [row["loss"] for row in rows(folder)]
    assert losses == pytest.approx(in_full, rel=0.03)
    assert losses != pytest.approx(in_full, rel=1e-4)
    encoded, kept = kinds(folder)
    assert torch.bfloat16 in encoded
    assert kept == {torch.float32, torch.int32}


# Interrupted


@contextlib.contextmanager
def interrupted(update: int, number: int):
    """Inside, this process gets a signal after update `update`, and the run must end because of it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:  # noqa: PT012
        after_steps(patch, lambda trained: trained.updates == update and os.kill(os.getpid(), number))
        yield
    assert stop.value.code == 128 + number


def test_resumed_after_a_signal(train, whole, tmp_path):
    """The step is finished, a checkpoint saved; the same command continues bit for bit."""
    pieces = tmp_path / "pieces"
    for update, number in ((1, signal.SIGTERM), (4, signal.SIGINT)):
        with interrupted(update, number):
            train(pieces, resume_from_checkpoint="latest")
        assert f"checkpoint-{update}" in checkpoints(pieces)
        assert not (pieces / "model_index.json").exists()
    train(pieces, resume_from_checkpoint="latest", dataloader_num_workers=2)
    assert outcome(pieces) == outcome(whole)


@pytest.mark.slow("three compilations: what is done to captions is torch's code, and states are compared elsewhere")
def test_resumed_and_cached_with_all_that_is_done_to_captions(changed, tmp_path):  # noqa: F811
    """As without the cache; and as in torch."""

    def main(name, **changes):
        load_script("sd_flax").main(changed("sd_flax", use_ema=True, output_dir=tmp_path / name, **changes))

    main("plain")
    main("cached", cache_encodings=True)
    with interrupted(1, signal.SIGTERM):
        main("pieces", cache_encodings=True)
    main("pieces", cache_encodings=True, resume_from_checkpoint="latest")
    assert outcome(tmp_path / "pieces", 3) == outcome(tmp_path / "cached", 3)
    load_script("sd").main(changed("sd", output_dir=tmp_path / "torch"))
    for name in ("cached", "torch"):
        assert [row["loss"] for row in rows(tmp_path / name)] == pytest.approx(
            [row["loss"] for row in rows(tmp_path / "plain")], rel=1e-3
        ), name


@pytest.mark.slow("twelve compilations: order and shapes are torch's code, and each program is that of other tests")
def test_resumed_and_cached_in_buckets(bucketed, small_model, tmp_path, monkeypatch):  # noqa: F811
    """As without the cache, and as in torch; a program a bucket."""
    programs, shapes = [], "32,32;40,24;16,64"
    common = {"use_ema": True, "pretrained_model_name_or_path": small_model, "aspect_ratio_buckets": shapes}

    def main(name, script="sd_flax", **changes):
        load_script(script).main(bucketed(script, output_dir=tmp_path / name, **common | changes))

    main("torch", "sd")
    with monkeypatch.context() as patch:
        after_steps(patch, lambda trained: programs.append(trained.train_step._cache_size()))
        main("plain")
    assert (programs[0], programs[-1], len(programs)) == (1, 3, 8)
    main("cached", cache_encodings=True)
    with interrupted(3, signal.SIGTERM):
        main("pieces", cache_encodings=True)
    main("pieces", cache_encodings=True, resume_from_checkpoint="latest")
    assert outcome(tmp_path / "pieces", 8) == outcome(tmp_path / "cached", 8)
    for name in ("cached", "torch"):
        assert [row["loss"] for row in rows(tmp_path / name)] == pytest.approx(
            [row["loss"] for row in rows(tmp_path / "plain")], rel=1e-3
        ), name


def test_resumed_after_being_killed(train, whole, server, environment, tokens, tmp_path):
    out = tmp_path / "out"
    run = server.start(tokens(out, checkpointing_steps=1), tmp_path, "sd_flax", environment=environment)
    wait_until((out / "checkpoint-3").is_dir, 120)
    run.kill(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (out / "model_index.json").exists()
    newest = max(out.glob("checkpoint-?"))
    (newest / "optimizer.safetensors").write_bytes(b"half of a fi")  # passed over for the one before
    train(out, resume_from_checkpoint="latest", checkpointing_steps=6, anew=True)
    assert outcome(out) == outcome(whole)


def test_resumed_with_nothing_left_to_do(train, whole, tmp_path, monkeypatch):
    """The default seed gives way to the checkpoint's. What is trained goes to the devices once, when all is read."""
    folder, before = shutil.copytree(whole, tmp_path / "out"), sum(array.nbytes for array in jax.live_arrays())
    begin, held = train_state.TrainState.begin, []

    def begun(self, *args):
        held.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        begin(self, *args)

    monkeypatch.setattr(train_state.TrainState, "begin", begun)
    train(folder, seed=None, resume_from_checkpoint="latest")
    assert outcome(folder) == outcome(whole)
    assert "seed: 3\n" in (folder / "run_config.yaml").read_text()
    frozen = sum((folder / part).stat().st_size for part in FROZEN)
    assert held[0] < frozen + 10_000, "these, and the noise schedule"
    with pytest.raises(SystemExit, match="--seed 0 differs from the checkpoint's, 3: leave it out to continue"):
        train(folder, seed=0, resume_from_checkpoint="latest")


def test_default_seed(tokens, tmp_path):
    args = load_script("sd_flax").parse_args(tokens(tmp_path / "out", seed=None))
    assert lifecycle.resolve_seed(args, {}) == 0


@pytest.fixture
def trained(tokens, tmp_path):
    """trained(network, precision): what a run in that precision would train."""
    args = load_script("sd_flax").parse_args(tokens(tmp_path / "out"))
    _, mesh, _ = devices.start(args)

    def make(network, precision="no"):
        return train_state.TrainState(args, precision, network, mesh)

    return make


def test_loss_scaling_begins_where_a_checkpoint_has_none(trained, whole, tmp_path):
    """So a run in bf16 may go on in fp16, and one in fp16 in bf16."""
    folder = shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    network = networks.load_unet(folder / "unet")
    run = trained(network, "fp16")
    run.load(folder)
    assert run.state["scaling"] == {"scale": 2.0**16, "good": 0}
    run.state["scaling"] = {"scale": np.float32(2.0**10), "good": np.int32(7)}
    run.begin(lambda *_: None)
    run.save(folder)
    again = trained(network, "fp16")
    again.load(folder)
    assert again.state["scaling"] == {"scale": 2.0**10, "good": 7}
    trained(network, "bf16").load(folder)


def test_checkpoints_that_do_not_fit_are_refused(trained, whole, tmp_path):
    folder = shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    trained = trained(networks.load_unet(folder / "unet"))
    trained.load(folder)
    assert trained.updates == 6
    file = folder / "optimizer.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "conv_in.bias" in name)]
    save_file(tensors, file)
    with pytest.raises(SystemExit, match=r"does not fit this model: .*conv_in\.bias"):
        trained.load(folder)
    file.unlink()
    with pytest.raises(SystemExit, match=r"was not saved by this script: there is no optimizer\.safetensors"):
        trained.load(folder)
    shutil.rmtree(folder / "unet_ema")
    with pytest.raises(SystemExit, match=r"--use_ema: .* was saved without it"):
        trained.load(folder)


# Devices


FOUR_DEVICES = """
import json, sys
from functools import partial
import jax, numpy as np, pytest, torch
from conftest import load_quick_flax_script, load_script
from t2i_training.sd_flax import devices

quick, *runs = map(json.loads, sys.argv[1:])
with pytest.MonkeyPatch.context() as patch:
    script = load_quick_flax_script(patch) if quick else load_script("sd_flax")
    for tokens in runs:
        script.main(tokens)
assert jax.device_count() == 4

def times(batch, number):
    return {"product": number * batch["x"]}

encode = partial(times, number=devices.on_host(np.float32(2)))
product = devices.encode_on_host({"x": torch.arange(7)}, encode)["product"]
assert product.tolist() == list(range(0, 14, 2)), "seven by four devices"
"""


@pytest.fixture
def on_four_devices(server, environment, tokens, tmp_path):
    """on_four_devices(quick, **changes): output folders of two runs, the second with its parameters in four places."""

    def run(quick, **changes):
        changes |= {"train_batch_size": 1, "gradient_accumulation_steps": 1}
        runs = {"plain": changes, "sharded": changes | {"shard_parameters": True}}
        (tmp_path / "program.py").write_text(FOUR_DEVICES)
        runs = [json.dumps(quick), *(json.dumps(tokens(tmp_path / name, **runs[name])) for name in runs)]
        four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"}
        run = server.start(runs, tmp_path, tmp_path / "program.py", environment=environment | four)
        assert run.wait() == 0, run.output()
        assert "4 x cpu" in run.output()
        return tmp_path / "plain", tmp_path / "sharded"

    return run


def test_four_devices_sharded_or_not_save_and_export_all(on_four_devices, small_model):
    """One sample on each of four devices at a time. An update there takes a tenth of every weight."""
    before = weights(small_model)
    for folder in on_four_devices(quick=True, max_train_steps=2, checkpointing_steps=1):
        assert [row["step"] for row in rows(folder)] == [1, 2]
        for part in ("checkpoint-1/unet", "checkpoint-2/unet", "checkpoint-2/unet_ema", "unet"):
            left = 0.9 if "1" in part else 0.81
            assert distance(weights(folder, part), {name: left * before[name] for name in before}) < 1e-6
        moments = load_file(folder / "checkpoint-2" / "optimizer.safetensors")
        assert len(moments) == 2 * len(before) + 1


@pytest.mark.slow("46 s, two programs: two processes give them below, and all arrays are whole in the test above")
def test_four_devices_sharded_or_not_and_one_give_the_same_losses(on_four_devices, whole):
    """On one device, two times two."""
    for folder in on_four_devices(quick=False):
        for row, wanted in zip(rows(folder), rows(whole), strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)
        assert distance(weights(folder), weights(whole)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "precision"),
    [({}, "highest"), ({"allow_tf32": True}, "default"), ({"mixed_precision": "bf16"}, "default")],
)
def test_precision_of_products(changes, precision, tokens, tmp_path):
    """In full where the run is; in half precision anything above JAX's default would be slower for nothing."""
    before = dict(os.environ)
    devices.start(load_script("sd_flax").parse_args(tokens(tmp_path / "out", **changes)))
    assert jax.config.jax_default_matmul_precision == precision
    assert os.environ.get("ACCELERATE_USE_CPU") == before.get("ACCELERATE_USE_CPU")


def test_precision_of_the_launcher(tokens, tmp_path, monkeypatch):
    """As in the other scripts `accelerate launch --mixed_precision` holds, unless the script's own flag is given."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for typed, expected in ((None, "bf16"), ("no", "no")):
        args = load_script("sd_flax").parse_args(tokens(tmp_path / "out", mixed_precision=typed))
        assert devices.start(args)[2] == expected


def test_one_device_has_nothing_to_share(train, tmp_path):
    with pytest.raises(SystemExit, match=r"--shard_parameters needs several .*, and there is one: leave it out"):
        train(tmp_path / "out", shard_parameters=True)


TWO_PROCESSES = """
import os, signal, sys
import jax
from conftest import load_script
from t2i_training.report import hub
from t2i_training.sd_flax import train_state

def step(self, *inputs, step=train_state.TrainState.step):
    result = step(self, *inputs)
    if self.updates == 6 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return result

train_state.TrainState.step = step
finish = hub.publish_card_and_upload
def finish_and_tell(*args):
    finish(*args)
    print("others may leave:", not jax.distributed.is_initialized())

hub.publish_card_and_upload = finish_and_tell
load_script("sd_flax").main(sys.argv[1:])
"""


def test_two_processes_give_the_same_losses(whole, server, environment, tokens, tmp_path):
    """SIGTERM to one of them, in the last update: nothing changes. While the main one uploads, the other has gone."""
    out = tmp_path / "out"
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    options = tokens(out, train_batch_size=1, checkpointing_steps=100)
    run = server.start(options, tmp_path, tmp_path / "program.py", processes=2, environment=environment)
    assert run.wait_for_all() == [0, 0], run.output()
    assert "others may leave: True" in run.output()
    assert "2 x cpu" in run.output()
    assert checkpoints(out) == ["checkpoint-6"]
    for row, wanted in zip(rows(out), rows(whole), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
    for part in ("unet", "checkpoint-6/unet"):
        assert distance(weights(out, part), weights(whole, part)) < 1e-5


# Cached encodings


def test_cached_training_is_the_same_training(train, tmp_path):
    options = {"center_crop": True, "max_train_steps": 3, "checkpointing_steps": 3}
    plain = train(tmp_path / "plain", **options)
    cached = train(tmp_path / "cached", cache_encodings=True, **options)
    for row, wanted in zip(rows(cached), rows(plain), strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    assert distance(weights(cached), weights(plain)) < 1e-5
    shards = list((cached / "encodings").glob("*/*.safetensors"))
    assert len(shards) == 2


# The guide


GUIDE = """
python train_text_to_image_flax.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --dataset_name=$dataset_name \
  --resolution=512 --center_crop --random_flip \
  --train_batch_size=1 \
  --mixed_precision="fp16" \
  --max_train_steps=15000 \
  --learning_rate=1e-05 \
  --max_grad_norm=1 \
  --output_dir="sd-pokemon-model"
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="fp16 would be another run")
@pytest.mark.parametrize("source", ["--dataset_name=$dataset_name", "--train_data_dir=$TRAIN_DIR"])
def test_guides_commands_on_an_old_flax_repository(source, small_model, pictures, tmp_path, monkeypatch):
    """As written, but for names of model and data, size and length. The model has msgpack files alone."""
    base = shutil.copytree(small_model, tmp_path / "flax-model")
    pipeline = StableDiffusionPipeline.from_pretrained(small_model)
    for part in ("unet", "vae", "text_encoder"):
        (weight_file,) = (base / part).glob("*.safetensors")
        weight_file.unlink()
        name = "flax_model.msgpack" if part == "text_encoder" else "diffusion_flax_model.msgpack"
        tree = old_flax_tree(getattr(pipeline, part))
        (base / part / name).write_bytes(flax.serialization.msgpack_serialize(tree))
    command = GUIDE.replace("--dataset_name=$dataset_name", source).replace("$MODEL_NAME", str(base))
    command = command.replace("$dataset_name", str(pictures)).replace("$TRAIN_DIR", str(pictures))
    command = command.replace("--resolution=512", "--resolution=16").replace("15000", "2")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="fp16 needs a GPU: training in fp32"):
        load_quick_flax_script(monkeypatch).main(shlex.split(command)[2:])
    out = tmp_path / "sd-pokemon-model"
    assert [row["step"] for row in rows(out)] == [2]
    trained = StableDiffusionPipeline.from_pretrained(out)
    twice = {name: 0.81 * tensor for name, tensor in pipeline.unet.state_dict().items()}
    assert distance(trained.unet.state_dict(), twice) < 1e-6, "a tenth less with each update: all of it was read"
    assert distance(trained.vae.state_dict(), pipeline.vae.state_dict()) == 0
    assert "mixed_precision: 'no'" in (out / "run_config.yaml").read_text()
    assert list((out / "logs").rglob("events.*"))
    with pytest.raises(SystemExit, match="there are Flax weights only: leave --from_pt out"):
        load_script("sd_flax").main([*flags(**short_run(base, pictures, tmp_path / "out")), "--from_pt"])


def test_readme_shows_the_guides_command():
    readme = (SCRIPTS["sd_flax"].path.parent / "README.md").read_text()
    shown = [block.split("```")[0] for block in readme.split("```bash")[1:]]
    wanted = [token for token in shlex.split(GUIDE) if not token.startswith(("--dataset", "--output", "\n"))]
    blocks = [shlex.split(block.replace("\\\n", " ")) for block in shown if SCRIPTS["sd_flax"].path.name in block]
    assert any(set(wanted) <= set(block) for block in blocks)


# What goes wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": None, "train_data_dir": None}, "no data"),
        ({"snr_gamma": -1}, "--snr_gamma must be positive"),
        ({"torch_compile": True}, "unrecognized arguments: --torch_compile"),
        ({"lr_scheduler": "sine"}, "--lr_scheduler must be one of"),
    ],
)
def test_usage_errors(tokens, changes, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script("sd_flax").parse_args(tokens(**{"output_dir": tmp_path / "out"} | changes))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_jax(tokens, tmp_path):
    hide = "import importlib.util as u, runpy, sys; find = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'jax' else find(name, *rest)\n"
    hide += f"sys.argv = {['x', *tokens(tmp_path / 'out')]!r}\n"
    hide += f"runpy.run_path({str(SCRIPTS['sd_flax'].path)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("error: jax not installed: pip install -r requirements_flax.txt")


def test_variants_of_weights(tokens, small_model, tmp_path, capsys):
    """A part of the pipeline that has none is read from its plain files, as diffusers does it."""
    base = shutil.copytree(small_model, tmp_path / "model")
    plain = base / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_suffix(".fp16.safetensors"))
    parse, options = load_script("sd_flax").parse_args, {"pretrained_model_name_or_path": base}
    pipeline = flax_pipeline.load(parse(tokens(tmp_path / "out", variant="fp16", **options)), jnp.float32)
    theirs = StableDiffusionPipeline.from_pretrained(base, variant="fp16")
    for part in ("unet", "vae"):
        ours = getattr(pipeline, part).state_dict()
        assert all(np.array_equal(ours[name], value) for name, value in getattr(theirs, part).state_dict().items())
    with pytest.raises(SystemExit):
        parse(tokens(tmp_path / "out", variant="ema", **options))
    assert f"{base} has no weights of --variant=ema; there are: fp16" in capsys.readouterr().err


def test_model_that_does_not_load(tokens, small_model, tmp_path):
    base = shutil.copytree(small_model, tmp_path / "model")
    save_file({"other": torch.zeros(1)}, base / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SystemExit, match=r"^error: --pretrained_model_name_or_path .*tensor other has no place in the"):
        load_script("sd_flax").main(tokens(tmp_path / "out", pretrained_model_name_or_path=base))


def test_non_finite_loss_names_step_and_samples(train, tmp_path):
    with pytest.raises(SystemExit, match=r"step 2.*samples: row \d \(.*png, metadata.jsonl line \d\)"):
        train(tmp_path / "out", learning_rate=1e30, lr_warmup_steps=0, lr_scheduler="constant", logging_steps=3)
    assert checkpoints(tmp_path / "out") == []


# Formulas


def test_update_is_torchs_and_skips_what_overflows():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(4, 3, 2)).astype(np.float32)
    twin = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([twin], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    args = load_script("sd_flax").parse_args(
        ["--pretrained_model_name_or_path=x", "--train_data_dir=.", "--output_dir=/nowhere/x", "--adam_beta1=0.8",
         "--adam_beta2=0.95", "--adam_epsilon=1e-3", "--adam_weight_decay=0.2"]
    )  # fmt: skip
    optimizer = train_state.make_optimizer(args)
    parameters = {"w": jnp.asarray(start)}
    state = {"parameters": parameters, "optimizer": optimizer.init(parameters)}
    state["scaling"] = {"scale": jnp.float32(2.0**16), "good": jnp.int32(1997)}

    def loss(parameters, batch):
        return (parameters["w"] * batch["g"][0]).sum()

    scales = []
    for number, gradient in enumerate(gradients):
        if number == 1:
            overflow = {"g": jnp.full((2, 1, 3, 2), 1e35)}
            _, found, norm = train_state.gradient_of(loss, state, overflow, 1.0)
            assert not jnp.isfinite(norm)
            state = train_state.update(state, found, norm, optimizer, 0.1, 0.0)
        batch = {"g": jnp.asarray(np.stack([2 * gradient, 0 * gradient])[:, None])}
        _, found, norm = train_state.gradient_of(loss, state, batch, 1.0)
        state = train_state.update(state, found, norm, optimizer, 0.1, 0.0)
        twin.grad = torch.tensor(gradient)
        assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_([twin], 1.0)), rel=1e-5)
        reference.step()
        np.testing.assert_allclose(state["parameters"]["w"], twin.detach().numpy(), rtol=1e-5)
        scales.append((float(state["scaling"]["scale"]), int(state["scaling"]["good"])))
    assert scales == [(2.0**16, 1998), (2.0**15, 1), (2.0**15, 2), (2.0**15, 3)]


def test_bfloat16_passes_to_torch_and_back():
    tensor = torch.randn(3, 2).bfloat16()
    assert torch.equal(devices.to_torch(jnp.asarray(devices.to_numpy(tensor))), tensor)
    assert devices.to_numpy(torch.tensor([7])).dtype == np.int32


# Sizes
