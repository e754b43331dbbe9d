"""Gaussian data, for which the ideal network and the result of every solver are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from scripts.diffusion.process import levels_at, target

MEAN, STD = 0.3, 0.2


class IdealNetwork(nn.Module):
    """The exact network for voxels that are independent N(MEAN, STD^2), for any prediction type.

    E[x_0 | x_t] = MEAN + a STD^2 / (a^2 STD^2 + s^2) (x_t - a MEAN), and the noise belongs to it.
    """

    def __init__(self, scheduler, prediction_type: str = "epsilon") -> None:
        super().__init__()
        self.scheduler, self.prediction_type = scheduler, prediction_type

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        a, s = (level.view(-1, *[1] * (x.ndim - 1)) for level in levels_at(self.scheduler, timesteps))
        x = x.double()
        x0 = self.expected(x, a, s)
        return target(self.prediction_type, x0, (x - a * x0) / s, a, s).float()

    def expected(self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)


class IdealMixtureNetwork(IdealNetwork):
    """The same for voxels from a mixture of Gaussians: the components' answers, weighted by their responsibilities."""

    weights, means, std = (0.3, 0.7), (-0.5, 0.4), 0.1

    def expected(self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        variance = a**2 * self.std**2 + s**2
        logits = torch.stack(
            [math.log(w) - (x - a * m) ** 2 / (2 * variance) for w, m in zip(self.weights, self.means)]
        )
        answers = torch.stack([m + a * self.std**2 / variance * (x - a * m) for m in self.means])
        return (logits.softmax(0) * answers).sum(0)


def exact_moments(a: np.ndarray, s: np.ndarray, solver: str, weight=None) -> tuple[float, float]:
    """Mean and standard deviation that a solver reaches with `IdealNetwork`, without sampling.

    Written down in the variance-exploding frame y = x / a, sigma = s / a of Karras et al. 2022, and not from the tables
    of the product: y' = u y + v D + w D_previous + n z, with the ideal D = k y + c.

    Args:
        a, s: visited levels, noisiest first; the data comes after them.
        weight: of the multistep extrapolation as a function of h; 1/2 for the published solvers.
    """
    sigma = np.append(s / a, 0.0)
    weight = weight or (lambda h: 0.5)
    state = np.array([0.0, 0.0])  # means of y and of the previous D
    covariance = np.diag([1 / a[0] ** 2, 0.0])
    for i in range(len(a)):
        now, after = sigma[i], sigma[i + 1]
        slope = STD**2 / (STD**2 + now**2)
        offset = MEAN * (1 - slope)
        if solver in ("ddpm", "ddim"):
            up = math.sqrt(after**2 * (now**2 - after**2) / now**2) if solver == "ddpm" else 0.0
            u = math.sqrt(after**2 - up**2) / now
            v, w, n = 1 - u, 0.0, up
        elif after == 0:
            u, v, w, n = 0.0, 1.0, 0.0, 0.0
        else:
            h, eta = math.log(now / after), float(solver.endswith("sde"))
            gain = 1 - math.exp(-(1 + eta) * h)
            extra = weight(h) * h / math.log(sigma[i - 1] / now) if i else 0.0
            u, v, w = after / now * math.exp(-eta * h), gain * (1 + extra), -gain * extra
            n = after * math.sqrt(1 - math.exp(-2 * eta * h))
        matrix = np.array([[u + v * slope, w], [slope, 0.0]])
        state = matrix @ state + np.array([v * offset, offset])
        covariance = matrix @ covariance @ matrix.T + np.diag([n**2, 0.0])
    return float(state[0]), math.sqrt(covariance[0, 0])
