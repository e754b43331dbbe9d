import math

import pytest
import torch

from scripts.batches import SeededPrepareBatch


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
