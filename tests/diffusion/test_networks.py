"""The ConvNeXt denoiser is what the paper draws, and everything that works with MONAI's network works with it."""

import copy

import nibabel as nib
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, sample, train
from monai.bundle import ConfigParser
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock

from scripts.diffusion.acceleration import prepared
from scripts.diffusion.networks import ConvNeXtBlock, ConvNeXtUNet
from scripts.diffusion.sampler import DiffusionSampler
from scripts.diffusion.weights import load_weights
from scripts.running.errors import BundleError

CONVNEXT = "'configs/presets/convnext.json'"
CPU = torch.device("cpu")


def randomised(network):
    """All weights random, so that nothing that begins as zero hides a part of the network."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1)
    return network.eval()


def small_convnext(spatial_dims, num_class_embeds=None):
    sizes = {"channels": [8, 16], "attention_levels": [False, True], "num_head_channels": [0, 16]}
    return randomised(ConvNeXtUNet(spatial_dims, 1, 1, **sizes, norm_num_groups=4, num_class_embeds=num_class_embeds))


def inputs(spatial_dims):
    return torch.randn(2, 1, *[8] * spatial_dims, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 9.0])


def gradients(network, *arguments):
    network.zero_grad()
    network(*arguments).square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("in_channels", [6, 4])
def test_a_block_is_the_papers_with_the_time_added(spatial_dims, in_channels):
    block = randomised(ConvNeXtBlock(spatial_dims, in_channels, 6, 5))
    w, conv = block.state_dict(), F.conv2d if spatial_dims == 2 else F.conv3d
    x, emb = torch.randn(2, in_channels, *[9, 8, 7][:spatial_dims]), torch.randn(2, 5)
    skip = x if in_channels == 6 else conv(x, w["skip_connection.weight"], w["skip_connection.bias"])
    h = conv(skip, w["conv1.weight"], w["conv1.bias"], padding=3, groups=6)
    h = (
        h.movedim(1, -1).flatten(1, -2)
        + F.linear(F.gelu(emb), w["time_emb_proj.weight"], w["time_emb_proj.bias"])[:, None]
    )
    h = (h - h.mean((1, 2), keepdim=True)) / (h.var((1, 2), unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h * w["norm.weight"] + w["norm.bias"]
    h = F.gelu(F.linear(h, w["conv2.weight"].flatten(1), w["conv2.bias"]))
    h = F.linear(h, w["conv3.weight"].flatten(1), w["conv3.bias"])
    assert w["conv1.weight"].shape == (6, 1, *[7] * spatial_dims) and w["conv2.weight"].shape[:2] == (24, 6)
    torch.testing.assert_close(block(x, emb), skip + h.movedim(-1, 1).reshape(skip.shape), atol=1e-5, rtol=1e-4)


def test_a_new_block_is_its_skip_connection():
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(ConvNeXtBlock(2, 4, 4, 3)(x, torch.randn(1, 3)), x)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradients_reach_every_parameter_of_a_network_of_convnext_blocks_alone(spatial_dims):
    network = small_convnext(spatial_dims, num_class_embeds=2)
    x, timesteps = inputs(spatial_dims)
    assert network(x, timesteps, None, torch.tensor([0, 1])).shape == x.shape
    assert sum(isinstance(m, ConvNeXtBlock) for m in network.modules()) == 2 + 2 + 4  # down, middle, up
    assert not any(isinstance(m, DiffusionUNetResnetBlock) for m in network.modules())
    for name, gradient in gradients(network, x, timesteps, None, torch.tensor([0, 1])).items():
        assert gradient.abs().max() > 0, name


def test_time_and_class_change_the_output():
    network, (x, timesteps) = small_convnext(2, num_class_embeds=3), inputs(2)
    first, second = torch.tensor([0, 0]), torch.tensor([1, 0])
    difference = (
        (network(x, timesteps, class_labels=second) - network(x, timesteps, class_labels=first)).abs().amax((1, 2, 3))
    )
    assert difference[0] > 1e-4 and difference[1] == 0
    assert (
        network(x, timesteps + 50, class_labels=first) - network(x, timesteps, class_labels=first)
    ).abs().max() > 1e-4


def test_weights_go_to_a_file_and_back(tmp_path):
    network, other = small_convnext(3), small_convnext(3)
    for parameter in other.parameters():
        parameter.data.zero_()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(*inputs(3)), network(*inputs(3)))


@pytest.mark.parametrize("spatial_dims, num_class_embeds", [(2, 3), (3, None)])
def test_the_scripted_sampler_equals_the_eager_one(spatial_dims, num_class_embeds, scheduler, tmp_path):
    sampler = DiffusionSampler(small_convnext(spatial_dims, num_class_embeds), scheduler, 4, "dpmpp_2m")
    torch.jit.script(sampler).save(str(tmp_path / "model.ts"))
    loaded = torch.jit.load(str(tmp_path / "model.ts"))
    for batch, sides in [(1, [8, 8, 8]), (3, [12, 8, 4])]:
        noise = torch.randn(batch, 1, *sides[:spatial_dims], generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(loaded(noise), sampler(noise), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_checkpointing_and_channels_last_give_the_same_gradients(spatial_dims):
    network = small_convnext(spatial_dims)
    expected = gradients(network, *inputs(spatial_dims))
    found = gradients(prepared(copy.deepcopy(network), CPU, activation_checkpointing="all"), *inputs(spatial_dims))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name])
    found = gradients(prepared(network, CPU, channels_last=True), *inputs(spatial_dims))
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=float(1e-4 * scale), rtol=1e-3)


@pytest.mark.parametrize(
    "presets, dims, million",
    [(["convnext"], 3, 4.3), (["paper_128", "convnext"], 3, 12.0), (["mridiff", "convnext"], 2, 2.2)],
)
def test_the_preset_follows_others_and_serves_training_and_inference(presets, dims, million):
    for name, key in (("train", "network_def"), ("inference", "network_def#unet#unet")):
        parser = ConfigParser()
        parser.read_config([str(ROOT / f"configs/{part}.json") for part in (name, *(f"presets/{p}" for p in presets))])
        network = parser.get_parsed_content(key)
        assert isinstance(network, ConvNeXtUNet) and network.conv_in.conv.weight.ndim == 2 + dims
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == million


def test_the_preset_trains_and_samples(cohort, tmp_path):
    done = train(cohort, tmp_path, config_file=f"['configs/train.json',{CONVNEXT}]", max_iterations=2)
    assert done.returncode == 0, done.stderr
    model = tmp_path / "models/model.pt"
    assert any("time_emb_proj" in name and "resnets" in name for name in torch.load(model, weights_only=True))
    done = sample(model, tmp_path / "samples", config_file=f"['configs/inference.json',{CONVNEXT}]", num_samples=1)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "samples").glob("*.nii.gz")
    assert nib.load(path).shape == (16, 16, 16)
    with pytest.raises(
        BundleError, match="network_class: 'DiffusionModelUNet' was given.*scripts.diffusion.networks.ConvNeXtUNet"
    ):
        load_weights(small_convnext(3), str(model), expected={"network_class": "DiffusionModelUNet"})
