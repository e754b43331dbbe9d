import numpy as np
import pytest
import torch
from gaussian import MEAN, STD, IdealMixtureNetwork, IdealNetwork, exact_moments
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from scripts.diffusion.process import PREDICTION_TYPES, levels_at, sample_coefficients, target, training_timesteps
from scripts.diffusion.sampler import DiffusionSampler
from scripts.diffusion.solvers import SOLVERS, SPACINGS, gaussian_weight, visited
from scripts.running.errors import BundleError

SCHEDULES = [(250, "cosine"), (1000, "linear_beta"), (1000, "cosine")]


def visited_levels(scheduler, steps, spacing, sigma_max=None):
    a, s = (level.numpy() for level in levels_at(scheduler, training_timesteps(scheduler)))
    chosen = visited(a, s, steps, spacing, sigma_max)
    return a[chosen], s[chosen]


def exact(scheduler, solver, steps, spacing, sigma_max=None):
    weight = gaussian_weight if solver == "gaussian_2m" else None
    return exact_moments(*visited_levels(scheduler, steps, spacing, sigma_max), solver, weight)


def noise(side=64, batch=1):
    return torch.randn(batch, 1, side, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("timesteps, schedule", SCHEDULES)
def test_a_sampled_volume_has_the_moments_of_the_exact_recursion(solver, spacing, timesteps, schedule):
    scheduler = DDPMScheduler(num_train_timesteps=timesteps, schedule=schedule)
    mean, std = exact(scheduler, solver, 12, spacing)
    for prediction_type in PREDICTION_TYPES:
        sampler = DiffusionSampler(
            IdealNetwork(scheduler, prediction_type),
            scheduler,
            12,
            solver,
            prediction_type,
            timestep_spacing=spacing,
            clip_sample=False,
        )
        volume = sampler(noise())
        assert float(volume.mean()) == pytest.approx(mean, rel=5e-3)
        assert float(volume.std()) == pytest.approx(std, rel=5e-3)


@pytest.mark.parametrize(
    "solver, steps, spacing, std",
    [
        ("ddpm", 250, "linspace", 0.1933),
        ("ddim", 250, "linspace", 0.1971),
        ("ddim", 50, "linspace", 0.1878),
        ("dpmpp_2m", 25, "logsnr", 0.2026),
        ("dpmpp_2m", 50, "logsnr", 0.2004),
        ("dpmpp_2m", 25, "linspace", 0.2233),
    ],
)
def test_known_standard_deviations_for_250_cosine_timesteps(scheduler, solver, steps, spacing, std):
    assert exact(scheduler, solver, steps, spacing)[1] == pytest.approx(std, abs=3e-4)


@pytest.mark.parametrize("timesteps, schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [15, 25, 50])
def test_gaussian_2m_is_within_one_percent_from_15_steps_on(timesteps, schedule, steps):
    scheduler = DDPMScheduler(num_train_timesteps=timesteps, schedule=schedule)
    mean, std = exact(scheduler, "gaussian_2m", steps, "logsnr", 160)
    assert mean == pytest.approx(MEAN, rel=0.01) and std == pytest.approx(STD, rel=0.01)


def test_the_calibrated_weight_tends_to_one_half_and_solves_its_equation():
    assert gaussian_weight(0.001) == pytest.approx(0.5, abs=1e-3)
    for h in (0.1, 0.5, 1.0):
        decay, w, total = np.exp(-h), gaussian_weight(h), 0.0
        for j in range(1000):
            total += np.log((1 - (1 - decay) * w * decay ** (2 * j + 1)) / (1 - (1 - decay) * w * decay ** (2 * j)))
        assert total == pytest.approx(h / 4, abs=1e-6)


@pytest.mark.parametrize("solver, steps", [("ddpm", 250), ("gaussian_2m", 25), ("dpmpp_2m_sde", 50)])
def test_the_weights_of_a_mixture_are_recovered(scheduler, solver, steps):
    where = {"timestep_spacing": "linspace"} if solver == "ddpm" else {"timestep_spacing": "logsnr", "sigma_max": 160}
    sampler = DiffusionSampler(IdealMixtureNetwork(scheduler), scheduler, steps, solver, **where, clip_sample=False)
    values = sampler(noise()).flatten()
    assert float((values > -0.05).float().mean()) == pytest.approx(0.7, abs=0.01)
    for part, mean in ((values[values < -0.05], -0.5), (values[values > -0.05], 0.4)):
        assert float(part.mean()) == pytest.approx(mean, abs=0.005)
        assert float(part.std()) == pytest.approx(0.1, rel=0.06)


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_prediction_types_are_one_model(scheduler, solver):
    volumes = [
        DiffusionSampler(IdealNetwork(scheduler, p), scheduler, 20, solver, p, clip_sample=False)(noise(16, 2))
        for p in PREDICTION_TYPES
    ]
    for volume in volumes[1:]:
        torch.testing.assert_close(volume, volumes[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("wanted", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(2, 1, 4, 4, 4), (2, 1, 4, 4)])
def test_an_ideal_output_converts_to_every_other_type(scheduler, source, wanted, shape):
    timesteps = torch.tensor([20, 200])
    x = torch.randn(shape)
    a, s = (level.view(-1, *[1] * (len(shape) - 1)) for level in levels_at(scheduler, timesteps))
    outputs = [IdealNetwork(scheduler, p)(x, timesteps).double() for p in (source, wanted)]
    p, q = sample_coefficients(source, a, s)
    x0 = p * x + q * outputs[0]
    converted = target(wanted, x0, (x - a * x0) / s, a, s)
    torch.testing.assert_close(converted, outputs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [5, 30])
def test_rectified_flow_is_monais_euler_steps(steps):
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)
    network = IdealNetwork(scheduler, "rectified_flow")
    x = noise(8)
    sampler = DiffusionSampler(
        network, scheduler, steps, "ddim", "rectified_flow", timestep_spacing="trailing", clip_sample=False
    )
    ours = sampler(x)
    edges = torch.cat([sampler.timesteps, torch.zeros(1)])
    scheduler.set_timesteps(steps)
    for now, after in zip(edges[:-1], edges[1:]):
        x, _ = scheduler.step(network(x, now[None]), float(now), x, float(after))
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_is_finite_and_close_on_the_straight_path(solver):
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)
    for spacing in SPACINGS:
        network = IdealNetwork(scheduler, "rectified_flow")
        sampler = DiffusionSampler(
            network, scheduler, 100, solver, "rectified_flow", timestep_spacing=spacing, clip_sample=False
        )
        volume = sampler(noise(24))
        assert float(volume.mean()) == pytest.approx(MEAN, abs=0.01), spacing
        assert float(volume.std()) == pytest.approx(STD, rel=0.13), spacing


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 249, 250])
@pytest.mark.parametrize("sigma_max", [None, 20.0])
def test_visited_levels_are_distinct_and_in_order(scheduler, spacing, steps, sigma_max):
    a, s = (level.numpy() for level in levels_at(scheduler, training_timesteps(scheduler)))
    chosen = visited(a, s, steps, spacing, sigma_max if spacing == "logsnr" else None)
    assert len(chosen) == steps and chosen[0] <= 249 and chosen[-1] >= 0
    assert (np.diff(chosen) < 0).all()
    if spacing == "logsnr" and steps < 25 and sigma_max:
        assert s[chosen[0]] / a[chosen[0]] <= sigma_max < s[chosen[0] + 1] / a[chosen[0] + 1]


