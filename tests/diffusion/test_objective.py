import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from scripts.diffusion.objective import SeededPrepareBatch
from scripts.diffusion.process import levels_at, training_timesteps
from scripts.running.errors import BundleError


def batch(*draws: int) -> dict:
    images = torch.stack([torch.full((1, 4, 4, 4), 0.01 * d) for d in draws])
    return {"image": images, "draw": torch.tensor(draws)}


def test_a_draw_has_the_same_noise_in_any_batch(scheduler):
    prepare = SeededPrepareBatch(scheduler, "epsilon", seed=5)
    _, _, _, together = prepare(batch(7, 8, 9), "cpu")
    _, _, _, alone = prepare(batch(8), "cpu")
    assert torch.equal(together["noise"][1], alone["noise"][0])
    assert together["timesteps"][1] == alone["timesteps"][0]
    assert not torch.equal(together["noise"][0], together["noise"][1])


def test_another_seed_is_other_noise(scheduler):
    noises = [SeededPrepareBatch(scheduler, "epsilon", seed=s)(batch(1), "cpu")[3]["noise"] for s in (0, 1)]
    assert not torch.equal(*noises)


def test_training_timesteps_are_uniform(scheduler):
    prepare = SeededPrepareBatch(scheduler, "epsilon")
    timesteps = torch.tensor([prepare.draw(d, torch.Size([1]), torch.device("cpu"))[0] for d in range(5000)])
    counts = torch.bincount(timesteps // 25, minlength=10)
    assert timesteps.min() >= 0 and timesteps.max() <= 249
    assert counts.min() > 400 and counts.max() < 600  # 500 expected, standard deviation 21


def test_validation_timesteps_lie_in_their_quarter(scheduler):
    prepare = SeededPrepareBatch(scheduler, "epsilon", num_strata=4)
    for draw in range(200):
        timestep, _ = prepare.draw(draw, torch.Size([1]), torch.device("cpu"))
        assert int(draw % 4 * 62.5) <= timestep <= int((draw % 4 + 1) * 62.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow"])
def test_the_target_belongs_to_the_noise_and_level(scheduler, prediction_type):
    images, wanted, _, extra = SeededPrepareBatch(scheduler, prediction_type)(batch(3, 4), "cpu")
    for i in range(2):
        bar = float(scheduler.alphas_cumprod[extra["timesteps"][i]])
        a, s, x0, e = math.sqrt(bar), math.sqrt(1 - bar), images[i], extra["noise"][i]
        expected = {"epsilon": e, "sample": x0, "v_prediction": a * e - s * x0, "flow": e - x0}[prediction_type]
        torch.testing.assert_close(wanted[i], expected, atol=1e-5, rtol=1e-5)
    assert wanted.dtype == images.dtype


def drawn(scheduler, sampling, sigma_max=None, count=4000):
    prepare = SeededPrepareBatch(scheduler, "epsilon", timestep_sampling=sampling, sigma_max=sigma_max)
    return torch.tensor([prepare.draw(d, torch.Size([1]), torch.device("cpu"))[0] for d in range(count)])


TIMESTEP_SAMPLINGS = ("uniform", "balanced", "lognormal")
SCHEDULERS = [
    DDPMScheduler(250, schedule="cosine"),
    DDPMScheduler(1000, schedule="linear_beta"),
    RFlowScheduler(1000, use_discrete_timesteps=False),
    RFlowScheduler(1000, use_discrete_timesteps=True),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["cosine", "linear", "straight", "straight, whole"])
def test_balanced_timesteps_are_half_uniform_and_half_uniform_in_log_sigma(scheduler):
    timesteps = drawn(scheduler, "balanced", 160)
    a, s = levels_at(scheduler, training_timesteps(scheduler))
    known, index = (s / a).log().numpy(), training_timesteps(scheduler).numpy()
    a, s = levels_at(scheduler, timesteps)
    log_sigma = (s / a).log().numpy()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):  # the distribution function at levels that are evenly spaced in log sigma
        level = known[0] + share * (math.log(160) - known[0])
        uniform = np.interp(level, known, index) / scheduler.num_train_timesteps
        assert (log_sigma <= level).mean() == pytest.approx((share + uniform) / 2, abs=0.03)


@pytest.mark.parametrize("scheduler", SCHEDULERS[:3], ids=["cosine", "linear", "straight"])
def test_lognormal_timesteps_are_those_of_karras_and_a_quarter_of_more_noise(scheduler):
    a, s = levels_at(scheduler, drawn(scheduler, "lognormal", 160))
    log_sigma = (s / a).log().numpy()
    for level in (-3.0, -2.0, -1.3, 0.0, 1.0, 2.0, 3.0, 4.0):  # the distribution function
        noisier = max(level + 1.2, 0) / (math.log(160) + 1.2)
        expected = 0.75 * NormalDist(-1.2, 1.2).cdf(level) + 0.25 * noisier
        assert (log_sigma <= level).mean() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["cosine", "linear", "straight", "straight, whole"])
def test_every_drawn_timestep_is_one_of_the_schedule(scheduler, sampling):
    timesteps = drawn(scheduler, sampling, count=500)
    first = training_timesteps(scheduler)[0]
    assert timesteps.min() >= (0 if scheduler is SCHEDULERS[2] else first)
    assert timesteps.max() <= training_timesteps(scheduler)[-1]
    if scheduler is not SCHEDULERS[2]:
        assert not timesteps.is_floating_point()


def test_validation_stays_uniform_whatever_training_draws(scheduler):
    found = [
        SeededPrepareBatch(scheduler, "epsilon", num_strata=4, timestep_sampling=sampling)(batch(0, 1, 2, 3), "cpu")[3]
        for sampling in TIMESTEP_SAMPLINGS
    ]
    assert all(torch.equal(extra["timesteps"], found[0]["timesteps"]) for extra in found)


def test_an_unknown_way_to_draw_timesteps_is_refused(scheduler):
    with pytest.raises(BundleError, match="timestep_sampling: 'even' is unknown; it must be one of.*balanced"):
        SeededPrepareBatch(scheduler, "epsilon", timestep_sampling="even")
