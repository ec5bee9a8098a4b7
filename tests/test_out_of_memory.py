"""How many loader workers a run takes when it is not told, and what it says when memory is used up."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script

from t2i_training.cli import out_of_memory
from t2i_training.data.workers import loader_workers
from t2i_training.errors import RunError
from t2i_training.run import lifecycle


@pytest.mark.parametrize(
    ("cores", "processes", "free", "workers"),
    [
        (1, 1, 10**12, 0),
        (2, 1, 10**12, 1),
        (16, 1, 10**12, 8),
        (16, 4, 10**12, 3),
        (2, 4, 10**12, 0),
        (16, 1, 64 * 2**20, 0),  # a container's default, at 512 pixels and a batch of 16
        (16, 1, 2**29, 5),
        (16, 2, 2**29, 2),
    ],
)
def test_automatic_number_of_workers(cores, processes, free, workers, monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    args = SimpleNamespace(train_batch_size=16, dataloader_num_workers=None)
    assert loader_workers(args, args.train_batch_size * 512 * 512) == workers
    assert ("--shm-size" in caplog.text) == (free < 10**12)
    assert loader_workers(SimpleNamespace(dataloader_num_workers=5), 1) == 5


def ending(error: BaseException) -> str:
    """What a script whose `main` raises this error prints before it exits with status 1."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        lifecycle.run(main)
    return stop.value.code


def too_much() -> RuntimeError:
    with pytest.raises(RuntimeError) as stopped:
        torch.empty(10**15)
    return stopped.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        too_much(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("NCCL error: Last error:\nFailed to CUDA calloc async 608 bytes"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes."),  # JAX's
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line(error):
    line = ending(error)
    assert line.startswith("error: out of memory, starting: lower --train_batch_size, and raise --grad")
    assert f"({type(error).__name__}: " in line
    assert len(line.splitlines()) == 1


def raised(function: str, error: Exception):
    """The error as a function of that name raises it, some calls deep."""
    names = {"error": error}
    exec(f"def fail():\n    raise error\ndef {function}():\n    fail()", names)
    with pytest.raises(type(error)) as caught:
        names[function]()
    return caught.value


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("load_models", "out of memory, loading the models: free memory on host and GPU ("),
        ("precompute", "out of memory, encoding: lower --train_batch_size, or leave --cache_encodings out ("),
        ("make_ema", "out of memory, making the average: leave --use_ema out ("),
        ("validate", "out of memory, generating validation images: leave --validation_prompts out ("),
    ],
)
def test_what_the_run_was_doing_is_named(function, said):
    error = raised(function, torch.OutOfMemoryError("CUDA out of memory."))
    line = out_of_memory.line(error)
    assert line.startswith(said)
    assert line.endswith("(OutOfMemoryError: CUDA out of memory.)")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
        RuntimeError("unable to write to file </torch_7>: No space left on device (28): shared memory"),
    ],
    ids=repr,
)
def test_host_memory(error):
    line = out_of_memory.line(error)
    assert line.startswith("out of memory, host memory, starting: lower --dataloader_num_workers, or give the")


def advised(tokens: list[str], script: str, step: int | None = None, trained: bool = False) -> str:
    """What a run with these flags is advised when memory runs out, in that step or before the first."""

    def main():
        args = load_script(script).parse_args(tokens)  # noqa: F841
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        main()
    if step:
        out_of_memory.note_step(caught.value, step, trained)
    line = out_of_memory.line(caught.value)
    return line.removesuffix(" (OutOfMemoryError: CUDA out of memory.)")


CHECKPOINTING = "--gradient_checkpointing saves most of the activations"
BF16 = "--mixed_precision=bf16 saves half of the frozen networks and much of the activations"
CACHED = "--cache_encodings saves the frozen networks"
RESOLUTION = "a lower --resolution saves activations"


def test_flags_are_named_by_what_they_save(command):
    """Those that the script has and the run has not taken, and a batch with which an update has the same samples."""
    eight_bits = "--use_8bit_adam saves three quarters of the optimizer's state"
    half = "--train_batch_size=3 with --gradient_accumulation_steps=4 saves 50% of the activations"
    tokens = command("sd", train_batch_size=6, gradient_accumulation_steps=2, use_ema=True)
    assert advised(tokens, "sd", 3) == "out of memory, step 3: " + ", ".join(
        [eight_bits, CHECKPOINTING, half, BF16, CACHED, "--offload_ema saves the average", RESOLUTION]
    )
    adapters = command("sd_lora", train_batch_size=9, mixed_precision="bf16", cache_encodings=True)
    third = "--train_batch_size=3 with --gradient_accumulation_steps=3 saves 67% of the activations"
    assert advised(adapters, "sd_lora") == f"out of memory, starting: {CHECKPOINTING}, {third}, {RESOLUTION}"
    last = command(
        "prior_lora", train_batch_size=1, mixed_precision="bf16", cache_encodings=True, gradient_checkpointing=True
    )
    assert advised(last, "prior_lora", 1).endswith(", step 1: nothing is left that saves memory but a larger GPU")


def test_8bit_adam_is_not_for_a_run_that_goes_on(command):
    """A checkpoint of another optimizer is refused."""
    tokens = command("prior", train_batch_size=1, mixed_precision="bf16")
    resumed = advised(tokens, "prior", 3, trained=True)
    assert resumed == (
        f"out of memory, step 3: {CHECKPOINTING}, {CACHED}; "
        "--resume_from_checkpoint=latest continues from the last checkpoint"
    )
    assert "--use_8bit_adam" in advised(tokens, "prior", 3)


def test_a_launcher_may_have_chosen_the_precision(command, monkeypatch):
    tokens = command("decoder_lora", train_batch_size=1)
    assert BF16 in advised(tokens, "decoder_lora")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert BF16 not in advised(tokens, "decoder_lora")
    assert BF16 in advised([*tokens, "--mixed_precision=no"], "decoder_lora"), "the flag has the last word"


def test_step_and_process_are_named(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    out_of_memory.note_step(error, 4, trained=False)
    line = ending(error)
    assert line.startswith("error: out of memory, step 4: lower --train_batch_size, and raise")
    assert "--resume" not in line, "nothing has been trained yet"
    error = torch.OutOfMemoryError("CUDA out of memory.")
    out_of_memory.note_step(error, 6, trained=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    line = ending(error)
    assert line.startswith("error: out of memory (process 1), step 6: lower --train_batch_size")
    assert "; --resume_from_checkpoint=latest continues from the last checkpoint (OutOfMemoryError: " in line


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("1 / 0"), RunError("--encodings_dir x: RuntimeError: out of memory"), SystemExit(143)]
)
def test_other_errors_stay_what_they_are(error):
    """So do those that are one line already, whatever it says."""

    def main():
        raise error

    with pytest.raises(type(error)) as ending:
        lifecycle.run(main)
    assert ending.value is error
