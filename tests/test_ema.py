"""Averaged weights: diffusers' numbers wherever they are kept, put back exactly, saved and read without a loss."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from t2i_training.model import ema


@pytest.fixture
def network(model) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model, subfolder="unet")


def disturb(network, seed: int) -> None:
    """Stands for a training step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device), alpha=0.1)


def weights(network) -> list[torch.Tensor]:
    return [parameter.detach().cpu().clone() for parameter in network.parameters()]


def run(network, average, updates: int = 5) -> list[torch.Tensor]:
    for seed in range(updates):
        disturb(network, seed)
        ema.update(average, network)
    return [tensor.cpu() for tensor in average.shadow_params]


def equal(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_average_by_hand():
    """Decay (1 + s) / (10 + s) after s updates, and 0 at the first: 1, then 9/11 of the way, then 9/12."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.config = {}
    average = ema.make_ema(layer)
    for value, expected in ((1.0, 1.0), (12.0, 1 + 11 * 9 / 11), (22.0, 10 + 12 * 9 / 12)):
        layer.weight.data.fill_(value)
        ema.update(average, layer)
        assert average.shadow_params[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("flags", [{}, {"offload": True}, {"foreach": True}], ids=str)
def test_average_is_diffusers(network, model, flags):
    """Bit for bit; one sweep over all parameters may round differently."""
    twin = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    reference = EMAModel(twin.parameters())
    for seed in range(5):
        disturb(twin, seed)
        reference.step(twin.parameters())
    averaged = run(network, ema.make_ema(network, **flags))
    torch.testing.assert_close(averaged, reference.shadow_params, rtol=1e-6 if "foreach" in flags else 0, atol=1e-7)


@pytest.mark.gpu
def test_offloaded_average_takes_little_of_the_device(network, monkeypatch):
    average = ema.make_ema(network.cuda(), offload=True)
    largest = max(tensor.nbytes for tensor in average.shadow_params)
    assert sum(tensor.nbytes for tensor in average.shadow_params) > 10 * largest
    monkeypatch.setattr(ema, "VISIT", largest)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ema.update(average, network)
    assert average.optimization_step == 1
    assert torch.cuda.max_memory_allocated() - before < 4 * largest
    with ema.averaged(average, network):  # for validation and export
        assert torch.equal(next(network.parameters()).cpu(), average.shadow_params[0])
    assert torch.cuda.max_memory_allocated() - before < 4 * largest


@pytest.mark.gpu
def test_offloaded_average_is_the_same_on_a_gpu(network, model, monkeypatch):
    monkeypatch.setattr(ema, "VISIT", 2**14)  # it has several parts
    twin = UNet2DConditionModel.from_pretrained(model, subfolder="unet").cuda()
    offloaded = ema.make_ema(network.cuda(), offload=True)
    here = ema.make_ema(twin)
    results = run(network, offloaded), run(twin, here)
    torch.cuda.synchronize()
    assert equal(*results)
    assert all(tensor.is_pinned() for tensor in offloaded.shadow_params)


def test_average_may_start_from_another_network(network, v_model):
    """--non_ema_revision: one revision is trained, another one's average is continued."""
    other = UNet2DConditionModel.from_pretrained(v_model, subfolder="unet")
    disturb(other, 0)
    average = ema.make_ema(network, initial=other)
    assert equal(average.shadow_params, weights(other))
    assert not equal(average.shadow_params, weights(network))


@pytest.mark.parametrize("flags", [{}, {"offload": True}, {"foreach": True}], ids=str)
def test_averaged_weights_are_lent_and_taken_back(network, flags):
    average = ema.make_ema(network, **flags)
    run(network, average)
    own, shadow = weights(network), [tensor.clone() for tensor in average.shadow_params]
    assert not equal(own, shadow)
    with ema.averaged(average, network) as lent:
        assert lent is network
        assert equal(weights(network), shadow)
    assert equal(weights(network), own)
    assert equal(average.shadow_params, shadow)


def test_averaged_weights_are_taken_back_after_an_exception(network):
    average = ema.make_ema(network)
    run(network, average)
    own = weights(network)
    with pytest.raises(KeyboardInterrupt), ema.averaged(average, network):
        raise KeyboardInterrupt
    assert equal(weights(network), own)


def test_averaged_weights_are_taken_back_if_only_some_could_be_lent(network):
    average = ema.make_ema(network)
    run(network, average)
    own = weights(network)
    average.shadow_params[1] = torch.zeros(3, 5, 7)
    with pytest.raises(RuntimeError, match="must match"), ema.averaged(average, network):
        pass
    assert equal(weights(network), own)


def test_without_an_average_the_network_stays_its_own(network):
    own = weights(network)
    with ema.averaged(None, network) as lent:
        assert lent is network
        assert equal(weights(network), own)


@pytest.fixture
def saved(network, tmp_path):
    """(network, its average after 5 updates, the folder where `save_networks` wrote both)."""
    average = ema.make_ema(network)
    run(network, average)
    ema.save_networks("unet", network, average, tmp_path)
    return network, average, tmp_path


def test_average_comes_back_bit_for_bit(saved, model):
    network, average, folder = saved
    fresh = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    restored = ema.make_ema(fresh)
    ema.load_networks("unet", fresh, restored, folder)
    assert equal(restored.shadow_params, average.shadow_params)
    assert equal(weights(fresh), weights(network))
    assert restored.optimization_step == 5
    assert equal(run(fresh, restored), run(network, average))  # and both go on alike


def test_saved_average_is_a_diffusers_model_and_a_diffusers_average(saved):
    _, average, folder = saved
    plain = UNet2DConditionModel.from_pretrained(folder / "unet_ema")
    assert equal(weights(plain), average.shadow_params)
    theirs = EMAModel.from_pretrained(str(folder / "unet_ema"), UNet2DConditionModel)
    assert equal(theirs.shadow_params, average.shadow_params)
    counters = {name: value for name, value in average.state_dict().items() if name != "shadow_params"}
    assert {name: value for name, value in theirs.state_dict().items() if name != "shadow_params"} == counters


def test_checkpoint_without_an_average_is_refused(network, tmp_path):
    ema.save_networks("unet", network, None, tmp_path)
    with pytest.raises(SystemExit, match=r"error: --use_ema: .* was saved without it"):
        ema.load_networks("unet", network, ema.make_ema(network), tmp_path)
    ema.load_networks("unet", network, None, tmp_path)


def test_checkpoint_of_another_network_is_refused(saved):
    *_, folder = saved
    other = UNet2DConditionModel.from_config(folder / "unet", cross_attention_dim=8)
    with pytest.raises(SystemExit, match=r"error: .* does not fit this model: "):
        ema.load_networks("unet", other, None, folder)
