"""Contract: a training step is a pure function of weights and batch, and waits for the device only to report."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import load_script
from runs import outcome
from scripts import SCRIPTS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_training.report import flops

EVERYTHING = {
    **SCRIPTS["sd"].draws,
    "use_ema": True,
    "dream_training": True,
    "snr_gamma": 5.0,
    "gradient_accumulation_steps": 2,
}


def seed_globals(seed: int) -> None:
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(seed)


def global_states() -> list:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    torch_states = [state.tolist() for state in (torch.get_rng_state(), *devices)]
    return [random.getstate(), np.random.get_state()[1].tolist(), torch_states]


def test_steps_leave_the_global_generators_alone(train, tmp_path):
    """Random numbers at start-up (of the libraries) do not count: two steps more leave the same states."""
    states = []
    for steps in (2, 4):
        seed_globals(1)
        train(output_dir=tmp_path / str(steps), max_train_steps=steps, **EVERYTHING)
        states.append(global_states())
    assert states[0] == states[1]
    torch.rand(1)
    assert global_states() != states[0], "a single draw would show"


def test_global_generators_change_nothing(train, tmp_path):
    outcomes = []
    for seed in (1, 2):
        seed_globals(seed)
        train(output_dir=tmp_path / str(seed), checkpointing_steps=4, **EVERYTHING)
        outcomes.append(outcome(tmp_path / str(seed), 4))
    assert outcomes[0] == outcomes[1]


class Reads(TorchFunctionMode):
    """Counts the calls, of Python code, that bring numbers from the device: item(), bool(), float(), cpu(), ..."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self):
        super().__init__()
        self.functions = {getattr(torch.Tensor, name) for name in self.NAMES}
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in self.functions
        return function(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts aten::_local_scalar_dense: reads of a scalar, by whatever code in Python or inside torch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def count_reads(train, folder, **changes) -> tuple[int, int]:
    """(reads by Python code, reads of a scalar) of a run in this process, its loader in another one."""
    with Reads() as reads, Scalars() as scalars:
        train(output_dir=folder, dataloader_num_workers=1, **changes)
    return reads.count, scalars.count


def test_no_read_between_logging_intervals(train, tmp_path, monkeypatch):
    """Two steps more, not a read more."""
    monkeypatch.setattr(flops, "count", lambda *_: 1.0)  # the first run of a process alone would count
    short = count_reads(train, tmp_path / "short", max_train_steps=2, logging_steps=100, **EVERYTHING)
    long = count_reads(train, tmp_path / "long", max_train_steps=4, logging_steps=100, **EVERYTHING)
    assert long == short
    chatty = count_reads(train, tmp_path / "chatty", max_train_steps=4, logging_steps=1, **EVERYTHING)
    assert chatty[0] - long[0] == 3, "one for each of three reports more"


def test_counters_count():
    with Reads() as reads, Scalars() as scalars:
        tensor = torch.ones(3) * 2
        assert bool(tensor.sum() == 6)
        assert tensor.mean().item() == 2
        assert tensor.tolist() == [2, 2, 2]
    assert (reads.count, scalars.count) == (3, 2)


@pytest.fixture(scope="module")
def noise_scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def loss_of(sd_flags, noise_scheduler, unet=None, *, changes=None, **flags) -> float:
    """compute_loss on two constant samples of 4 x 2 x 2 at step 0, of a network that answers zero."""
    script = load_script("sd")
    args = script.parse_args(sd_flags(**flags))
    shape = (2, 4, 2, 2)
    batch = {
        "latents_mean": torch.full(shape, 3.0), "latents_std": torch.full(shape, 0.5),
        "posterior_noise": torch.full(shape, -2.0), "noise": torch.full(shape, 2.0), "timesteps": torch.tensor([0, 0]),
        "text_states": torch.zeros(2, 16, 16), "noise_offset": torch.full((2, 4, 1, 1), 10.0),
        "input_perturbation": torch.full(shape, 10.0),
    }  # fmt: skip
    batch |= changes or {}
    before = copy.deepcopy(batch)

    def zero(noisy_latents, timesteps, text_states, return_dict):
        return (torch.zeros_like(noisy_latents),)

    loss = script.compute_loss(unet or zero, batch, noise_scheduler, args)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert all(torch.equal(batch[name], before[name]) for name in before), "the batch is left as it was"
    assert batch.keys() == before.keys()
    return loss.item()


def test_loss_of_literal_batches(sd_flags, noise_scheduler, model):
    """alpha_bar = 1 - 0.00085 at step 0; x0 = 3 - 0.5 * 2 = 2."""
    loss = lambda **options: loss_of(sd_flags, noise_scheduler, **options)  # noqa: E731
    assert loss() == 4.0, "the noise, squared"
    assert loss(changes={"noise": torch.zeros(2, 4, 2, 2)}) == 0.0
    assert loss(noise_offset=0.1) == pytest.approx(9.0), "2 + 0.1 * 10, squared"
    assert loss(input_perturbation=0.1) == 4.0, "in the input alone"
    assert loss(snr_gamma=5.0) == pytest.approx(4 * 5 / (0.99915 / 0.00085), rel=1e-4)


def test_loss_of_velocity(sd_flags, noise_scheduler):
    """v = sqrt(alpha_bar) * 2 - sqrt(1 - alpha_bar) * 2."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(noise_scheduler.config, prediction_type="v_prediction")
    expected = (0.99915**0.5 * 2 - 0.00085**0.5 * 2) ** 2
    assert loss_of(sd_flags, scheduler) == pytest.approx(expected, rel=1e-5)


def test_network_sees_what_the_batch_says(sd_flags, noise_scheduler):
    """z_t = sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise, the perturbed one where asked for."""
    seen = []

    def unet(noisy_latents, timesteps, text_states, return_dict):
        seen.append(noisy_latents)
        assert timesteps.tolist() == [0, 0]
        assert text_states.shape == (2, 16, 16)
        return (noisy_latents,)

    for flags, noise in (({}, 2.0), ({"input_perturbation": 0.1}, 3.0), ({"noise_offset": 0.1}, 3.0)):
        loss_of(sd_flags, noise_scheduler, unet, **flags)
        expected = 0.99915**0.5 * 2 + 0.00085**0.5 * noise
        torch.testing.assert_close(seen.pop(), torch.full((2, 4, 2, 2), expected), rtol=1e-5, atol=0)


def test_moments_in_half_precision_are_added_up_in_single(sd_flags, noise_scheduler):
    """As the VAE gives them, and the cache keeps them, in a bf16 run: exact halves, so the latents are still 2."""
    halves = {name: torch.full((2, 4, 2, 2), x).bfloat16() for name, x in (("latents_mean", 3), ("latents_std", 0.5))}
    seen = []

    def unet(noisy_latents, timesteps, text_states, return_dict):
        seen.append(noisy_latents)
        return (torch.zeros_like(noisy_latents),)

    odd = {"posterior_noise": torch.full((2, 4, 2, 2), -2.0009765625)}  # which bf16 does not know
    for changes, latents in ((halves, 2.0), (halves | odd, 1.99951171875)):
        assert loss_of(sd_flags, noise_scheduler, unet, changes=changes) == 4.0
        expected = 0.99915**0.5 * latents + 0.00085**0.5 * 2
        torch.testing.assert_close(seen.pop(), torch.full((2, 4, 2, 2), expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("flags", [{}, {"dream_training": True, "noise_offset": 0.1, "input_perturbation": 0.1}])
def test_loss_is_pure(sd_flags, noise_scheduler, model, flags):
    """The same weights and batch give the same number, whatever happened in between."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet").train()
    first = loss_of(sd_flags, noise_scheduler, unet, **flags)
    seed_globals(5)
    torch.rand(7)
    assert loss_of(sd_flags, noise_scheduler, unet, **flags) == first
    assert loss_of(sd_flags, noise_scheduler, unet, changes={"timesteps": torch.tensor([0, 900])}, **flags) != first
