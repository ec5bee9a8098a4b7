"""Each formula against numbers worked out by hand, and against diffusers where it has the same function."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

from t2i_training.model import losses


def scheduler(*betas, prediction_type="epsilon"):
    """alpha_bar is the running product of (1 - beta)."""
    return DDPMScheduler(len(betas), trained_betas=list(betas), prediction_type=prediction_type)


def test_snr_by_hand():
    alphas_cumprod = scheduler(0.5, 0.5, 0.5).alphas_cumprod  # 1/2, 1/4, 1/8
    snr = losses.signal_to_noise_ratio(alphas_cumprod, torch.tensor([0, 1, 2, 0]))
    assert snr.dtype == torch.float32
    assert snr.tolist() == pytest.approx([1, 1 / 3, 1 / 7, 1])


def test_snr_is_diffusers():
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.arange(1000)
    torch.testing.assert_close(
        losses.signal_to_noise_ratio(schedule.alphas_cumprod, timesteps), compute_snr(schedule, timesteps),
        rtol=1e-4, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prediction_type", "weights"),
    [
        ("epsilon", [1, 1, 1, 0.5, 0.05]),  # min(1, 5 / SNR)
        ("v_prediction", [0, 0.5, 5 / 6, 5 / 11, 5 / 101]),  # min(SNR, 5) / (SNR + 1)
        ("sample", [0, 1, 5, 5, 5]),  # min(SNR, 5)
    ],
)
def test_min_snr_by_hand(prediction_type, weights):
    snr = torch.tensor([0.0, 1.0, 5.0, 10.0, 100.0])
    assert losses.min_snr_weights(snr, 5.0, prediction_type).tolist() == pytest.approx(weights)


def test_min_snr_of_a_noise_free_step_is_finite():
    """alpha_bar may round to 1: the SNR is then infinite."""
    snr = torch.tensor([torch.inf])
    assert losses.min_snr_weights(snr, 5.0, "epsilon").tolist() == [0]
    assert losses.min_snr_weights(snr, 5.0, "sample").tolist() == [5]


def test_zero_terminal_snr_gives_finite_weights():
    schedule = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    snr = losses.signal_to_noise_ratio(schedule.alphas_cumprod, torch.tensor([999]))
    for prediction_type, weight in (("epsilon", 1), ("v_prediction", 0), ("sample", 0)):
        assert losses.min_snr_weights(snr, 5.0, prediction_type).item() == pytest.approx(weight, abs=1e-6)


def test_unknown_target_is_an_error():
    with pytest.raises(ValueError, match="'flow'"):
        losses.min_snr_weights(torch.ones(1), 5.0, "flow")


def test_targets_by_hand():
    """alpha_bar = 0.64: v = 0.8 noise - 0.6 x0."""
    latents, noise, timesteps = torch.full((1, 1, 1, 2), 2.0), torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([0])
    expected = {"epsilon": [1, -1], "v_prediction": [-0.4, -2.0], "sample": [2, 2]}
    for prediction_type, values in expected.items():
        schedule = scheduler(0.36, prediction_type=prediction_type)
        target = losses.prediction_target(schedule, latents, noise, timesteps)
        assert target.flatten().tolist() == pytest.approx(values)


def test_v_target_is_diffusers_velocity():
    schedule = DDPMScheduler(prediction_type="v_prediction")
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    expected = schedule.get_velocity(latents, noise, timesteps)
    assert torch.equal(losses.prediction_target(schedule, latents, noise, timesteps), expected)


@pytest.mark.parametrize(("power", "noisy", "target"), [(1.0, 5.36, 1.6), (2.0, 5.216, 1.36), (0.0, 5.6, 2.0)])
def test_dream_by_hand(power, noisy, target):
    """sigma = 0.6, error 1: target + 0.6 ** p, input + 0.6 * 0.6 ** p."""
    one = torch.ones(1, 1, 1, 1)
    rectified = losses.dream(scheduler(0.36), 5 * one, one, one, 0 * one, torch.tensor([0]), power)
    assert [tensor.item() for tensor in rectified] == pytest.approx([noisy, target])


def test_dream_is_diffusers(model):
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    generator = torch.Generator().manual_seed(0)
    noisy_latents, noise = torch.randn(2, 3, 4, 16, 16, generator=generator)
    text_states, timesteps = torch.randn(3, 16, 16, generator=generator), torch.tensor([1, 400, 999])
    expected = compute_dream_and_update_latents(
        unet, schedule, timesteps, noise, noisy_latents, noise, text_states, dream_detail_preservation=0.7
    )
    with torch.no_grad():
        prediction = unet(noisy_latents, timesteps, text_states).sample
    actual = losses.dream(schedule, noisy_latents, noise, noise, prediction, timesteps, 0.7)
    torch.testing.assert_close(actual, expected)


PREDICTION = torch.zeros(2, 1, 1, 2)
TARGET = torch.tensor([[[[1.0, 1.0]]], [[[2.0, 2.0]]]])  # squared errors 1 and 4


@pytest.mark.parametrize(
    ("snr_gamma", "prediction_type", "loss"),
    [
        (None, "epsilon", 2.5),
        (0.5, "epsilon", (0.5 * 1 + 1 * 4) / 2),  # SNR 1 and 1/3
        (0.5, "v_prediction", (0.25 * 1 + 0.25 * 4) / 2),
        (0.5, "sample", (0.5 * 1 + 4 / 3) / 2),
    ],
)
def test_loss_by_hand(snr_gamma, prediction_type, loss):
    schedule = scheduler(0.5, 0.5, prediction_type=prediction_type)
    timesteps = torch.tensor([0, 1])
    assert losses.denoising_loss(PREDICTION, TARGET, timesteps, schedule, snr_gamma).item() == pytest.approx(loss)


def test_loss_is_float32_whatever_the_network_returns():
    """300 squared is beyond float16."""
    prediction = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    loss = losses.denoising_loss(prediction, torch.zeros(1, 1, 1, 1), torch.tensor([0]), scheduler(0.5))
    assert (loss.dtype, loss.item()) == (torch.float32, 90000)


def test_gradient_reaches_the_prediction():
    """d/dp mean((p - t)^2) = 2 (p - t) / n, times the sample's weight."""
    prediction = PREDICTION.clone().requires_grad_()
    losses.denoising_loss(prediction, TARGET, torch.tensor([0, 1]), scheduler(0.5, 0.5), 0.5).backward()
    assert prediction.grad.flatten().tolist() == pytest.approx([-0.25, -0.25, -1, -1])
