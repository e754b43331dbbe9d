"""All the arithmetic of the diffusion process, in one place for training, sampling, validation and tests.

The forward process is x_t = a x_0 + s e with a = sqrt(alphas_cumprod), s = sqrt(1 - alphas_cumprod) and e ~ N(0, I)
(Ho et al. 2020, Eq. 4). A network is trained to predict one of

    epsilon       e                 Ho et al. 2020, Eq. 14
    sample        x_0
    v_prediction  a e - s x_0       Salimans & Ho 2022, App. D
    flow          e - x_0           Remedios et al. 2025 (MedForj)

Each of them is a linear function of x_0 and e, so each can be turned into any other one, given x_t.
"""

from __future__ import annotations

import torch

from scripts.errors import BundleError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")


def check_prediction_type(prediction_type: str) -> None:
    """Raises BundleError for a word that is not in `PREDICTION_TYPES`."""
    if prediction_type not in PREDICTION_TYPES:
        raise BundleError(f"prediction_type: {prediction_type!r} is unknown; it must be one of {PREDICTION_TYPES}")


def levels(alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise level (a, s) of `alphas_cumprod` in [0, 1], any shape; float64, so that 1 - it is exact."""
    alphas_cumprod = alphas_cumprod.double()
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def target(
    prediction_type: str, x0: torch.Tensor, noise: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """What a network of this `prediction_type` should give for x_t = a x0 + s noise.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        x0, noise: (B, C, *spatial), x0 in [-1, 1].
        a, s: levels that broadcast against x0, for example (B, 1, 1, 1, 1).

    Returns:
        a tensor of x0's shape and type.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return (a * noise - s * x0).to(x0.dtype)
    return noise - x0


def sample_coefficients(
    prediction_type: str, a: torch.Tensor, s: torch.Tensor, smallest: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, q) with x_0 = p x_t + q output, for levels `a`, `s` of any shape (float64 is best).

    Where a < `smallest` the noise prediction says nothing about x_0 any more; a is then taken as `smallest`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        a = a.clamp(min=smallest)
        return 1 / a, -s / a
    if prediction_type == "sample":
        return torch.zeros_like(a), torch.ones_like(a)
    if prediction_type == "v_prediction":
        return a, -s
    return 1 / (a + s), -s / (a + s)


def epsilon_coefficients(
    prediction_type: str, a: torch.Tensor, s: torch.Tensor, smallest: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, q) with e = p x_t + q output; where s < `smallest` (no noise left) s is taken as `smallest`."""
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return torch.zeros_like(a), torch.ones_like(a)
    if prediction_type == "sample":
        s = s.clamp(min=smallest)
        return 1 / s, -a / s
    if prediction_type == "v_prediction":
        return s, a
    return 1 / (a + s), a / (a + s)


def posterior(
    alphas_cumprod: torch.Tensor, alphas_cumprod_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q(x_next | x_t, x_0) = N(c_x x_t + c_0 x_0, variance) between any two levels of the process.

    Ho et al. 2020, Eq. 6-7, with the one-step beta replaced by the step that is really taken (Nichol & Dhariwal 2021,
    Sec. 4, Eq. 19), so that it holds for any subsequence of timesteps.

    Args:
        alphas_cumprod: at the noisier level, in (0, 1), float64.
        alphas_cumprod_next: at the cleaner level, in (alphas_cumprod, 1]; 1 is the data itself.

    Returns:
        (c_x, c_0, variance), each of the arguments' shape.
    """
    alpha = alphas_cumprod / alphas_cumprod_next
    beta = 1 - alpha
    c_x = alpha.sqrt() * (1 - alphas_cumprod_next) / (1 - alphas_cumprod)
    c_0 = alphas_cumprod_next.sqrt() * beta / (1 - alphas_cumprod)
    return c_x, c_0, beta * (1 - alphas_cumprod_next) / (1 - alphas_cumprod)
