"""The preprocessing of configs/train.json on heads whose geometry is known in closed form, in world millimetres."""

from __future__ import annotations

from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from scripts.running.errors import BundleError, root_bundle_error
from scripts.scans.datasets import VolumeDataset
from scripts.scans.transforms import PadToAspect, ScaleForegroundd, fill_cavities, foreground_of, otsu_threshold

CENTRE = np.array([7.0, -11.0, 5.0])  # mm, of the brain; not the middle of the field of view
SEMI_AXES = np.array([23.0, 31.0, 21.0])  # mm
BLOB = CENTRE + [9.0, 12.0, -8.0]  # mm, a bright ball: right, front, low
BLOB_RADIUS = 7.0  # mm
UPRIGHT = np.eye(3)
MARGIN = 2  # crop_margin of the config, voxels of the scan


def preprocessing(spatial_shape=(16, 16, 16), key="preprocessing", **overrides):
    """A part of the `train` block as the config declares it."""
    parser = ConfigParser()
    parser.read_config(ROOT / "configs" / "train.json")
    for name, value in {"spatial_shape": list(spatial_shape), **overrides}.items():
        parser[name] = value
    return parser.get_parsed_content(f"train#{key}")


def turned(degrees):
    """Rotation matrix about x, y and z in turn, by the same angle."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_y = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def grid(axcodes="RAS", spacing=(1.0, 1.0, 4.0), rotation=UPRIGHT, field=(64, 80, 64)):
    """(shape, affine) of a scan whose voxel axes point where `axcodes` says; `spacing`, `field` in mm, in RAS order."""
    axes = ["RL", "AP", "SI"]
    order = [next(i for i, pair in enumerate(axes) if code in pair) for code in axcodes]
    signs = [1 if code in "RAS" else -1 for code in axcodes]
    shape = np.array([round(field[i] / spacing[i]) for i in order])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([rotation[:, i] * sign * spacing[i] for i, sign in zip(order, signs, strict=True)], 1)
    affine[:3, 3] = CENTRE + [1.3, -0.7, 0.4] - affine[:3, :3] @ (shape - 1) / 2
    return tuple(shape), affine


def world(shape, affine):
    """(*shape, 3) world coordinates of the voxel centres."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return index @ np.asarray(affine)[:3, :3].T + np.asarray(affine)[:3, 3]


def radius(points):
    """1 on the surface of the brain."""
    return np.linalg.norm((points - CENTRE) / SEMI_AXES, axis=-1)


def brain(points):
    """Grey values 60 (edge) to 120 (middle), 250 in the blob, exactly 0 outside."""
    r = radius(points)
    inside = np.where(np.linalg.norm(points - BLOB, axis=-1) < BLOB_RADIUS, 250, np.rint(120 - 60 * r))
    return np.where(r < 1, inside, 0.0)


def save(path, voxels, affine, dtype=np.float32):
    image = nib.Nifti1Image(voxels.astype(dtype), affine)
    nib.save(image, path)
    return str(path)


def cause(error):
    """The `BundleError` that MONAI wrapped."""
    found = root_bundle_error(error)
    assert found is not None, error
    return str(found)


SCANS = {
    "RAS thick slices": (("RAS", (1, 1, 4)), np.int16, ".nii"),
    "LAS": (("LAS", (1, 1, 4)), np.uint8, ".nii.gz"),
    "PIR": (("PIR", (1, 4, 1)), np.float32, ".nii"),
    "SPL": (("SPL", (4, 1, 1)), np.float64, ".nii.gz"),
    "RAS oblique": (("RAS", (1, 1.5, 4), turned(12)), np.int16, ".nii.gz"),
    "ILP oblique": (("ILP", (4, 1, 1), turned(-9)), np.float32, ".nii"),
}


