"""All the arithmetic of the diffusion process, in one place for training, sampling, validation and tests.

The forward process is x_t = a x_0 + s e with e ~ N(0, I). For DDPM a = sqrt(alphas_cumprod), s = sqrt(1 - a^2)
(Ho et al. 2020, Eq. 4); for rectified flow a = 1 - t / T, s = t / T (Liu et al. 2023, Eq. 1).
A network is trained to predict one of

    epsilon       e                 Ho et al. 2020, Eq. 14
    sample        x_0
    v_prediction  a e - s x_0       Salimans & Ho 2022, App. D
    flow          e - x_0           Remedios et al. 2025 (MedForj)
    rectified_flow  x_0 - e         Liu et al. 2023, the sign of MONAI's RFlowScheduler

Each of them is a linear function of x_0 and e, so each can be turned into any other one, given x_t.
"""

from __future__ import annotations

import torch
from monai.networks.schedulers import RFlowScheduler, Scheduler

from scripts.running.checks import check_knobs
from scripts.running.knobs import KNOBS

PREDICTION_TYPES = KNOBS["prediction_type"].words


def levels_at(scheduler: Scheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise level (a, s) of a MONAI scheduler at some timesteps, float64.

    Args:
        scheduler: a `DDPMScheduler` or `DDIMScheduler` (a^2 = alphas_cumprod, s^2 = 1 - a^2; whole timesteps in
            [0, T - 1]), or an `RFlowScheduler` (the straight path a = 1 - t / T, s = t / T; any t in [0, T]).
        timesteps: any shape.
    """
    if isinstance(scheduler, RFlowScheduler):
        s = timesteps.double() / scheduler.num_train_timesteps
        return 1 - s, s
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device).double()[timesteps.long()]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def training_timesteps(scheduler: Scheduler) -> torch.Tensor:
    """All whole timesteps of a scheduler that hold noise, ascending: 0 .. T - 1, for rectified flow 1 .. T. (T,)"""
    first = 1 if isinstance(scheduler, RFlowScheduler) else 0
    return torch.arange(first, first + scheduler.num_train_timesteps)


def timestep_at(scheduler: Scheduler, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The timestep, not always whole, at which a scheduler has the ratio s / a; the nearest one outside of its range.

    Between two whole timesteps of a `DDPMScheduler` it is linear in log(s / a).

    Args:
        a, s: levels of one shape, float64; a may be 0.
    """
    if isinstance(scheduler, RFlowScheduler):
        return scheduler.num_train_timesteps * s / (a + s)
    return index_at(log_sigmas(scheduler).to(a.device), a, s)


def log_sigmas(scheduler: Scheduler) -> torch.Tensor:
    """log(s / a) of all whole timesteps, ascending: (T,) float64."""
    a, s = levels_at(scheduler, training_timesteps(scheduler))
    return (s / a.clamp(min=1e-12)).log()


def index_at(known: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Where log(s / a) stands among ascending values (T,), as an index with a fraction in [0, T - 1]."""
    wanted = (s / a.clamp(min=1e-12)).log()
    above = (known < wanted[..., None]).sum(-1).clamp(1, known.shape[0] - 1)
    share = (wanted - known[above - 1]) / (known[above] - known[above - 1])
    return above - 1 + share.clamp(0, 1)


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
    check_knobs(prediction_type=prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return (a * noise - s * x0).to(x0.dtype)
    return noise - x0 if prediction_type == "flow" else x0 - noise


def sample_coefficients(
    prediction_type: str, a: torch.Tensor, s: torch.Tensor, smallest: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, q) with x_0 = p x_t + q output, for levels `a`, `s` of any shape (float64 is best).

    Where a < `smallest` the noise prediction says nothing about x_0 any more; a is then taken as `smallest`.
    """
    check_knobs(prediction_type=prediction_type)
    if prediction_type == "epsilon":
        a = a.clamp(min=smallest)
        return 1 / a, -s / a
    if prediction_type == "sample":
        return torch.zeros_like(a), torch.ones_like(a)
    if prediction_type == "v_prediction":
        return a, -s
    sign = 1 if prediction_type == "flow" else -1
    return 1 / (a + s), -sign * s / (a + s)
