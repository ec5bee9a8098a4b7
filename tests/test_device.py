"""What a device cannot do is one line at the start; memory is counted where torch counts it."""

import pytest
import torch
from accelerate import PartialState
from conftest import load_script

from t2i_training import device
from t2i_training.run import lifecycle

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
NO_KERNEL = """CUDA error: no kernel image is available for execution on the device
Search for `cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/cuda/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call."""


@pytest.fixture
def failing(monkeypatch):
    """failing(message): the first kernel raises it, on a V100."""

    def fail(message: str) -> None:
        def ones(*_args, **_options):
            raise RuntimeError(message)

        monkeypatch.setattr(torch, "ones", ones)

    monkeypatch.setattr(torch, "__version__", "2.14.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    return fail


def ending() -> str:
    with pytest.raises(SystemExit) as stop:
        device.try_out(CUDA)
    return stop.value.code


def test_torch_without_kernels_for_this_gpu(failing):
    failing(NO_KERNEL)
    assert ending() == (
        "error: torch 2.14.1 has no kernels for Tesla V100-SXM2-16GB (sm_70), it is built for sm_75 sm_80: "
        "install one that is, as https://pytorch.org/get-started/previous-versions says"
    )


def test_gpu_that_does_not_work(failing):
    failing("CUDA error: all CUDA-capable devices are busy or unavailable\nSearch for `cudaErrorDevicesUnavailable' in")
    assert ending() == (
        "error: the GPU does not work (CUDA error: all CUDA-capable devices are busy or unavailable): "
        "the driver's tool (nvidia-smi, rocm-smi, xpu-smi) may say which process holds it"
    )


def test_what_works_is_not_spoken_of():
    device.try_out(CPU)


def test_precision_that_the_device_lacks(command, monkeypatch):
    """As accelerate refuses it: bf16 on macOS 13, or fp16 on a device without a loss scaler, of which any will do."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    PartialState._reset_state()
    try:
        with pytest.raises(SystemExit) as stop:
            load_script("sd").main(command("sd", mixed_precision="fp16"))
    finally:
        PartialState._reset_state()
    assert stop.value.code.startswith(
        "error: accelerate does not start with mixed precision fp16 on meta: fp16 mixed precision requires "
    )
    assert stop.value.code.endswith("(not 'meta'); take --mixed_precision=no")


def test_emulated_bf16(monkeypatch):
    """NVIDIA's GPUs before Ampere; torch calls it supported all the same."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert device.emulates_bf16(CUDA)
    assert not device.emulates_bf16(CPU)
    assert not device.emulates_bf16(MPS)


@pytest.mark.gpu
def test_emulated_bf16_is_said(command, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    args = load_script("sd").parse_args(command("sd", mixed_precision="bf16"))
    lifecycle.start(args)
    assert f"{torch.cuda.get_device_name()} has no bf16 arithmetic, and torch emulates it: fp16 is" in caplog.text


def test_memory_that_torch_does_not_count():
    for place in (CPU, MPS):
        device.restart_peak_memory(place)
        assert device.peak_memory(place) is None
    device.release_memory(CPU)


def test_pinned_memory_is_for_devices_with_memory_of_their_own():
    kinds = {"cpu": False, "mps": False, "meta": False, "cuda": True, "xpu": True}
    assert {kind: device.pins_memory(torch.device(kind)) for kind in kinds} == kinds


def test_names():
    assert [device.name(CPU), device.name(MPS)] == ["cpu", "mps"]
