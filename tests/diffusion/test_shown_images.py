"""Condition images in the network: beside the bands, dropped, guided, grown and exported."""

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from scripts.diffusion.objective import AutocastDiffusionInferer, SeededPrepareBatch
from scripts.diffusion.sampler import DiffusionSampler
from scripts.diffusion.wavelets import grown, in_blocks, in_wavelets
from scripts.running.errors import BundleError
from scripts.training.start import begin_with


def network_with(images, levels, scheduler, prediction_type="sample", seed=0):
    torch.manual_seed(seed)
    bands = 8**levels
    unet = DiffusionModelUNet(3, bands * (1 + images), bands, 1, (16, 16), (False, False), 8, num_head_channels=16)
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.1)
    return in_wavelets(unet, levels, scheduler, "cosine", prediction_type).eval()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_blocks_hold_every_voxel_once_and_the_coarse_position_changes_last():
    x = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    two = in_blocks(x, 2)
    assert two.shape == (1, 64, 1, 1, 1) and sorted(two.flatten().tolist()) == list(range(64))
    one = in_blocks(x, 1)
    means = x.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).mean((-1, -2, -3))
    torch.testing.assert_close(one.mean(1, keepdim=True), means)
    torch.testing.assert_close(two.reshape(1, 8, 8, 1, 1, 1).mean(2), in_blocks(means, 1))
    assert torch.equal(in_blocks(torch.cat([x, 2 * x], 1), 1), torch.cat([one, 2 * one], 1))


@pytest.mark.parametrize("levels", [0, 1])
def test_images_change_the_volume_and_unknown_ones_are_zero(scheduler, levels):
    sampler = DiffusionSampler(network_with(2, levels, scheduler), scheduler, 3, "dpmpp_2m_sde", "sample")
    noise, images = normal(2, 1, 8, 8, 8), normal(2, 2, 8, 8, 8, seed=1)
    shown = sampler(torch.cat([noise, images], 1))
    assert shown.shape == noise.shape
    plain = sampler(noise)
    assert (shown - plain).abs().max() > 1e-3
    torch.testing.assert_close(sampler(torch.cat([noise, 0 * images], 1)), plain)
    archive = torch.jit.script(sampler)
    torch.testing.assert_close(archive(torch.cat([noise, images], 1)), shown, atol=1e-5, rtol=0)
    torch.testing.assert_close(archive(noise), plain, atol=1e-5, rtol=0)
    assert [*sampler.on_the_way(torch.cat([noise, images], 1))][-1].shape == noise.shape


def test_guidance_leads_away_from_the_network_that_is_shown_nothing(scheduler):
    unet = network_with(1, 0, scheduler)
    x, images, times = normal(1, 1, 8, 8, 8), normal(1, 1, 8, 8, 8, seed=1), torch.tensor([3.0])
    sampler = DiffusionSampler(unet, scheduler, 3, "ddim", "sample", guidance_scale=2.5)
    asked = sampler.asked_of(torch.cat([x, images], 1), None)
    with torch.no_grad():
        with_it, without = (unet(torch.cat([x, shown], 1), times) for shown in (images, 0 * images))
        torch.testing.assert_close(sampler.predict(x, times, asked), without + 2.5 * (with_it - without))
    with pytest.raises(BundleError, match="knows no covariates"):
        DiffusionSampler(network_with(0, 0, scheduler), scheduler, 3, guidance_scale=2)


def test_training_concatenates_images_and_drops_some(scheduler):
    prepare = SeededPrepareBatch(scheduler, "epsilon", class_dropout=0.25)
    count = 2000
    batch = {"image": torch.zeros(count, 1, 1), "draw": torch.arange(count), "condition_image": torch.ones(count, 2, 1)}
    extra = prepare(batch, "cpu")[3]
    kept = extra["condition"].flatten(1).amax(1)
    assert set(kept.tolist()) == {0.0, 1.0} and extra["mode"] == "concat"
    assert 1 - kept.mean() == pytest.approx(0.25 + 0.75 * 0.25, abs=0.04)  # with all else, or alone
    seen = []

    def network(x, timesteps, context=None):
        seen.append(x)
        return x[:, :1]

    images, _, _, extra = SeededPrepareBatch(scheduler, "epsilon")({k: v[:3] for k, v in batch.items()}, "cpu")
    AutocastDiffusionInferer(scheduler)(images, network, **extra)
    assert seen[0].shape == (3, 3, 1) and (seen[0][:, 1:] == 1).all()


@pytest.mark.parametrize("before, after", [(0, 1), (1, 1), (1, 2), (0, 0)])
@pytest.mark.parametrize("levels", [0, 1])
def test_a_grown_network_begins_as_the_one_before(scheduler, before, after, levels):
    """Of new images it sees nothing; a finer network sees the means of the blocks where the coarse one saw voxels."""
    coarse = network_with(before, levels, scheduler, "v_prediction")
    old, new = [("t2", None)][:before], [("t2", None), ("seg", 1)][:after]
    finer = network_with(after, levels + 1, scheduler, "v_prediction", seed=1)
    finer.load_state_dict(grown(coarse.state_dict(), 8 ** (levels + 1), old, new))
    noise, images = normal(1, 1, 16, 16, 16), normal(1, after, 16, 16, 16, seed=2)
    low = in_blocks(noise, 1).sum(1, keepdim=True) / 8**0.5  # the LLL band of the noise, as the coarse network's own
    means = nn.functional.avg_pool3d(images[:, :before], 2) if before else images[:, :0, ::2, ::2, ::2]
    samplers = [
        DiffusionSampler(
            n, scheduler, 4, "ddim", "v_prediction", clip_sample=False, sigma_max=20, timestep_spacing="logsnr"
        )
        for n in (coarse, finer)
    ]
    if levels == 0:  # of voxels the coarse process is that of v, as `in_wavelets` takes it
        with torch.no_grad():
            x, times = torch.cat([low, means], 1), torch.tensor([4.0])
            bands = torch.cat([low, torch.zeros(1, 7, 8, 8, 8), in_blocks(images, 1)], 1)
            inner = finer.unet(bands, times)
        torch.testing.assert_close(inner[:, :1], coarse(x, times), atol=1e-5, rtol=1e-4)
        assert inner[:, 1:].abs().max() == 0
    same = network_with(after, levels, scheduler, "v_prediction", seed=1)
    same.load_state_dict(grown(coarse.state_dict(), 8**levels, old, new))
    with torch.no_grad():
        wanted = coarse(torch.cat([noise, images[:, :before]], 1), torch.tensor([5]))
        torch.testing.assert_close(same(torch.cat([noise, images], 1), torch.tensor([5])), wanted, atol=1e-5, rtol=1e-4)
    assert samplers[1](torch.cat([noise, images], 1)).shape == noise.shape


def test_a_training_begins_with_weights_that_were_shown_nothing(scheduler, tmp_path):
    plain, shown = network_with(0, 1, scheduler), network_with(2, 1, scheduler, seed=1)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    known = [{"name": "seg", "suffix": "_dseg", "labels": [1, 2]}]
    begin_with(str(tmp_path / "plain.pt"), shown, network_with(2, 1, scheduler), {}, (), known)
    x, images = normal(1, 1, 16, 16, 16), normal(1, 2, 16, 16, 16, seed=1)
    with torch.no_grad():
        found = shown(torch.cat([x, images], 1), torch.tensor([4]))
        torch.testing.assert_close(found, plain(x, torch.tensor([4])), atol=1e-5, rtol=1e-4)
