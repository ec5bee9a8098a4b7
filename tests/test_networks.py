"""Memory layout: what is for CUDA lies channels-last, is saved as ever, and is not mixed with what lies otherwise."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import load_script
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from t2i_training.model import ema, networks, optim
from t2i_training.run import checkpoint

CUDA = torch.device("cuda")  # its name alone: nothing below runs on it


def lies_channels_last(tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.fixture
def unet(model):
    return UNet2DConditionModel.from_pretrained(model, subfolder="unet")


@pytest.fixture
def options(sd_flags):
    return lambda **changes: load_script("sd").parse_args(sd_flags(**changes))


class TwoBiases(torch.nn.Module):
    """x + a + b, whose two gradients are one tensor: so Inductor returns them for a single sample."""

    class Add(torch.autograd.Function):
        @staticmethod
        def forward(_context, x, a, b):
            return x + a + b

        @staticmethod
        def backward(_context, gradient):
            shared = gradient.sum(0)
            return gradient, shared.detach(), shared.detach()

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.Add.apply(x, self.a, self.b)

    def clipped(self) -> torch.Tensor:
        """The first gradient, (1, 1, 1) as it is, after the norm of both has been clipped to 1."""
        self(torch.ones(1, 3)).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        return self.a.grad


def test_gradients_of_a_compiled_network_share_no_memory(options, monkeypatch):
    """In-place clipping would scale them twice."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_options: None)
    network = TwoBiases()
    networks.prepare_trained(network, options(torch_compile="whole"), Accelerator())
    assert network.clipped().tolist() == pytest.approx([6**-0.5] * 3)
    assert TwoBiases().clipped().tolist() == pytest.approx([1 / 6] * 3), "so that this test can fail"


def test_convolutions_for_cuda_lie_channels_last(unet, model):
    for network in (unet, AutoencoderKL.from_pretrained(model, subfolder="vae")):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        assert networks.channels_last(network, CUDA) is network
        kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert len(kernels) > 10
        assert all(map(lies_channels_last, kernels))
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_elsewhere_nothing_changes(unet):
    networks.channels_last(unet, torch.device("cpu"))
    assert all(parameter.is_contiguous() for parameter in unet.parameters())


def test_one_convolution_is_no_convolutional_network():
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2))
    networks.channels_last(clip, CUDA)
    assert all(parameter.is_contiguous() for parameter in clip.parameters())


def test_checkpoint_does_not_know_the_layout(unet, model, options, tmp_path):
    """Network and average, saved from one layout and read into the other."""
    plain = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    networks.channels_last(unet, CUDA)
    average = ema.make_ema(unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(2.0)
    ema.update(average, unet)
    ema.save_networks("unet", unet, average, tmp_path)
    into = ema.make_ema(plain)
    ema.load_networks("unet", plain, into, tmp_path)
    assert all(map(torch.equal, plain.parameters(), unet.parameters()))
    assert all(map(torch.equal, into.shadow_params, average.shadow_params))
    assert all(parameter.is_contiguous() for parameter in (*plain.parameters(), *into.shadow_params))


def trained(start, options, *, there: str, here: str):
    """A kernel after two updates in layout `there`, the optimizer saved and restored, and two in layout `here`."""
    layouts = {"cpu": torch.contiguous_format, "cuda": torch.channels_last}
    value, state = start, None
    for layout in (there, here):
        kernel = torch.nn.Parameter(value.to(memory_format=layouts[layout], copy=True))
        optimizer = optim.make_optimizer(options, [kernel])
        if state is not None:
            checkpoint.load_optimizer(optimizer, state)
        for _ in range(2):
            kernel.square().mul(torch.arange(kernel.numel()).view(kernel.shape)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        value, state = kernel.detach(), optimizer.state_dict()
    return value


@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_optimizer_restored_in_another_layout(options, there, here):
    """Each weight goes on with its own moments: fused AdamW pairs them by their places in memory."""
    start = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = trained(start, options(learning_rate=0.1), there="cpu", here="cpu")
    result = trained(start, options(learning_rate=0.1), there=there, here=here)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_recomputed_blocks_are_copied_whole():
    """A copy of a network with gradient checkpointing computes with its own weights."""
    import copy

    network = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    networks.enable_gradient_checkpointing(network)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    assert not twin[0](torch.ones(1, 2)).any()
    assert network[0](torch.ones(1, 2)).any()


@pytest.mark.gpu
def test_layout_of_a_run(command):
    from diffusers.models.autoencoders.vae import Encoder
    from runs import in_memory

    with in_memory(UNet2DConditionModel) as trained, in_memory(Encoder) as encoders:
        load_script("sd").main(command("sd", mixed_precision="bf16", use_ema=True))
    for network in (trained[0], encoders[0]):
        assert lies_channels_last(network.conv_in.weight)


class Named(torch.nn.Linear):
    """A network on a device that need not be there."""

    def __init__(self, device: str):
        super().__init__(1, 1)
        self.device, self.moves = torch.device(device), []

    def to(self, device):
        self.moves.append(str(device))


def test_the_device_is_lent_to_what_is_not_on_it():
    """One process's device has no number, that of what lies on it has one."""
    trained, encoder = Named("cuda:0"), Named("cpu")
    pipeline = SimpleNamespace(components={"unet": trained, "vae": encoder, "scheduler": None})
    with networks.on_device(pipeline, SimpleNamespace(device=CUDA)):
        assert encoder.moves == ["cuda"]
    assert encoder.moves == ["cuda", "cpu"]
    assert trained.moves == []


class EightBits(torch.optim.AdamW):
    """Takes its state as it is, as bitsandbytes' optimizers do."""

    def load_state_dict(self, state_dict):
        for parameter, state in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
            self.state[parameter] = state


def test_state_in_eight_bits_is_left_as_it_is():
    """bitsandbytes counts steps in a plain number, and keeps bytes in blocks."""
    parameter = torch.nn.Parameter(torch.zeros(4, 2, 3, 3).to(memory_format=torch.channels_last))
    optimizer, blocks = EightBits([parameter]), torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    saved = {"state": {0: {"step": 3, "state1": blocks}}, "param_groups": optimizer.state_dict()["param_groups"]}
    checkpoint.load_optimizer(optimizer, saved)
    assert optimizer.state[parameter]["step"] == 3
    assert optimizer.state[parameter]["state1"] is blocks


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_settings_stay_those_of_the_flags(kind):
    """Of any optimizer, whatever its settings are called."""
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    before, after = kind([parameter], lr=0.5, weight_decay=0.25), kind([parameter], lr=0.125, weight_decay=0.75)
    parameter.sum().backward()
    before.step()
    saved = before.state_dict()
    checkpoint.load_optimizer(after, saved)
    assert (after.param_groups[0]["lr"], after.param_groups[0]["weight_decay"]) == (0.125, 0.75)
    assert str(after.state_dict()["state"]) == str(saved["state"])


def test_a_state_of_another_number_of_parameters_is_refused():
    one, two = ([torch.nn.Parameter(torch.ones(2)) for _ in range(count)] for count in (1, 2))
    with pytest.raises(ValueError, match=r"its optimizer has \[2\] parameters, and this run's \[1\]"):
        checkpoint.load_optimizer(torch.optim.AdamW(one), torch.optim.AdamW(two).state_dict())