@pytest.mark.parametrize("name", SCANS)
def test_a_landmark_stays_where_it_is_in_the_body(name, tmp_path):
    arguments, dtype, suffix = SCANS[name]
    shape, affine = grid(*arguments)
    side = 20
    path = save(tmp_path / f"scan{suffix}", brain(world(shape, affine)), affine, dtype)

    # closed form: the box around a turned ellipsoid is centred on it, with these half lengths along the scan's axes
    spacing = np.array(arguments[1], float)  # in RAS order
    rotation = arguments[2] if len(arguments) > 2 else UPRIGHT
    half = np.sqrt(np.einsum("ki,k,ki->i", rotation, SEMI_AXES**2, rotation))
    extent = 2 * half + 2 * MARGIN * spacing
    longest = int(np.argmax(extent))

    steps = list(preprocessing([side] * 3).transforms)
    names = [type(step).__name__ for step in steps]
    item = {"image": path}
    for step in steps[: names.index("VoxelSized")]:
        item = step(item)
    image = item["image"]
    for step in steps[names.index("VoxelSized") :]:
        item = step(item)
    voxel_size = item["voxel_size"].numpy()

    # isotropic, but for the rounding of the padded box to whole voxels of the scan
    assert (np.abs(voxel_size - voxel_size[longest]) <= 0.5 * spacing / side + 1e-4).all()
    assert voxel_size[longest] == pytest.approx(extent[longest] / side, abs=1.5 * spacing[longest] / side)
    np.testing.assert_allclose(np.linalg.norm(image.affine.numpy()[:3, :3], axis=0), voxel_size, rtol=1e-5)

    bright = np.clip(image.numpy()[0] - 0.3, 0, None)
    found = np.array([(bright * i).sum() for i in np.indices(bright.shape)]) / bright.sum()
    expected = rotation.T @ (BLOB - CENTRE) / voxel_size + (side - 1) / 2
    assert (np.abs(found - expected) < 0.4 + 0.5 * spacing / voxel_size).all()
    to_world = image.affine.numpy() @ (*found, 1)
    assert np.linalg.norm(to_world[:3] - BLOB) < voxel_size.max() / 2


@pytest.mark.parametrize("spatial_shape", [(16, 16, 16), (16, 20, 12), (24, 16, 16)])
def test_the_cube_spans_exactly_minus_one_to_one_on_a_background_of_minus_one(spatial_shape, tmp_path):
    shape, affine = grid(spacing=(1, 1, 2))
    path = save(tmp_path / "scan.nii", brain(world(shape, affine)), affine, np.int16)
    item = preprocessing(spatial_shape)({"image": path})
    image, voxel_size = item["image"], item["voxel_size"].numpy()
    assert type(image) is torch.Tensor and image.dtype == torch.float16 and image.shape == (1, *spatial_shape)
    assert image.min() == -1 and image.max() == 1
    assert np.ptp(voxel_size) <= (np.array([1, 1, 2]) / spatial_shape).max() + 1e-4  # rounding to voxels of the scan

    cube_affine = np.diag([*voxel_size, 1.0])
    cube_affine[:3, 3] = CENTRE - voxel_size * (np.array(spatial_shape) - 1) / 2
    r = radius(world(spatial_shape, cube_affine))
    outside = torch.tensor(r > 1 + 1.2 * voxel_size.max() / SEMI_AXES.min())
    assert outside.float().mean() > 0.25 and (image[0][outside] == -1).all()
    assert (image[0][torch.tensor(r < 0.8)] > -1).all()


def test_a_scan_with_a_trailing_axis_or_another_byte_order_is_the_same_cube(tmp_path):
    shape, affine = grid(spacing=(2, 2, 4))
    voxels = brain(world(shape, affine))
    run = preprocessing()
    plain = run({"image": save(tmp_path / "plain.nii", voxels, affine, "<i2")})["image"]
    for name, other in {"four.nii": voxels[..., None], "five.nii.gz": voxels[..., None, None]}.items():
        assert torch.equal(run({"image": save(tmp_path / name, other, affine, "<i2")})["image"], plain)
    assert torch.equal(run({"image": save(tmp_path / "big.nii", voxels, affine, ">i2")})["image"], plain)


def test_a_mask_beside_the_image_removes_skull_and_air(tmp_path):
    shape, affine = grid("LAS", (2, 2, 2), field=(76, 96, 76))
    points = world(shape, affine)
    r = radius(points)
    rng = np.random.default_rng(0)
    whole = np.where((r > 1.1) & (r < 1.25), 900, brain(points)) + rng.integers(0, 40, shape)
    mask = r < 1
    image = save(tmp_path / "head.nii", whole, affine, np.int16)
    by_mask = save(tmp_path / "head_mask.nii", mask, affine, np.uint8)
    by_hand = save(tmp_path / "brain.nii", np.where(mask, whole, 0), affine, np.int16)

    item = preprocessing([18] * 3)({"image": image, "mask": by_mask})
    expected = preprocessing([18] * 3)({"image": by_hand})
    assert torch.equal(item["image"], expected["image"]) and set(item) == {"image", "voxel_size"}
    assert item["voxel_size"][1] == pytest.approx((2 * SEMI_AXES[1] + 4 * MARGIN) / 18, abs=3 / 18)  # not the skull's
    cube = np.diag([*item["voxel_size"], 1.0])
    cube[:3, 3] = CENTRE - 17 / 2 * item["voxel_size"].numpy()
    skull = radius(world([18] * 3, cube)) > 1.25
    assert (item["image"][0][torch.tensor(skull)] == -1).all()


