"""Filling against the conditional distribution of a Gaussian, which has a closed form."""

import pytest
import torch

from scripts.diffusion.fill import filled, noised_again
from scripts.diffusion.process import levels_at
from scripts.diffusion.sampler import DiffusionSampler

SIDE, VOLUMES = 16, 1500
COVARIANCE = torch.tensor([[0.09 * 0.9 ** abs(i - j) for j in range(SIDE)] for i in range(SIDE)]).double()


class Ideal(torch.nn.Module):
    """The best opinion of x_0 for data ~ N(0, COVARIANCE)."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def forward(self, x, timesteps):
        a, s = levels_at(self.scheduler, timesteps[:1])
        best = a * COVARIANCE @ torch.linalg.inv(a**2 * COVARIANCE + s**2 * torch.eye(SIDE).double())
        return (x.double() @ best.T).float()


class Together(DiffusionSampler):
    """All volumes in one pass."""

    def volumes_at_once(self, x):
        return len(x)


@pytest.fixture
def sampler(scheduler):
    return Together(Ideal(scheduler), scheduler, 25, "ddpm", "sample", "logsnr", 160.0, clip_sample=False)


def test_what_is_filled_has_the_distribution_that_the_known_voxels_leave(sampler):
    known = torch.zeros(SIDE)
    known[:6], known[12:] = 0.5, -0.3
    hole = torch.zeros(SIDE, dtype=torch.bool)
    hole[6:12] = True
    outside, inside = torch.nonzero(~hole)[:, 0], torch.nonzero(hole)[:, 0]
    weights = COVARIANCE[inside][:, outside] @ torch.linalg.inv(COVARIANCE[outside][:, outside])
    mean = weights @ known[outside].double()
    std = (COVARIANCE[inside][:, inside] - weights @ COVARIANCE[outside][:, inside]).diag().sqrt()
    noise = torch.randn(VOLUMES, 1, SIDE, generator=torch.Generator().manual_seed(0))
    results = {}
    for repeats in (1, 4):
        volumes = filled(sampler, noise, known.expand_as(noise), hole.expand_as(noise), repeats)[:, 0]
        assert torch.equal(volumes[:, outside], known[outside].expand(VOLUMES, -1))
        results[repeats] = volumes[:, inside].double()
    assert (results[4].mean(0) - mean).abs().max() < 0.05  # 0.023 of 3000; the ends of the hole differ by 0.6
    assert ((results[4].std(0) / std - 1).abs() < 0.12).all()
    assert (results[1].mean(0) - mean).abs().max() > (results[4].mean(0) - mean).abs().max()


def test_noise_is_given_back_by_the_forward_process(sampler):
    """What step i removed: x_i ~ N(a_i x_0, s_i^2) again."""
    x0, z = torch.full((20000,), 0.7), torch.randn(2, 20000, generator=torch.Generator().manual_seed(1))
    for i in (0, 10, 23):
        (a, s), (a_next, s_next) = sampler.levels[i], sampler.levels[i + 1]
        x = noised_again(sampler, i, a_next * x0 + s_next * z[0], z[1])
        assert x.mean().item() == pytest.approx(float(a * 0.7), abs=0.03)
        assert x.std().item() == pytest.approx(float(s), rel=0.03)


def test_a_volume_is_the_same_whatever_else_is_filled(sampler):
    noise = torch.randn(3, 1, SIDE, generator=torch.Generator().manual_seed(2))
    known, hole = torch.full_like(noise, 0.2), torch.zeros_like(noise, dtype=torch.bool)
    hole[..., 4:9] = True
    together = filled(sampler, noise, known, hole)
    torch.testing.assert_close(filled(sampler, noise[1:2], known[1:2], hole[1:2])[0], together[1])
