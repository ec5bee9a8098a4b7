"""A run on the CPU of a machine with a GPU says why, in one line, before it reads the data; elsewhere nothing."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import load_script

from t2i_training.run import missing_gpu

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
ALTHOUGH = "training on the CPU, although "
CLUSTER = "on a cluster, ask for a GPU (Slurm: --gres=gpu:1)"
AS_TORCH_SAYS = "as https://pytorch.org/get-started/locally says"
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.fixture
def machine(tmp_path, monkeypatch, caplog):
    """A machine without a GPU, in files; to be added to. Returns its folder."""
    devices, listed, tools = tmp_path / "dev", tmp_path / "gpus", tmp_path / "bin"
    for folder in (devices, tools):
        folder.mkdir()
    (devices / "nvidiactl").touch()  # not a card
    monkeypatch.setattr(missing_gpu, "DEVICES", devices)
    monkeypatch.setattr(missing_gpu, "LISTED", listed)
    monkeypatch.setattr(missing_gpu, "WSL_TOOL", str(tmp_path / "wsl"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)
    caplog.set_level(logging.INFO)
    return tmp_path


def list_model(machine, text: str, address: str = "0000:01:00.0") -> None:
    (machine / "gpus" / address).mkdir(parents=True)
    (machine / "gpus" / address / "information").write_text(text)


def tool(machine, script: str) -> None:
    (machine / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (machine / "bin" / "nvidia-smi").chmod(0o755)


def said(caplog, asked: bool = False) -> list[str]:
    missing_gpu.report_torch(asked)
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]


def test_without_a_gpu_nothing_is_said(machine, caplog):
    assert said(caplog) == []
    assert said(caplog, asked=True) == []


def test_torch_that_is_built_for_something_else(machine, caplog, monkeypatch):
    (machine / "dev" / "nvidia0").touch()
    install = f"install torch and torchvision for CUDA, {AS_TORCH_SAYS}"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert said(caplog) == [
        f"WARNING {ALTHOUGH}there is {machine}/dev/nvidia0: torch 2.14.1 is built without GPUs: {install}"
    ]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert said(caplog)[-1].endswith(f"torch 2.14.1 is built for ROCm: {install}")


def test_gpu_of_amd(machine, caplog, monkeypatch):
    kfd = machine / "dev" / "kfd"
    kfd.touch()
    found = f"WARNING {ALTHOUGH}there is {kfd}, of an AMD GPU: "
    assert said(caplog)[-1] == (
        f"{found}torch 2.14.1 is built for CUDA: install torch and torchvision for ROCm, {AS_TORCH_SAYS}"
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(missing_gpu.os, "open", refused)
    groups = "become a member of the groups render and video"
    assert said(caplog)[-1] == f"{found}{kfd} cannot be opened (Operation not permitted): {groups}"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # which ROCm heeds as well
    assert said(caplog)[-1] == f"{found}CUDA_VISIBLE_DEVICES=-1 hides it: unset it or, {CLUSTER}"
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "")
    assert said(caplog)[-1] == f"{found}ROCR_VISIBLE_DEVICES= hides it: unset it or, {CLUSTER}"


def test_gpu_whose_driver_fails(machine, caplog, monkeypatch):
    """It cannot be opened either, and what says more is the driver's tool."""

    def fails(*_):
        raise OSError(6, os.strerror(6))

    def begin():
        raise RuntimeError("No CUDA GPUs are available")

    (machine / "dev" / "nvidia0").touch()
    tool(machine, "echo 'No devices were found'; exit 6")
    monkeypatch.setattr(missing_gpu.os, "open", fails)
    missing_gpu.report(None, lambda _maker: None, begin)
    assert caplog.messages == [
        f"{ALTHOUGH}there is {machine}/dev/nvidia0: No CUDA GPUs are available; nvidia-smi says: No devices were found"
    ]


def refused(*_):
    raise PermissionError(1, os.strerror(1))


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hidden_by_the_environment(value, machine, caplog, monkeypatch):
    list_model(machine, "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 5\n")
    list_model(machine, "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 6\n", "0000:02:00.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert said(caplog) == [
        f"WARNING {ALTHOUGH}this machine has NVIDIA H100 80GB HBM3: CUDA_VISIBLE_DEVICES={value} hides it: "
        f"unset it or, {CLUSTER}"
    ]


