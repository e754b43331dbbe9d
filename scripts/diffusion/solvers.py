"""Which timesteps a sampler visits, and the coefficients of each of its steps.

Every solver is a short function of the same shape, (a, s, ...) -> table, where a and s are the signal and noise levels
that are visited, noisiest first, with the data itself (a = 1, s = 0) at the end: n + 1 values, float64. A row of its
table (n, 4) holds the step from one level to the next,

    x <- c_x x + c_0 x_0 + c_1 x_0' + c_z z,        z ~ N(0, I)

with x_0 the network's present opinion of the data and x_0' the one before. lambda = log(a / s) is half the log of the
signal-to-noise ratio, as in Lu et al. 2022, and h its increase in a step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError
from scripts.running.knobs import KNOBS

SPACINGS = KNOBS["timestep_spacing"].words


def ddim(a: np.ndarray, s: np.ndarray, eta: float = 0.0) -> np.ndarray:
    """Denoising diffusion implicit model (Song et al. 2021, Eq. 12 and 16): deterministic for eta = 0."""
    a, a_next, s, s_next = a[:-1], a[1:], s[:-1], s[1:]
    c_z = eta * s_next / s * np.sqrt(np.maximum(s**2 - (a / a_next * s_next) ** 2, 0))
    direction = np.sqrt(np.maximum(s_next**2 - c_z**2, 0)) / s
    return np.stack([direction, a_next - a * direction, np.zeros_like(a), c_z], 1)


def ddpm(a: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Ancestral sampling: the posterior between the levels that are really visited (Ho et al. 2020, Eq. 6-7; Nichol &
    Dhariwal 2021, Eq. 19), which is DDIM with eta = 1."""
    return ddim(a, s, 1.0)


def _multistep(a: np.ndarray, s: np.ndarray, eta: float, weight: Callable[[float], float]) -> np.ndarray:
    """Exponential integrator in lambda whose x_0 is extrapolated through the previous one with `weight`(h)."""
    with np.errstate(divide="ignore"):
        logsnr = np.log(a / s)
    table = np.zeros((len(a) - 1, 4))
    for i in range(len(table) - 1):
        h = logsnr[i + 1] - logsnr[i]
        gain = -a[i + 1] * np.expm1(-(1 + eta) * h)
        extra = weight(h) * h / (logsnr[i] - logsnr[i - 1]) if i else 0.0
        table[i, 0] = s[i + 1] / s[i] * (np.exp(-eta * h) if eta else 1.0)
        table[i, 1:3] = gain * (1 + extra), -gain * extra
        table[i, 3] = s[i + 1] * np.sqrt(-np.expm1(-2 * eta * h)) if eta else 0.0
    table[-1, 1] = 1.0  # the last step arrives at the data: x_0 itself
    return table


def dpmpp_2m(a: np.ndarray, s: np.ndarray) -> np.ndarray:
    """DPM-Solver++ 2M (Lu et al. 2022, Alg. 2), deterministic."""
    return _multistep(a, s, 0.0, lambda h: 0.5)


def dpmpp_2m_sde(a: np.ndarray, s: np.ndarray, eta: float = 1.0) -> np.ndarray:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022, Sec. 5; midpoint form): stochastic, `eta` scales the noise."""
    return _multistep(a, s, eta, lambda h: 0.5)


def gaussian_2m(a: np.ndarray, s: np.ndarray) -> np.ndarray:
    """DPM-Solver++ 2M with its 1/2 replaced by the weight that leaves the spread of Gaussian data as it is.

    The 2M weight, 1/2, is exact as h -> 0; at the large steps of a fast sampler it widens every mode of Gaussian data.
    `gaussian_weight` is calibrated for the step that is really taken. Deterministic, and as cheap.
    """
    return _multistep(a, s, 0.0, gaussian_weight)


def gaussian_weight(h: float) -> float:
    """The weight w of `gaussian_2m` for a step h in lambda.

    With the ideal network for Gaussian data x_0 is linear in x, and the multistep recursion on an even grid in lambda
    has a closed form. The final standard deviation is right for every mode if, with E = exp(-h) and S = (1 - E) w,

        sum over j >= 0 of log[(1 - S E^(2j+1)) / (1 - S E^(2j))] = h / 4,

    which is solved by bisection (the left side grows with w). For h -> 0, w -> 1/2. Steps are limited to 0.001 .. 2.5.
    """
    h = float(np.clip(h, 1e-3, 2.5))
    decay = np.exp(-h)
    powers = decay ** (2 * np.arange(int(18.5 / h) + 3))
    low, high = 0.3, 0.65
    for _ in range(50):
        middle = (low + high) / 2
        scaled = (1 - decay) * middle * powers
        if np.log((1 - scaled * decay) / (1 - scaled)).sum() > h / 4:
            high = middle
        else:
            low = middle
    return (low + high) / 2


SOLVERS = {f.__name__: f for f in (ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, gaussian_2m)}


def visited(
    a: np.ndarray, s: np.ndarray, num_inference_steps: int, spacing: str, sigma_max: float | None = None
) -> np.ndarray:
    """Indices of the training levels that a sampler visits: (num_inference_steps,) int64, strictly decreasing.

    Args:
        a, s: all levels of training, in the order of their timesteps, so that s / a grows: (K,).
        num_inference_steps: 1 .. K.
        spacing: "linspace", "trailing" or "leading", as diffusers defines them; "logsnr" is even in lambda.
        sigma_max: begin at the noisiest level with s / a <= sigma_max (where a is tiny, the error of a network that
            predicts the noise is multiplied by s / a); None begins at the last one. Only for "logsnr".

    Raises:
        BundleError: unknown spacing, `sigma_max` with another spacing, too few levels left for the steps.
    """
    count, n = len(a), num_inference_steps
    check_knobs(timestep_spacing=spacing, sigma_max=sigma_max)
    if sigma_max is not None and spacing != "logsnr":
        raise BundleError(f"sigma_max: {sigma_max} was given with timestep_spacing {spacing!r}; it goes with 'logsnr'")
    if spacing == "linspace":
        return np.linspace(count - 1, 0, n).round().astype(np.int64)
    if spacing == "trailing":
        return (count - np.arange(n) * count / n).round().astype(np.int64) - 1
    if spacing == "leading":
        return np.arange(n)[::-1] * (count // n)
    sigma = s / np.maximum(a, 1e-12)
    first = count - 1 if sigma_max is None else int(np.searchsorted(sigma, sigma_max, side="right")) - 1
    first = max(first, n - 1)
    logsnr = -np.log(sigma)
    if a[first] <= 0:  # rectified flow begins without any signal: space the rest, from its neighbour on
        logsnr[first] = 2 * logsnr[first - 1] - logsnr[first - 2]
    even = np.linspace(logsnr[first], logsnr[0], n)
    nearest = np.interp(-even, -logsnr[: first + 1], np.arange(first + 1)).round().astype(np.int64)
    for i in range(n - 2, -1, -1):  # rounding may visit a level twice: move up, leaving room for those before it
        nearest[i] = max(nearest[i], nearest[i + 1] + 1)
    return np.minimum(nearest, first - np.arange(n))
