import numpy as np
import pytest
import torch
from scipy import ndimage

from scripts.scans.warps import RandWarpd


def ball(shape, centre, radius=6.0) -> torch.Tensor:
    places = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    distance = np.sqrt(sum((p - c) ** 2 for p, c in zip(places, centre)))
    return torch.from_numpy(np.clip(radius + 0.5 - distance, 0, 1)).float()[None]


def warp_with(shape, angles=None, shifts=None, scales=None) -> RandWarpd:
    """A warp with given numbers in place of random ones."""
    warp = RandWarpd("image", prob=1.0, bend=0.0)
    warp.set_random_state(seed=0)
    warp.randomize(len(shape))
    dims = len(shape)
    warp.angles = np.array(angles or [0.0] * (3 if dims == 3 else 1))
    warp.shifts, warp.scales = np.array(shifts or [0.0] * dims), np.array(scales or [0.0] * dims)
    return warp


def sampled_places(warp: RandWarpd, shape) -> np.ndarray:
    """Where each voxel comes from, in voxels along the array's axes: (dims, *shape)."""
    grid = warp.grid(shape)[0].numpy()
    places = np.moveaxis(grid, -1, 0)[::-1]
    return np.stack([(p + 1) / 2 * (n - 1) for p, n in zip(places, shape)])


@pytest.mark.parametrize("shape", [(20, 24, 16), (20, 24)])
def test_without_movement_every_voxel_stays(shape):
    wanted = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    np.testing.assert_allclose(sampled_places(warp_with(shape), shape), wanted, atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 24, 16), (20, 24)])
def test_a_shift_is_a_share_of_the_side(shape):
    shifts = [0.1, -0.05, 0.2][: len(shape)]
    moved = sampled_places(warp_with(shape, shifts=shifts), shape) - sampled_places(warp_with(shape), shape)
    for axis, n in enumerate(shape):
        np.testing.assert_allclose(moved[axis], shifts[axis] * (n - 1), atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 24, 16), (20, 24)])
def test_a_turn_keeps_distances_though_sides_differ(shape):
    """Places around the middle go through a rotation matrix, in voxels."""
    dims = len(shape)
    places = sampled_places(warp_with(shape, angles=[0.3] * (3 if dims == 3 else 1)), shape)
    middle = (np.array(shape) - 1) / 2
    corners = [np.zeros(dims, int), *(np.eye(dims, dtype=int) * (np.array(shape) - 1))]
    found = np.stack([places[(slice(None), *corner)] - middle for corner in corners])
    before = np.stack([corner - middle for corner in corners])
    sides = np.array(shape) / (np.array(shape) - 1)  # a side is its voxels, the grid goes from centre to centre
    np.testing.assert_allclose(np.linalg.norm(found * sides, axis=1), np.linalg.norm(before * sides, axis=1), rtol=1e-4)


def test_bending_has_the_asked_root_mean_square():
    warp = RandWarpd("image", prob=1.0, rotate=0, translate=0, scale=0, bend=0.01)
    warp.set_random_state(seed=0)
    still, ratios = sampled_places(warp_with((32, 32, 32)), (32, 32, 32)), []
    for _ in range(12):
        warp.randomize(3)
        moved = sampled_places(warp, (32, 32, 32)) - still
        ratios.append(np.sqrt((moved**2).mean()) / (warp.bend_rms * 32))
    assert np.mean(ratios) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("moves", "alone"), [({"translate": 0.05}, 0.6), ({"bend": 0.004}, 0.9)], ids=["shifts", "small bends"]
)
def test_the_spectrum_stays_where_linear_interpolation_alone_loses_it(moves, alone):
    """Noise that was smoothed to half a voxel keeps the power of its high frequencies, also where it hardly moves."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(ndimage.gaussian_filter(rng.standard_normal((48, 48, 48)), 0.5, mode="wrap")).float()

    def high(volume) -> float:
        power = np.abs(np.fft.fftn(volume[8:40, 8:40, 8:40])) ** 2
        radius = np.sqrt(sum(f**2 for f in np.meshgrid(*[np.fft.fftfreq(32)] * 3, indexing="ij")))
        return power[(radius > 0.3) & (radius < 0.5)].sum()

    warp = RandWarpd("image", prob=1.0, **{"rotate": 0, "translate": 0, "scale": 0, "bend": 0, **moves})
    warp.set_random_state(seed=0)
    kept, plain = [], []
    for _ in range(12):
        kept.append(high(warp({"image": image[None]})["image"][0].numpy()))
        grid = warp.grid((48, 48, 48))
        linear = torch.nn.functional.grid_sample(image[None, None], grid, align_corners=True)
        plain.append(high(linear[0, 0].numpy()))
    assert np.mean(kept) / high(image.numpy()) == pytest.approx(1, abs=0.1)
    assert np.mean(plain) / high(image.numpy()) < alone


def test_images_of_an_item_move_alike_and_a_seed_repeats():
    item = {"image": ball((24, 24, 24), (10, 12, 14)), "labels": ball((24, 24, 24), (10, 12, 14))}
    results = []
    for _ in range(2):
        warp = RandWarpd(["image", "labels"], prob=1.0)
        warp.set_random_state(seed=5)
        results.append(warp(dict(item)))
    assert torch.equal(results[0]["image"], results[0]["labels"])
    assert torch.equal(results[0]["image"], results[1]["image"])
    assert not torch.equal(results[0]["image"], item["image"])
    assert float(results[0]["image"][0, :2].abs().max()) < 0.01  # background stays 0


def test_an_item_is_left_alone_as_often_as_asked():
    warp = RandWarpd("image", prob=0.25)
    warp.set_random_state(seed=0)
    image = ball((12, 12, 12), (5, 6, 6), 3)
    same = [torch.equal(warp({"image": image})["image"], image) for _ in range(100)]
    assert 65 <= sum(same) <= 85
