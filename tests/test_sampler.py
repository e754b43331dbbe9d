import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from scripts.errors import BundleError
from scripts.sampler import SOLVERS, DiffusionSampler, solver_table, visited_timesteps, volume_seed

MEAN, STD = 0.3, 0.2


class IdealNetwork(nn.Module):
    """The exact noise prediction for voxels that are independent N(MEAN, STD^2): closed form, no training."""

    def __init__(self, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.alphas_cumprod = scheduler.alphas_cumprod.double()

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        bar = self.alphas_cumprod[timesteps.long()].view(-1, *[1] * (x.ndim - 1))
        a, s = bar.sqrt(), (1 - bar).sqrt()
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        return ((x - a * x0) / s).to(x.dtype)


def exact_moments(alphas_cumprod: np.ndarray, solver: str) -> tuple[float, float]:
    """Mean and standard deviation that a solver reaches with the ideal network, without sampling.

    Each step is x' = k x + c + n z in float64, written down from the papers' formulas and not from the solver's table.
    """
    mean, variance = 0.0, 1.0
    after = [*alphas_cumprod[1:], 1.0]
    for bar, bar_after in zip(alphas_cumprod, after):
        a, s = np.sqrt(bar), np.sqrt(1 - bar)
        slope = a * STD**2 / (a**2 * STD**2 + s**2)  # x0 = slope x + offset
        offset = MEAN - slope * a * MEAN
        if solver == "ddpm":
            beta = 1 - bar / bar_after
            c_0 = np.sqrt(bar_after) * beta / (1 - bar)
            c_x = np.sqrt(bar / bar_after) * (1 - bar_after) / (1 - bar)
            n = beta * (1 - bar_after) / (1 - bar)
        else:
            a_after, s_after = np.sqrt(bar_after), np.sqrt(1 - bar_after)
            c_0, c_x, n = a_after - s_after * a / s, s_after / s, 0.0
        k = c_x + c_0 * slope
        mean, variance = k * mean + c_0 * offset, k**2 * variance + n
    return mean, np.sqrt(variance)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [250, 50, 10])
def test_samples_of_gaussian_data_have_the_moments_of_the_exact_recursion(scheduler, solver, steps):
    sampler = DiffusionSampler(IdealNetwork(scheduler), scheduler, steps, solver, clip_sample=False)
    noise = torch.randn(1, 1, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    volume = sampler(noise)
    visited = scheduler.alphas_cumprod.double().numpy()[visited_timesteps(steps, 250).numpy()]
    mean, std = exact_moments(visited, solver)
    assert float(volume.mean()) == pytest.approx(mean, rel=5e-3)
    assert float(volume.std()) == pytest.approx(std, rel=5e-3)


@pytest.mark.parametrize("solver, expected", [("ddpm", 0.1933), ("ddim", 0.1971)])
def test_known_values_of_250_steps(scheduler, solver, expected):
    bar = scheduler.alphas_cumprod.double().numpy()[::-1]
    assert exact_moments(bar, solver)[1] == pytest.approx(expected, abs=1e-4)


def test_all_timesteps_of_ddpm_are_monais_posterior(scheduler):
    table = solver_table("ddpm", scheduler.alphas_cumprod.double().flip(0))
    x0, x_t = torch.tensor(0.7), torch.tensor(-0.4)
    for t in (249, 120, 1):
        c_x, c_0, c_z = (float(c) for c in table[249 - t])
        assert c_x * float(x_t) + c_0 * float(x0) == pytest.approx(float(scheduler._get_mean(t, x0, x_t)), abs=1e-4)
        assert c_z**2 == pytest.approx(float(scheduler._get_variance(t)), rel=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_volume_does_not_depend_on_its_batch(unet, scheduler, solver):
    for parameter in unet.parameters():
        parameter.data *= 0.3  # the random network is chaotic, which would enlarge rounding; a trained one is not
    sampler = DiffusionSampler(unet, scheduler, 8, solver)
    noise = torch.randn(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    together = sampler(noise)
    for i in range(4):
        torch.testing.assert_close(sampler(noise[i : i + 1])[0], together[i], atol=1e-4, rtol=0)


def test_ancestral_noise_differs_between_volumes_and_repeats_for_one():
    noise = torch.randn(2, 1, 4, 4, 4)
    assert volume_seed(noise[0]) != volume_seed(noise[1])
    assert volume_seed(noise[0]) == volume_seed(noise[0].clone())
    assert volume_seed(noise[0]) != volume_seed(noise[0].flip(1))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scripted_sampler_equals_the_eager_one_at_other_sizes(unet, scheduler, solver, tmp_path):
    sampler = DiffusionSampler(unet, scheduler, 6, solver)
    torch.jit.script(sampler).save(str(tmp_path / "model.ts"))
    loaded = torch.jit.load(str(tmp_path / "model.ts"))
    for shape in [(1, 1, 8, 8, 8), (3, 1, 16, 8, 4)]:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(loaded(noise), sampler(noise), atol=1e-5, rtol=0)
    assert 'value="cpu"' not in str(loaded.inlined_graph)


def test_the_state_dict_is_the_networks_own(unet, scheduler):
    sampler = DiffusionSampler(unet, scheduler, 2)
    assert sampler.state_dict().keys() == unet.state_dict().keys()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in unet.state_dict().items()}
    sampler.load_state_dict(zeros)
    assert all(not tensor.any() for tensor in unet.state_dict().values())


def test_metadata_travels_from_noise_to_volume(unet, scheduler):
    noise = MetaTensor(torch.randn(1, 1, 8, 8, 8), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    volume = DiffusionSampler(unet, scheduler, 2)(noise)
    assert torch.equal(volume.affine, noise.affine)


def test_clipping_keeps_volumes_in_range(unet, scheduler):
    noise = torch.randn(1, 1, 8, 8, 8)
    assert DiffusionSampler(unet, scheduler, 3, "ddim")(noise).abs().max() <= 1
    assert DiffusionSampler(unet, scheduler, 3, "ddim", clip_sample=False)(noise).abs().max() > 1


@pytest.mark.parametrize("steps", [0, -1, 251, 2.5, True])
def test_an_impossible_number_of_steps_is_refused(unet, scheduler, steps):
    with pytest.raises(BundleError, match="num_inference_steps.*from 1 to num_train_timesteps = 250"):
        DiffusionSampler(unet, scheduler, steps)


def test_unknown_words_are_refused_with_the_known_ones(unet, scheduler):
    with pytest.raises(BundleError, match="solver: 'euler' is unknown.*ddpm.*ddim"):
        DiffusionSampler(unet, scheduler, 2, "euler")
    with pytest.raises(BundleError, match="prediction_type: 'noise' is unknown"):
        DiffusionSampler(unet, scheduler, 2, "ddpm", "noise")