def test_spacings_are_those_of_diffusers_by_hand():
    a, s = np.sqrt(np.linspace(0.999, 0.001, 1000)), np.sqrt(1 - np.linspace(0.999, 0.001, 1000))
    assert visited(a, s, 5, "linspace").tolist() == [999, 749, 500, 250, 0]
    assert visited(a, s, 5, "trailing").tolist() == [999, 799, 599, 399, 199]
    assert visited(a, s, 5, "leading").tolist() == [800, 600, 400, 200, 0]


def test_unknown_words_and_misplaced_knobs_are_refused(scheduler, unet):
    with pytest.raises(BundleError, match="timestep_spacing: 'even' is unknown.*logsnr"):
        DiffusionSampler(unet, scheduler, 5, timestep_spacing="even")
    with pytest.raises(BundleError, match="sigma_max: 80 was given with timestep_spacing 'linspace'"):
        DiffusionSampler(unet, scheduler, 5, sigma_max=80)


def smooth_network(x, timesteps, class_labels=None):
    """A stand-in that is not linear in x and not chaotic."""
    return torch.sin(x + 0.01 * timesteps.view(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize(
    "solver, options",
    [
        ("ddim", {}),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver++"}),
        ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_trajectories_equal_those_of_diffusers(solver, options, steps, prediction_type, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is installed by requirements-dev.txt")
    scheduler = DDPMScheduler(num_train_timesteps=1000, schedule="linear_beta")
    common = {"trained_betas": scheduler.betas.numpy(), "timestep_spacing": "leading"}
    common["prediction_type"] = prediction_type
    if solver == "ddim":
        theirs = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    else:
        theirs = diffusers.DPMSolverMultistepScheduler(**common, **options, final_sigmas_type="zero")
    theirs.set_timesteps(steps)
    ours = DiffusionSampler(
        torch.nn.Identity(), scheduler, steps, solver, prediction_type, timestep_spacing="leading", clip_sample=False
    )
    monkeypatch.setattr(ours, "predict", smooth_network)
    if solver != "ddim":  # diffusers puts `leading` one timestep further for this family: visit what it visits
        timesteps = theirs.timesteps.clamp(max=999)
        a, s = (level.numpy() for level in levels_at(scheduler, timesteps))
        ours.timesteps = timesteps.float()
        ours.table[:, 2:] = torch.from_numpy(SOLVERS[solver](np.append(a, 1.0), np.append(s, 0.0)))
        from scripts.diffusion.process import sample_coefficients

        levels = (torch.from_numpy(level) for level in (a, s))
        ours.table[:, :2] = torch.stack(sample_coefficients(prediction_type, *levels), 1)
    x = noise(4)
    way = [*ours.on_the_way(x)]
    generator = ours.generators(x)
    for i, timestep in enumerate(theirs.timesteps):
        extra = {}
        if generator:
            extra["variance_noise"] = torch.randn(x.shape[1:], generator=generator[0])[None]
        x = theirs.step(smooth_network(x, ours.timesteps[i][None]), timestep, x, **extra).prev_sample
        torch.testing.assert_close(way[i], x, atol=1e-4, rtol=1e-4)
