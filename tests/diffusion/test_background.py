"""What a sampler makes background, and what it leaves alone."""

import numpy as np
import pytest
import torch
from conftest import preprocessing, workflow
from scipy import ndimage

from scripts.diffusion.background import largest_at_faces, largest_region, specks, without_haze
from scripts.scans.phantoms import phantom_cohort


@pytest.mark.parametrize("shape", [(40, 50), (24, 20, 28)])
@pytest.mark.parametrize("share", [0.2, 0.32, 0.5, 0.62])
def test_the_largest_region_is_that_of_scipy(shape, share):
    mask = np.random.default_rng(7).random(shape) < share
    regions, _ = ndimage.label(mask)
    sizes = np.bincount(regions.ravel())[1:]
    assert (sizes == sizes.max()).sum() == 1
    assert np.array_equal(largest_region(torch.from_numpy(mask)), regions == 1 + sizes.argmax())


def test_a_snake_is_one_region_and_an_empty_mask_has_none():
    snake = torch.zeros(9, 9, dtype=torch.bool)
    snake[::2], snake[1::4, -1], snake[3::4, 0] = True, True, True
    assert torch.equal(largest_region(snake), snake)
    assert not largest_region(torch.zeros(4, 4, 4, dtype=torch.bool)).any()


def brain_in_haze():
    """A volume with specks and haze around a brain, and the same without."""
    brain = torch.full((1, 1, 16, 16, 16), -1.0)
    brain[..., 4:12, 4:12, 4:12] = 0.5
    brain[..., 7:9, 7:9, 7:9] = -0.99  # a ventricle
    brain[..., 3, 4:12, 4:12] = -0.98  # the faint edge
    hazy = brain.clone()
    hazy[..., 1, 4:12, 4:12] = -0.98
    hazy[..., 14:, 14:, 14:] = 0.9
    hazy[..., 12, 12, 12] = -0.97  # touches the brain by a corner, and nothing brighter by a face
    return hazy, brain


@pytest.mark.parametrize("without", [without_haze, torch.jit.script(without_haze)], ids=["eager", "scripted"])
def test_specks_and_haze_go_and_the_brain_keeps_its_faint_edge_and_its_dark_middle(without):
    hazy, brain = brain_in_haze()
    assert torch.equal(without(hazy, 0.03), brain)
    assert torch.equal(without(hazy[:, :, 5], 0.03), brain[:, :, 5])  # in 2D
    assert torch.equal(without(torch.cat([hazy, brain]), 0.03), torch.cat([brain, brain]))
    assert torch.equal(without(hazy - 1, 0.0), hazy - 1)


@pytest.mark.parametrize("shape", [(9, 8), (7, 6, 8)])
def test_the_largest_at_faces_is_that_of_scipy(shape):
    values = np.random.default_rng(3).random(shape)
    expected = ndimage.maximum_filter(values, footprint=ndimage.generate_binary_structure(len(shape), 1))
    assert np.array_equal(largest_at_faces(torch.from_numpy(values)), expected)


def test_an_edge_that_fades_is_no_speck_and_noise_beside_it_is():
    edge = torch.tensor([0.0, 0.003, 0.015, 0.5]).expand(4, 4)
    assert not specks(edge, 0.02)[1:3].any()
    noisy = edge.clone()
    noisy[1, 1] = 0.012  # no face neighbour is 1.5 times as bright
    noisy[1, 0] = 0.0135  # brighter than all around it
    assert specks(noisy, 0.02).nonzero().tolist() == [[1, 0], [1, 1]]
    assert specks(noisy, 0.0125).nonzero().tolist() == [[1, 1]]  # what is brighter than the level is not faint
    assert specks(noisy.expand(3, 4, 4), 0.02)[1].nonzero().tolist() == [[1, 0], [1, 1]]


def test_a_speck_that_only_a_speck_made_look_like_an_edge_goes_too():
    volume = torch.full((1, 1, 9, 9, 9), -1.0)
    volume[..., 4:, 4:, 4:] = 0.5
    hazy = volume.clone()
    hazy[..., 3, 3, 3], hazy[..., 3, 3, 4] = -0.97, -0.982  # 0.009, beside 0.015
    assert torch.equal(without_haze(hazy, 0.03), volume)


def test_a_real_volume_passes_unchanged(tmp_path):
    folder = phantom_cohort(str(tmp_path), 3, (40, 40, 40), 4.0, seed=1)
    for i in range(3):
        volume = preprocessing(32)({"image": f"{folder}/phantom_00{i}.nii.gz"})["image"].float()
        assert 0.1 < (volume > -1).float().mean() < 0.9
        assert torch.equal(without_haze(volume[None], 0.03)[0], volume)


def test_the_sampler_of_inference_json_has_it(trained, tmp_path):
    knobs = {"ckpt_path": str(trained / "models/model.pt"), "num_inference_steps": 2}
    raw, clean = (
        workflow("inference", tmp_path, background=level, **knobs).parser.get_parsed_content("network_def")
        for level in (0, 0.6)
    )
    noise = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = without_haze(raw(noise), 0.6)
    *_, last = clean.on_the_way(noise)
    assert torch.equal(clean(noise), expected) and torch.equal(last, expected)
    assert torch.equal(clean(noise, None, 3), without_haze(raw(noise, None, 3), 0.6))
    assert not torch.equal(raw(noise), expected)
