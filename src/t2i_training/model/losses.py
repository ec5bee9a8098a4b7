"""Training targets and loss weights. Every formula names its source.

They use only operators that PyTorch's tensors and JAX's arrays share, and serve both.
"""

from torch import Tensor


def signal_to_noise_ratio(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """SNR(t) = alpha_bar / (1 - alpha_bar), arXiv:2303.09556 section 3.1. (B,) float32; 0 at zero terminal SNR."""
    alpha_bar = _at(alphas_cumprod, timesteps)
    return alpha_bar / (1 - alpha_bar)


def _at(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """alpha_bar at each timestep: (B,) float32."""
    if isinstance(timesteps, Tensor):
        alphas_cumprod = alphas_cumprod.to(timesteps.device)
    return _float32(alphas_cumprod[timesteps])


def _float32(tensor):
    return tensor.float() if isinstance(tensor, Tensor) else tensor.astype("float32")


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma loss weights, arXiv:2303.09556 equation 8 and its forms for the other targets. (B,) like `snr`.

    epsilon: min(SNR, gamma) / SNR, written as min(1, gamma / SNR) since that has no 0/0 at zero terminal SNR;
    v_prediction: min(SNR, gamma) / (SNR + 1); sample (x0): min(SNR, gamma).
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clip(max=1)
    if prediction_type == "v_prediction":
        return snr.clip(max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clip(max=gamma)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def prediction_target(noise_scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The training target at `timesteps`, by the scheduler's prediction type; same shape as `latents`.

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
    sigma = ((1 - _at(noise_scheduler.alphas_cumprod, timesteps)) ** 0.5)[:, None, None, None]
    correction = sigma**detail_preservation * (noise - _float32(prediction))
    return noisy_latents + sigma * correction, target + correction


def denoising_loss(prediction: Tensor, target: Tensor, timesteps: Tensor, noise_scheduler, snr_gamma=None) -> Tensor:
    """Mean squared error in float32, a scalar; with `snr_gamma` each sample is weighted by Min-SNR."""
    per_sample = ((_float32(prediction) - _float32(target)) ** 2).reshape(len(target), -1).mean(1)  # (B,)
    if snr_gamma is not None:
        snr = signal_to_noise_ratio(noise_scheduler.alphas_cumprod, timesteps)
        per_sample = per_sample * min_snr_weights(snr, snr_gamma, noise_scheduler.config.prediction_type)
    return per_sample.mean()
