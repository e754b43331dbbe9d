import math

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from scripts.diffusion import process as diffusion
from scripts.diffusion import solvers
from scripts.running.errors import BundleError


def cosine_alphas_cumprod(timesteps: int, s: float = 0.008) -> np.ndarray:
    """Nichol & Dhariwal 2021, Eq. 17, with the clip of beta at 0.999 that follows it; float64, by hand."""

    def f(t: float) -> float:
        return math.cos((t / timesteps + s) / (1 + s) * math.pi / 2) ** 2

    product, values = 1.0, []
    for t in range(1, timesteps + 1):
        product *= 1 - min(1 - f(t) / f(t - 1), 0.999)
        values.append(product)
    return np.array(values)


@pytest.mark.parametrize("timesteps", [10, 250, 1000])
def test_the_schedule_is_nichol_and_dhariwals_cosine(timesteps):
    ours = DDPMScheduler(num_train_timesteps=timesteps, schedule="cosine").alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, cosine_alphas_cumprod(timesteps), rtol=1e-3, atol=2e-6)


def test_noise_is_added_as_the_closed_form_says(scheduler):
    x0, noise = torch.randn(3, 1, 4, 4, 4), torch.randn(3, 1, 4, 4, 4)
    timesteps = torch.tensor([0, 100, 249])
    noisy = scheduler.add_noise(x0, noise, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        bar = cosine_alphas_cumprod(250)[t]
        expected = math.sqrt(bar) * x0[i] + math.sqrt(1 - bar) * noise[i]
        torch.testing.assert_close(noisy[i], expected.float(), atol=2e-4, rtol=0)


def ddpm_step(bar: float, bar_after: float) -> list[float]:
    """(c_x, c_0, variance) of one step of the product's ancestral solver."""
    bars = np.array([bar, bar_after])
    ((c_x, c_0, _, c_z),) = solvers.ddpm(np.sqrt(bars), np.sqrt(1 - bars))
    return [c_x, c_0, c_z**2]


def test_the_posterior_of_neighbours_is_ho_et_al_eq_6_and_7():
    bar = cosine_alphas_cumprod(250)
    for t in (1, 57, 200, 249):
        beta, alpha = 1 - bar[t] / bar[t - 1], bar[t] / bar[t - 1]
        c_0 = math.sqrt(bar[t - 1]) * beta / (1 - bar[t])
        c_x = math.sqrt(alpha) * (1 - bar[t - 1]) / (1 - bar[t])
        variance = (1 - bar[t - 1]) / (1 - bar[t]) * beta
        np.testing.assert_allclose(ddpm_step(bar[t], bar[t - 1]), [c_x, c_0, variance], rtol=1e-9)


def test_the_posterior_between_distant_levels_is_bayes_rule():
    """q(x_s | x_t, x_0) from the joint Gaussian of (x_s, x_t) given x_0, with numpy only."""
    bar_s, bar_t = 0.8, 0.3
    covariance = math.sqrt(bar_t / bar_s) * (1 - bar_s)  # Cov(x_s, x_t | x_0)
    gain = covariance / (1 - bar_t)
    expected = [gain, math.sqrt(bar_s) - gain * math.sqrt(bar_t), (1 - bar_s) - gain * covariance]
    np.testing.assert_allclose(ddpm_step(bar_t, bar_s), expected, rtol=1e-12)


def test_the_last_step_returns_the_data():
    assert ddpm_step(0.9, 1.0) == pytest.approx([0, 1, 0], abs=1e-12)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
@pytest.mark.parametrize("alphas_cumprod", [4e-8, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_every_target_gives_back_the_sample(prediction_type, alphas_cumprod):
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    bar = torch.tensor(alphas_cumprod, dtype=torch.float64)
    a, s = bar.sqrt(), (1 - bar).sqrt()
    x_t = a * x0 + s * noise
    output = diffusion.target(prediction_type, x0, noise, a, s)
    p, q = diffusion.sample_coefficients(prediction_type, a, s)
    torch.testing.assert_close(p * x_t + q * output, x0, atol=1e-7, rtol=1e-7)


def test_the_targets_are_the_papers():
    x0, noise = torch.tensor([0.5]), torch.tensor([-2.0])
    a, s = torch.tensor(0.6), torch.tensor(0.8)
    values = [float(diffusion.target(p, x0, noise, a, s)) for p in diffusion.PREDICTION_TYPES]
    assert values == pytest.approx([-2.0, 0.5, 0.6 * -2 - 0.8 * 0.5, -2.5, 2.5])


def test_an_unknown_prediction_type_names_the_known_ones():
    with pytest.raises(BundleError, match="'noise' is unknown.*epsilon.*flow"):
        diffusion.target("noise", *[torch.ones(1)] * 4)
