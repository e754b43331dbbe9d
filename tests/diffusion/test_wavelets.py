import ast
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sample, train, workflow
from gaussian import MEAN, STD
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from scipy.linalg import hadamard
from torch import nn

from scripts.diffusion.process import PREDICTION_TYPES, levels_at, sample_coefficients, target
from scripts.diffusion.sampler import DiffusionSampler
from scripts.diffusion.solvers import SOLVERS
from scripts.diffusion.wavelets import (
    WaveletUNet,
    analysed,
    band_sizes,
    coarse_process,
    grown,
    in_wavelets,
    synthesised,
)
from scripts.diffusion.weights import save_weights
from scripts.running.errors import BundleError, root_bundle_error
from scripts.training.start import begin_with

COSINE = DDPMScheduler(250, schedule="cosine")
OUTER = {
    "cosine": COSINE,
    "linear": DDPMScheduler(1000, schedule="linear_beta"),
    "rectified flow": RFlowScheduler(1000, use_discrete_timesteps=False),
}
SHAPES = [(2, 1), (2, 2), (3, 1), (3, 2)]  # spatial_dims, wavelet levels


def matrix_of(transform, channels: int, side: int, dims: int) -> torch.Tensor:
    """The matrix of a linear map from (1, channels, *spatial) tensors, a column an input."""
    count = channels * side**dims
    columns = torch.eye(count, dtype=torch.float64).reshape(count, channels, *[side] * dims)
    return torch.stack([transform(column[None]).flatten() for column in columns], 1)


@pytest.mark.parametrize("dims, levels", SHAPES)
def test_the_transform_is_orthonormal(dims, levels):
    side = 2**levels
    k = matrix_of(lambda x: analysed(x, levels), 1, side, dims)
    back = matrix_of(lambda x: synthesised(x, levels), len(k), 1, dims)
    torch.testing.assert_close(k @ k.T, torch.eye(len(k), dtype=torch.float64))
    torch.testing.assert_close(back, k.T)


@pytest.mark.parametrize("dims", [2, 3])
def test_one_level_of_a_block_is_the_hadamard_matrix(dims):
    """A Hadamard matrix is the Kronecker product of the differences along each axis; the order of its rows is free."""
    found = matrix_of(lambda x: analysed(x, 1), 1, 2, dims).numpy()
    wanted = hadamard(2**dims) / 2 ** (dims / 2)
    assert sorted(found.round(6).tolist()) == sorted(wanted.round(6).tolist())


@pytest.mark.parametrize("dims, levels", SHAPES)
def test_the_first_band_is_the_mean_of_each_block(dims, levels):
    x = torch.randn(2, 1, *[16] * dims)
    pool = nn.functional.avg_pool2d if dims == 2 else nn.functional.avg_pool3d
    torch.testing.assert_close(analysed(x, levels)[:, :1], pool(x, 2**levels) * 2 ** (dims * levels / 2))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_bands_of_one_level_are_the_first_of_two(dims):
    x = torch.randn(1, 1, *[8] * dims)
    low = analysed(x, 1)[:, :1]
    torch.testing.assert_close(analysed(x, 2)[:, : 2**dims], analysed(low, 1))


@pytest.mark.parametrize("dims, levels", SHAPES)
def test_white_details_have_the_sizes_that_are_asked_for(dims, levels):
    """Noise in one band of one level, with the root mean square of `detail_rms`, comes out in its place."""
    rms = (0.4, 0.2, 0.1)[:dims]
    sizes = band_sizes(dims, levels, rms)
    assert len(sizes) == 2 ** (dims * levels) and sizes[0] == 2 ** (dims * levels / 2)
    generator = torch.Generator().manual_seed(0)
    bands = torch.randn(4, len(sizes), *[16] * dims, generator=generator, dtype=torch.float64)
    x = synthesised(bands * sizes.reshape(-1, *[1] * dims), levels)
    for _ in range(levels):  # finest first
        y = analysed(x, 1)
        found = y.square().mean((0, *range(2, y.ndim))).sqrt()[1:]
        wanted = [rms[i.bit_count() - 1] for i in range(1, 2**dims)]
        np.testing.assert_allclose(found, wanted, rtol=0.1)
        x = y[:, :1] / 2 ** (dims / 2)