@pytest.mark.parametrize("sigma, dtype", [(6.0, np.float32), (6.0, np.int16), (0.4, np.int16), (0.8, np.uint8)])
def test_a_whole_head_is_cut_out_of_noisy_air_and_its_cavities_are_kept(sigma, dtype, tmp_path):
    """Rician noise; the smallest ones, rounded to whole numbers, make much of the air one exact value (0 or 1)."""
    shape, affine = grid(spacing=(2, 2, 2), field=(88, 104, 88))
    points = world(shape, affine)
    cavity = np.linalg.norm(points - CENTRE - [-6, -5, 0], axis=-1) < 6
    rng = np.random.default_rng(1)
    real, imaginary = sigma * rng.standard_normal((2, *shape))
    voxels = np.hypot(np.where(cavity, 0, brain(points)) + real, imaginary)
    voxels = (np.rint(voxels) if np.dtype(dtype).kind in "iu" else voxels).astype(dtype)

    mask, head = foreground_of(voxels), radius(points) < 1
    assert mask[cavity].all()
    assert 2 * (mask & head).sum() / (mask.sum() + head.sum()) > 0.97  # Dice against the ellipsoid

    item = preprocessing([16] * 3)({"image": save(tmp_path / "head.nii.gz", voxels, affine, dtype)})
    corners = [item["image"][0, x, y, z] for x, y, z in product((0, 1, -2, -1), repeat=3)]
    assert (torch.stack(corners) == -1).all()
    extent = 2 * SEMI_AXES[1] + 2 * MARGIN * 2
    assert item["voxel_size"][1] == pytest.approx(extent / 16, abs=3 / 16)  # the head's box, not the field of view


def test_a_z_scored_brain_is_the_same_cube_as_the_brain(tmp_path):
    """The background of a z-scored brain, 0, lies in the middle of its range; preprocessing is blind to a x + b."""
    shape, affine = grid(spacing=(2, 2, 4))
    voxels = brain(world(shape, affine))
    inside = voxels > 0
    voxels[inside] += np.random.default_rng(0).normal(0, 10, inside.sum())
    scored = np.where(inside, (voxels - voxels[inside].mean()) / voxels[inside].std(), 0)
    assert scored.min() < -1 and scored.max() > 1
    run = preprocessing()
    expected = run({"image": save(tmp_path / "brain.nii", voxels, affine)})
    found = run({"image": save(tmp_path / "scored.nii", scored, affine)})
    torch.testing.assert_close(found["image"], expected["image"], atol=2e-3, rtol=0)
    assert torch.equal(found["voxel_size"], expected["voxel_size"])


def test_a_brain_that_touches_all_faces_of_its_box_loses_nothing(tmp_path):
    """Half of a tight box is brain; its dark rim must not fall to a threshold."""
    shape, affine = grid(spacing=(2, 2, 2))
    inside = radius(world(shape, affine)) < 1
    box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(inside))
    voxels = brain(world(shape, affine))
    assert np.array_equal(foreground_of(voxels[box]), inside[box])


def test_padding_gives_the_proportions_of_the_cube_in_millimetres():
    """The example of its docstring, by hand: 220 mm are the longest side."""
    image = MetaTensor(torch.ones(1, 18, 22, 4), affine=np.diag([10.0, 10.0, 40.0, 1.0]))
    padded = PadToAspect([64, 64, 64])(image)
    assert padded.shape == (1, 22, 22, 6)  # 5.5 voxels of 40 mm, rounded to even
    assert padded.sum() == 18 * 22 * 4
    np.testing.assert_allclose(padded.affine[:3, 3], [-20, 0, -40])  # two voxels before in x, one in z
    assert PadToAspect([32, 64, 64])(image).shape == (1, 18, 36, 9)  # 360 mm long, as 180 mm fill half as many voxels


def test_a_fine_pattern_is_averaged_instead_of_aliased(tmp_path):
    """A checkerboard of one voxel holds no frequency that the cube can show: it must come out as its mean."""
    voxels = np.zeros((67, 67, 67))
    voxels[3:64, 3:64, 3:64] = 100 + 100 * (np.indices((61, 61, 61)).sum(0) % 2)
    voxels[3:30, 3:64, 3:64] = 200  # half of the block is plain, which is 1 in the cube
    path = save(tmp_path / "board.nii", voxels, np.eye(4))

    def board(anti_aliasing):
        transforms = preprocessing([17] * 3, percentiles=[0, 100])
        if not anti_aliasing:
            next(t for t in transforms.transforms if type(t).__name__ == "Resized").anti_aliasing = (False,)
        return transforms({"image": path})["image"][0, 9:-3, 3:-3, 3:-3].float()

    torch.testing.assert_close(board(True), torch.zeros(5, 11, 11), atol=0.1, rtol=0)
    assert board(False).abs().max() > 0.5  # so that the bound above means something


