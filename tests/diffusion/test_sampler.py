import pytest
import torch
from monai.data import MetaTensor

from scripts.diffusion.sampler import DiffusionSampler, volume_seed
from scripts.diffusion.solvers import SOLVERS
from scripts.running.errors import BundleError


def test_all_timesteps_of_ddpm_are_monais_posterior(unet, scheduler):
    table = DiffusionSampler(unet, scheduler, 250, "ddpm").table
    x0, x_t = torch.tensor(0.7), torch.tensor(-0.4)
    for t in (249, 120, 1):
        c_x, c_0, _, c_z = (float(c) for c in table[249 - t, 2:])
        assert c_x * float(x_t) + c_0 * float(x0) == pytest.approx(float(scheduler._get_mean(t, x0, x_t)), abs=1e-4)
        assert c_z**2 == pytest.approx(float(scheduler._get_variance(t)), rel=1e-3)


def test_the_way_has_every_step_and_ends_at_the_volume(unet, scheduler):
    sampler = DiffusionSampler(unet, scheduler, 7, "ddpm")
    noise = torch.randn(2, 1, 8, 8, 8)
    volumes = [*sampler.on_the_way(noise)]
    assert len(volumes) == 7 and volumes[0].shape == noise.shape
    assert torch.equal(volumes[-1], sampler(noise))


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
    with pytest.raises(BundleError, match=f"num_inference_steps: {steps} was given; it must be a whole number"):
        DiffusionSampler(unet, scheduler, steps)


def test_unknown_words_are_refused_with_the_known_ones(unet, scheduler):
    with pytest.raises(BundleError, match="solver: 'euler' is unknown.*ddpm.*ddim"):
        DiffusionSampler(unet, scheduler, 2, "euler")
    with pytest.raises(BundleError, match="prediction_type: 'noise' is unknown"):
        DiffusionSampler(unet, scheduler, 2, "ddpm", "noise")


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "gaussian_2m"])
def test_eta_is_refused_where_it_would_change_nothing(unet, scheduler, solver):
    with pytest.raises(BundleError, match=f"eta: 0.5 was given, but solver '{solver}' takes none; 'ddim' and"):
        DiffusionSampler(unet, scheduler, 2, solver, eta=0.5)
    with pytest.raises(BundleError, match="eta: -1 was given; it must be a number from 0"):
        DiffusionSampler(unet, scheduler, 2, "ddim", eta=-1)