class Ideal(nn.Module):
    """The exact network on the bands of voxels that are independent N(MEAN, STD^2): see `gaussian.IdealNetwork`.

    It knows its time only, and finds the levels of its bands from that.
    """

    def __init__(self, dims: int, levels: int, coarse: str) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 2 ** (dims * levels)
        self.num_class_embeds, self.coarse = None, coarse
        self.kernel = nn.Parameter(torch.zeros([1] * (dims + 2)))
        sizes = band_sizes(dims, levels)
        self.sizes, self.std = sizes, STD / sizes
        self.mean = torch.tensor([MEAN] + [0.0] * (len(sizes) - 1), dtype=torch.float64)

    def forward(self, x, timesteps, context=None, class_labels=None):
        outer = (timesteps / (1000 - timesteps)).double()[:, None] * self.sizes[0]  # s' / a'
        a, s = self.sizes / (self.sizes**2 + outer**2).sqrt(), outer / (self.sizes**2 + outer**2).sqrt()
        shape = (*a.shape, *[1] * (x.ndim - 2))
        a, s = a.reshape(shape), s.reshape(shape)
        mean, std = (t.reshape(1, *shape[1:]) for t in (self.mean, self.std))
        x = x.double()
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        noise = (x - a * x0) / s
        first = target(self.coarse, x0, noise, a, s)[:, :1]
        return torch.cat([first, target("v_prediction", x0, noise, a, s)[:, 1:]], 1).float()


def process(prediction_type="v_prediction"):
    return {
        "scheduler": "DDPMScheduler",
        "num_train_timesteps": 250,
        "schedule": "cosine",
        "prediction_type": prediction_type,
    }