@pytest.mark.parametrize("probability, flips", [(0.0, 0), (1.0, 64), (0.5, None)])
def test_the_flip_mirrors_left_and_right_only(probability, flips):
    volumes = [{"image": torch.arange(24.0).reshape(1, 2, 3, 4) + 100 * i} for i in range(3)]
    augmentation = preprocessing(key="augmentation", flip_probability=probability)

    def flipped(seed):
        dataset = VolumeDataset(volumes, lambda item: item, augmentation, cache="none", seed=seed)
        seen = []
        for draw in range(64):
            original, found = volumes[draw % 3]["image"].numpy(), dataset[draw % 3, draw]["image"].numpy()
            mirrored = np.array_equal(found, original[:, ::-1])
            assert mirrored or np.array_equal(found, original)
            seen.append(mirrored)
        return seen

    if flips is not None:
        assert sum(flipped(0)) == flips
    else:
        assert 16 < sum(flipped(0)) < 48  # 32 expected, standard deviation 4
        assert flipped(0) == flipped(0) != flipped(1)


@pytest.mark.parametrize("share", [0.5, 0.15])
def test_otsu_separates_two_gaussians_where_a_search_does(share):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(20000) < share, rng.normal(160, 8, 20000), rng.normal(40, 8, 20000))

    def between_class_variance(threshold):
        low, high = values[values < threshold], values[values >= threshold]
        return low.size * high.size * (low.mean() - high.mean()) ** 2

    best = max(between_class_variance(t) for t in np.linspace(20, 180, 300))
    threshold = otsu_threshold(values.reshape(20, 20, 50))
    assert 64 < threshold < 136  # three standard deviations from each
    assert between_class_variance(threshold) == pytest.approx(best, rel=1e-3)


def test_filling_closes_a_hollow_ball_but_not_a_cup():
    x, y, z = np.indices((21, 21, 21)) - 10
    r = np.sqrt(x**2 + y**2 + z**2)
    shell = (r < 9) & (r > 6)
    assert np.array_equal(fill_cavities(shell), r < 9)
    assert np.array_equal(fill_cavities(shell[:, :, 10]), (r < 9)[:, :, 10])  # a ring, in two dimensions
    cup = shell & (z < 0)
    assert np.array_equal(fill_cavities(cup)[:, :, 10:], np.zeros((21, 21, 11), bool))


def test_an_image_without_foreground_is_named(tmp_path):
    shape, affine = grid(spacing=(4, 4, 4))
    points = world(shape, affine)
    flat = save(tmp_path / "flat.nii", radius(points) < 1, affine)
    with pytest.raises(RuntimeError) as error:
        preprocessing()({"image": flat})
    assert "flat.nii" in cause(error.value) and "foreground" in cause(error.value)

    scan = save(tmp_path / "scan.nii", brain(points), affine)
    empty = save(tmp_path / "empty.nii", np.zeros(shape), affine)
    with pytest.raises(RuntimeError) as error:
        preprocessing()({"image": scan, "mask": empty})
    assert "scan.nii" in cause(error.value) and "foreground" in cause(error.value)


def test_an_image_of_almost_one_intensity_is_named():
    voxels = torch.full((1, 8, 8, 8), 7.0)
    voxels[0, 0, 0, 0], voxels[0, 1, 1, 1] = 0, 8  # one voxel in 511 is no 99.5th percentile
    image = MetaTensor(voxels, meta={"filename_or_obj": "grey.nii.gz"})
    with pytest.raises(BundleError, match="'grey.nii.gz' has almost one intensity only"):
        ScaleForegroundd("image")({"image": image})


@pytest.mark.parametrize("percentiles", [[99.5, 0.5], [50, 50], [-1, 99], [1, 101]])
def test_percentiles_out_of_order_or_range_are_named_before_a_file_is_read(percentiles):
    with pytest.raises(Exception) as error:  # noqa: B017 - MONAI's own wrapping
        preprocessing(percentiles=percentiles)
    assert f"percentiles: [{percentiles[0]}, {percentiles[1]}] was given" in cause(error.value)


def test_clipping_follows_its_formula():
    rng = np.random.default_rng(0)
    voxels = rng.gamma(2.0, 50.0, (1, 12, 12, 12)) * (rng.random((1, 12, 12, 12)) < 0.6)
    low, high = np.percentile(voxels[voxels > 0], [5, 90])
    expected = 2 * (np.clip(voxels, low, high) - low) / (high - low) - 1
    scaled = ScaleForegroundd("image", 5, 90)({"image": MetaTensor(torch.tensor(voxels))})["image"]
    np.testing.assert_allclose(scaled.numpy(), expected, atol=1e-6)
    assert (scaled.numpy()[voxels == 0] == -1).all() and scaled.dtype == torch.float32
