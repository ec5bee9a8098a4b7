"""What a denoiser is asked to predict, and how its error is weighed. Every formula names its source."""

from torch import Tensor


def signal_to_noise_ratio(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """SNR(t) = alpha_bar / (1 - alpha_bar), arXiv:2303.09556 section 3.1. (B,) float32; 0 at zero terminal SNR."""
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma loss weights, arXiv:2303.09556 equation 8 and its forms for the other targets. (B,) like `snr`.

    epsilon: min(SNR, gamma) / SNR, written as min(1, gamma / SNR) since that has no 0/0 at zero terminal SNR;
    v_prediction: min(SNR, gamma) / (SNR + 1); sample (x0): min(SNR, gamma).
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def prediction_target(noise_scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network should return at `timesteps`, by the scheduler's prediction type. Shape of `latents`.

    epsilon: the noise (arXiv:2006.11239); v_prediction: sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0
    (arXiv:2202.00512); sample: x0 itself.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return latents
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def dream(noise_scheduler, noisy_latents, target, noise, prediction, timesteps, detail_preservation: float):
    """DREAM, arXiv:2312.00210 equation 8: add back part of the network's own error, to input and to target alike.

    `prediction` comes from a first pass without gradients; lambda_t = sqrt(1 - alpha_bar) ** p. Epsilon only.
    Returns the rectified (noisy_latents, target).
    """
    alpha_bar = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    sigma = (1 - alpha_bar).sqrt()[:, None, None, None]
    correction = sigma**detail_preservation * (noise - prediction.float())
    return noisy_latents + sigma * correction, target + correction


def denoising_loss(prediction: Tensor, target: Tensor, timesteps: Tensor, noise_scheduler, snr_gamma=None) -> Tensor:
    """Mean squared error in float32, a scalar; with `snr_gamma` each sample is weighed by Min-SNR."""
    per_sample = (prediction.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    if snr_gamma is not None:
        snr = signal_to_noise_ratio(noise_scheduler.alphas_cumprod, timesteps)
        per_sample = per_sample * min_snr_weights(snr, snr_gamma, noise_scheduler.config.prediction_type)
    return per_sample.mean()