def test_container_without_its_gpus(machine, caplog):
    list_model(machine, "IRQ: 5\n")
    assert said(caplog) == [
        f"WARNING {ALTHOUGH}this machine has an NVIDIA GPU: this container was started without it: "
        "docker run --gpus all, apptainer --nv"
    ]


def test_job_that_may_not_open_it(machine, caplog, monkeypatch):
    """A cluster leaves the devices there and lets their opening fail, even for root."""
    (machine / "dev" / "nvidia0").touch()
    monkeypatch.setattr(missing_gpu.os, "open", refused)
    place = f"{machine}/dev/nvidia0"
    line = f"{ALTHOUGH}there is {place}: {place} cannot be opened (Operation not permitted): {CLUSTER}"
    assert said(caplog) == [f"WARNING {line}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch would find it")
def test_what_torch_and_the_driver_say(machine, caplog, monkeypatch):
    tool(machine, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    line = said(caplog)[-1]
    assert line.startswith(f"WARNING {ALTHOUGH}nvidia-smi is installed: ")
    assert line.endswith(
        " (CUDA_VISIBLE_DEVICES=7 may name none that is there); "
        "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch"
    )
    tool(machine, "exec /nowhere/at/all 2>/dev/null")
    assert said(caplog)[-1].endswith("; nvidia-smi says: nothing")


def test_driver_that_is_too_old(machine, caplog):
    def begin():
        raise RuntimeError(TOO_OLD)

    (machine / "dev" / "nvidia0").touch()
    missing_gpu.report(None, lambda _maker: None, begin)
    assert caplog.messages == [
        f"{ALTHOUGH}there is {machine}/dev/nvidia0: its driver is for CUDA 11.4, and torch 2.14.1 for CUDA 13.0: "
        "update the driver, or install a torch for the driver's CUDA"
    ]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that is built for CUDA")
def test_torch_beside_a_driver_that_is_too_old(tmp_path):
    """As torch says it, where CUDA's runtime answers as it does there."""
    answers = [
        "cudaGetDeviceCount(int *n) { *n = 0; return 35; }",
        "cudaDriverGetVersion(int *n) { *n = 11040; return 0; }",
    ]
    (tmp_path / "old.c").write_text("".join(f"int {answer}" for answer in answers))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
    tool = tmp_path / "nvidia-smi"
    tool.touch(0o755)
    environment = os.environ | {"LD_PRELOAD": str(tmp_path / "old.so"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program = "from t2i_training.run.missing_gpu import report_torch; report_torch(asked=False)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (
        f"although nvidia-smi is installed: its driver is for CUDA 11.4, and torch {torch.__version__}" in done.stderr
    )


def test_cpu_that_was_asked_for_is_no_warning(machine, caplog):
    (machine / "dev" / "nvidia0").touch()
    assert said(caplog, asked=True) == [
        f"INFO {ALTHOUGH}there is {machine}/dev/nvidia0: "
        "accelerate is set to use the CPU (`accelerate config`, --cpu or ACCELERATE_USE_CPU)"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch would find it")
def test_it_is_said_before_the_data_is_read(machine, command, caplog, monkeypatch):
    from accelerate import PartialState

    list_model(machine, "Model: NVIDIA L4\n")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    PartialState._reset_state()
    broken = machine / "images"
    broken.mkdir()
    (broken / "a.png").touch()
    (broken / "a.txt").write_text("a cat")
    with pytest.raises(SystemExit):
        load_script("sd").main(command("sd", train_data_dir=broken))
    assert f"{ALTHOUGH}this machine has NVIDIA L4: this container was started" in caplog.text


def test_jax(machine, command, caplog, monkeypatch):
    """Of JAX, it is JAX that is asked."""
    jax = pytest.importorskip("jax")
    from t2i_training.sd_flax import devices

    if jax.default_backend() != "cpu":
        pytest.skip("JAX would find it")
    list_model(machine, "Model: NVIDIA L4\n")
    args = load_script("sd_flax").parse_args(command("sd"))
    there = f"{ALTHOUGH}this machine has NVIDIA L4: "
    devices.start(args)
    assert f"{there}JAX_PLATFORMS asks for the CPU" in caplog.messages
    monkeypatch.delenv("JAX_PLATFORMS")
    devices.start(args)
    assert f"{there}JAX has no plugin for it: pip install 'jax[cuda13]'" in caplog.messages