@pytest.mark.parametrize("dims, levels, side", [(3, 1, 48), (2, 2, 512)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gaussian_volumes_come_out_right_with_every_solver(dims, levels, side, prediction_type):
    """As without wavelets (docs/solvers.md): the exact recursion is that of the voxels."""
    from test_solvers import exact

    for coarse, solver in zip(PREDICTION_TYPES, SOLVERS, strict=True):
        inner = process(coarse) | {"scheduler": "RFlowScheduler", "num_train_timesteps": 1000}
        network = WaveletUNet(Ideal(dims, levels, coarse), levels, COSINE, prediction_type, inner)
        sampler = DiffusionSampler(network, COSINE, 12, solver, prediction_type, "logsnr", 60, clip_sample=False)
        noise = torch.randn(1, 1, *[side] * dims, generator=torch.Generator().manual_seed(0))
        mean, std = exact(COSINE, solver, 12, "logsnr", 60 * 2 ** (dims * levels / 2))
        volume = sampler(noise)
        assert float(volume.mean()) == pytest.approx(mean, abs=2e-3)
        assert float(volume.std()) == pytest.approx(std, rel=1e-2)


class Listening(nn.Module):
    """Keeps what it is given."""

    def __init__(self, dims: int, levels: int) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 2 ** (dims * levels)
        self.num_class_embeds = None
        self.kernel = nn.Parameter(torch.zeros([1] * (dims + 2)))

    def forward(self, x, timesteps, context=None, class_labels=None):
        self.x, self.timesteps = x, timesteps
        return torch.zeros_like(x)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("dims, levels", SHAPES)
def test_the_inner_network_meets_what_a_coarse_network_was_trained_on(outer, dims, levels):
    scheduler, inner = OUTER[outer], Listening(dims, levels)
    network = WaveletUNet(inner, levels, scheduler, "epsilon", process())
    generator = torch.Generator().manual_seed(0)
    x0, e = (torch.randn(6, 1, *[8] * dims, generator=generator, dtype=torch.float64) for _ in range(2))
    t = scheduler.num_train_timesteps
    timesteps = torch.tensor([0.0, 1, t // 3, t // 2, t - 20, t - 1])
    if outer == "rectified flow":
        timesteps[0] = 0.4  # at 0 there is no noise
    a, s = (level.reshape(-1, *[1] * (dims + 1)) for level in levels_at(scheduler, timesteps))
    network((a * x0 + s * e).float(), timesteps)
    r = 2 ** (dims * levels)
    ratio = s / (r**0.5 * a)
    a_mean, s_mean = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    mean = analysed(x0, levels)[:, :1] / r**0.5
    torch.testing.assert_close(
        inner.x[:, :1].double(), a_mean * mean + s_mean * analysed(e, levels)[:, :1], atol=1e-6, rtol=1e-6
    )
    known_a, known_s = levels_at(COSINE, torch.arange(250))
    known = (known_s / known_a).log().numpy()
    wanted = np.interp(ratio.flatten().log().numpy(), known, np.arange(250))
    np.testing.assert_allclose(inner.timesteps.numpy(), wanted, atol=1e-3)


def test_details_have_unit_variance_at_every_level():
    inner = Listening(3, 1)
    network = WaveletUNet(inner, 1, COSINE, "v_prediction", process(), [0.3, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    sizes = band_sizes(3, 1, [0.3, 0.2, 0.1]).reshape(-1, 1, 1, 1)
    x0 = synthesised(sizes * torch.randn(1, 8, 24, 24, 24, generator=generator, dtype=torch.float64), 1)
    e = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for t in (0, 60, 125, 249):
        a, s = levels_at(COSINE, torch.tensor(t))
        network((a * x0 + s * e).float(), torch.tensor([t]))
        np.testing.assert_allclose(inner.x.std((0, 2, 3, 4)), 1, atol=0.03)


COARSE = {
    "spatial_shape": [32, 32, 32],
    "wavelet_levels": 0,
    "coarse": None,
    "network_class": "DiffusionModelUNet",
    "channels": [16, 16, 32],
    "attention_levels": [False, False, True],
    "num_head_channels": [0, 0, 32],
    "num_res_blocks": 1,
    "norm_num_groups": 8,
    "scheduler": "DDPMScheduler",
    "num_train_timesteps": 250,
    "schedule": "cosine",
    "prediction_type": "flow",
    "class_names": None,
}


def unet_of_size(channels: int) -> DiffusionModelUNet:
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=channels,
        channels=COARSE["channels"],
        attention_levels=COARSE["attention_levels"],
        num_head_channels=COARSE["num_head_channels"],
        num_res_blocks=COARSE["num_res_blocks"],
        norm_num_groups=COARSE["norm_num_groups"],
    )
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.05)
    return network.eval()


def shifted(scheduler: DDPMScheduler, gain: float) -> DDPMScheduler:
    """A schedule whose timesteps have `gain` times the noise-to-signal ratio: a coarse volume meets `scheduler`'s."""
    a, s = levels_at(scheduler, torch.arange(scheduler.num_train_timesteps))
    shifted = DDPMScheduler(scheduler.num_train_timesteps, schedule="cosine")
    shifted.alphas_cumprod = 1 / (1 + (gain * s / a) ** 2)
    return shifted


def grown_by(levels: int, scheduler, prediction_type: str, folder: Path) -> tuple[nn.Module, WaveletUNet]:
    """A network on voxels, and the same grown by `levels`."""
    coarse, path = unet_of_size(1), str(folder / "coarse.pt")
    save_weights(coarse.state_dict(), COARSE, path)
    inner = coarse_process(COARSE, scheduler, "cosine")
    network = WaveletUNet(unet_of_size(8**levels), levels, scheduler, prediction_type, inner)
    sides = [side * 2**levels for side in COARSE["spatial_shape"]]
    begin_with(path, network, unet_of_size(8**levels), {"spatial_shape": sides})
    return coarse, network


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("outer", OUTER)
def test_a_grown_network_sees_the_coarse_volume_as_the_coarse_network_does(levels, outer, tmp_path):
    """x_0 of the fine network, averaged over blocks, is x_0 of the coarse one at the same ratio of noise to signal."""
    scheduler = OUTER[outer]
    coarse, network = grown_by(levels, scheduler, "v_prediction", tmp_path)
    gain, t = 8 ** (levels / 2), scheduler.num_train_timesteps
    timesteps = torch.tensor([t // 10, t // 2, t - 10])
    x = torch.randn(3, 1, *[8 * 2**levels] * 3, generator=torch.Generator().manual_seed(0))
    a, s = (level.reshape(-1, 1, 1, 1, 1) for level in levels_at(scheduler, timesteps))
    p, q = sample_coefficients("v_prediction", a, s)
    known_a, known_s = levels_at(COSINE, torch.arange(250))
    ratio = s / (gain * a)
    time = np.interp(ratio.flatten().log().numpy(), (known_s / known_a).log().numpy(), np.arange(250))
    with torch.no_grad():
        x0 = p * x + q * network(x, timesteps)
        low = analysed(x, levels)[:, :1] / (gain**2 * a**2 + s**2).sqrt()
        output = coarse(low.float(), torch.from_numpy(time).float())
    p, q = sample_coefficients("flow", 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt())
    wanted = p * low + q * output
    torch.testing.assert_close(nn.functional.avg_pool3d(x0, 2**levels), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "gaussian_2m"])
def test_a_grown_networks_volume_averaged_over_blocks_is_the_coarse_volume(solver, tmp_path):
    scheduler = shifted(COSINE, 8**0.5)
    coarse, network = grown_by(1, scheduler, "v_prediction", tmp_path)
    noise = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    options = {"timestep_spacing": "logsnr", "clip_sample": False}
    fine = DiffusionSampler(network, scheduler, 8, solver, "v_prediction", sigma_max=160, **options)
    small = DiffusionSampler(coarse, COSINE, 8, solver, "flow", sigma_max=160, **options)
    assert torch.equal(fine.timesteps, small.timesteps)
    a, s = levels_at(scheduler, fine.timesteps[:1])
    first = (analysed(noise, 1)[:, :1] / (8 * a**2 + s**2).sqrt()).float()  # 1.00002: a begins a little above 0
    torch.testing.assert_close(nn.functional.avg_pool3d(fine(noise), 2), small(first), atol=1e-4, rtol=0)


def small_wavelet_network(dims=3, levels=1, scheduler=COSINE, classes=None, std=0.1):
    torch.manual_seed(0)
    unet = DiffusionModelUNet(
        spatial_dims=dims,
        in_channels=2 ** (dims * levels),
        out_channels=2 ** (dims * levels),
        channels=[8, 8],
        attention_levels=[False, True],
        num_head_channels=[0, 8],
        num_res_blocks=1,
        norm_num_groups=8,
        num_class_embeds=classes,
    )
    for parameter in unet.parameters():
        parameter.data.normal_(0, std)
    return WaveletUNet(unet.eval(), levels, scheduler, "v_prediction", process())


def test_from_one_level_to_two_is_exact():
    """A network at 2x the side with one level, grown to 4x with two: its block means are the 2x volumes."""
    one = small_wavelet_network(levels=1)
    outer = shifted(COSINE, 8**0.5)
    two = small_wavelet_network(levels=2, scheduler=outer)
    two.load_state_dict(grown(one.state_dict(), 64))
    noise = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    options = {"timestep_spacing": "logsnr", "clip_sample": False, "prediction_type": "v_prediction"}
    coarse = DiffusionSampler(one, COSINE, 10, "dpmpp_2m", sigma_max=60, **options)
    fine = DiffusionSampler(two, outer, 10, "dpmpp_2m", sigma_max=60, **options)
    wanted = coarse(analysed(noise, 1)[:, :1])
    torch.testing.assert_close(nn.functional.avg_pool3d(fine(noise), 2), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("dims, levels, classes", [(3, 1, None), (3, 2, 3), (2, 1, 3)])
def test_torchscript_equals_eager_at_other_sizes(outer, dims, levels, classes, tmp_path):
    scheduler = OUTER[outer]
    network = small_wavelet_network(dims, levels, scheduler, classes)
    options = {"timestep_spacing": "trailing", "condition": 1 if classes else None}
    sampler = DiffusionSampler(network, scheduler, 4, "dpmpp_2m", "v_prediction", **options)
    torch.jit.script(sampler).save(str(tmp_path / "model.ts"))
    loaded = torch.jit.load(str(tmp_path / "model.ts"))
    for batch, side in ((1, 16), (3, 32)):
        noise = torch.randn([batch, 1] + [side] * dims, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(loaded(noise), sampler(noise), atol=1e-5, rtol=0)
    assert 'value="cpu"' not in str(loaded.inlined_graph)


@pytest.mark.parametrize("outer", ["cosine", "rectified flow"])
def test_onnx_equals_eager(outer, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = small_wavelet_network(3, 2, OUTER[outer])
    path = str(tmp_path / "model.onnx")
    example = (torch.randn(2, 1, 16, 16, 16), torch.tensor([3.0, 1.0]))
    axes = {"x": {0: "batch", 2: "x", 3: "y", 4: "z"}, "timesteps": {0: "batch"}}
    torch.onnx.export(
        network, example, path, input_names=["x", "timesteps"], dynamic_axes=axes, dynamo=False, opset_version=17
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, timesteps = torch.randn(1, 1, 16, 32, 16), torch.tensor([7.0])
    (found,) = session.run(None, {"x": x.numpy(), "timesteps": timesteps.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, network(x, timesteps).numpy(), atol=1e-4)


def test_no_levels_is_the_network_itself(unet):
    assert in_wavelets(unet, 0, COSINE, "cosine", "epsilon") is unet


def test_the_state_dict_is_the_u_nets_own():
    network = small_wavelet_network()
    assert network.state_dict().keys() == network.unet.state_dict().keys()


def test_other_channels_are_refused(unet):
    with pytest.raises(BundleError, match="wavelet_levels: 1 in 3D takes a network of 8 input and output channels.*1"):
        WaveletUNet(unet, 1, COSINE, "epsilon", process())


WAVELETS = {"spatial_shape": "[32,32,32]", "wavelet_levels": 1}


@pytest.fixture(scope="module")
def grown_run(cohort, trained, tmp_path_factory) -> Path:
    """A training of 32^3 in wavelets that begins with the 16^3 weights of `trained`."""
    output = tmp_path_factory.mktemp("grown")
    done = train(
        cohort,
        output,
        **WAVELETS,
        init_ckpt=trained / "models/model.pt",
        prediction_type="v_prediction",
        timestep_sampling="balanced",
    )
    assert done.returncode == 0, done.stderr
    assert "grown from [16, 16, 16] to [32, 32, 32]" in done.stdout + done.stderr
    return output


def test_growing_is_recorded_and_sampled_without_naming_it_again(grown_run, tmp_path):
    description = json.loads((grown_run / "models/model.json").read_text())
    assert description["coarse"] == {
        "scheduler": "DDPMScheduler",
        "num_train_timesteps": 10,
        "schedule": "cosine",
        "prediction_type": "epsilon",
    }
    assert [description[key] for key in ("wavelet_levels", "prediction_type", "timestep_sampling")] == [
        1,
        "v_prediction",
        "balanced",
    ]
    done = sample(grown_run / "models/model.pt", tmp_path, **WAVELETS, num_samples=1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sample_seed0_volume000.nii.gz").is_file()


def test_a_grown_run_goes_on_without_its_beginning(cohort, grown_run, tmp_path):
    """What the coarse network was trained on is read from the run's own model.json."""
    shutil.copytree(grown_run, tmp_path, dirs_exist_ok=True)
    before = json.loads((tmp_path / "models/model.json").read_text())
    done = train(cohort, tmp_path, **WAVELETS, resume="true", max_iterations=8, timestep_sampling="balanced")
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "models/model.json").read_text())
    assert after | {"iteration": 6} == before


@pytest.mark.parametrize(
    "knobs, sentence",
    [
        ({"spatial_shape": "[64,64,64]", "wavelet_levels": 1}, r"can be grown to \[32, 32, 32\], but spatial_shape is"),
        ({"spatial_shape": "[30,30,30]", "wavelet_levels": 1}, "30 is not divisible by 4.* 1 of wavelets.*28 or 32"),
        ({"wavelet_levels": 3}, "wavelet_levels: 3 was given; it must be 0, 1 or 2"),
        ({**WAVELETS, "channels": "[8,16]", "num_head_channels": "[0,16]"}, "channels: .* was trained with"),
        ({**WAVELETS, "timestep_sampling": "even"}, "timestep_sampling: 'even' is unknown; it must be one of"),
    ],
)
def test_what_cannot_be_grown_is_refused(cohort, trained, tmp_path, knobs, sentence):
    knobs = {key: ast.literal_eval(value) if str(value)[0] == "[" else value for key, value in knobs.items()}
    places = {"dataset_dir": str(cohort), "init_ckpt": str(trained / "models/model.pt")}
    with pytest.raises(Exception) as refused:
        workflow("train", tmp_path, **places, **knobs).run()
    assert re.search(sentence, str(root_bundle_error(refused.value))), refused.value


def test_a_coarse_network_that_nobody_has_described_is_not_grown(unet, tmp_path):
    """It would be taken to predict v, and its volumes would be wrong in silence."""
    network, knobs = small_wavelet_network(), {"spatial_shape": [16, 16, 16]}
    torch.save(unet.state_dict(), tmp_path / "coarse.pt")
    with pytest.raises(BundleError, match="coarse.pt' does not say how it was trained.*model.json of that training"):
        begin_with(str(tmp_path / "coarse.pt"), network, small_wavelet_network(), knobs)
    with pytest.raises(BundleError, match="lacks num_train_timesteps, schedule"):
        coarse_process({"prediction_type": "flow"}, COSINE, "cosine")


def test_a_coarse_network_with_weights_that_are_not_finite_is_not_grown(unet, tmp_path):
    unet.out[2].conv.bias.data.fill_(float("nan"))
    torch.save(unet.state_dict(), tmp_path / "coarse.pt")
    (tmp_path / "coarse.json").write_text(json.dumps(process("flow") | {"spatial_shape": [8, 8, 8]}))
    networks, knobs = [small_wavelet_network() for _ in range(2)], {"spatial_shape": [16, 16, 16]}
    with pytest.raises(BundleError, match=r"coarse.pt' holds NaN or infinite weights.*out\.2\.conv\.bias"):
        begin_with(str(tmp_path / "coarse.pt"), *networks, knobs)
