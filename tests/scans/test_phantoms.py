"""The phantoms against geometry that is known without them, and the cohort against what may be on a disk."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np
import pytest

from scripts.running.errors import BundleError
from scripts.scans.phantoms import Ellipsoid, Person, draw_head, ellipsoid_coverage, phantom_cohort, shepp_logan_phantom

SHAPE = (32, 32, 32)


def about_z(degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def about_x(degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def ellipsoid(semi_axes, centre=(0.0, 0.0, 0.0), rotation=None):
    rotation = np.eye(3) if rotation is None else rotation
    return Ellipsoid(1.0, np.array(semi_axes), np.array(centre), rotation)


def voxel_centres(shape):
    """(X, Y, Z, 3) positions in head units, written down anew here."""
    steps = [(2 * np.arange(n) + 1 - n) / min(shape) for n in shape]
    return np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1)


@pytest.fixture(scope="module")
def cohort_dir(tmp_path_factory):
    return phantom_cohort(tmp_path_factory.mktemp("cohort") / "data", 3, (24, 32, 28), voxel_size=2.5, seed=7)


@pytest.mark.parametrize("shape", [(64, 64, 64), (48, 60, 52), (49, 49, 49)])
@pytest.mark.parametrize(
    "body",
    [
        ellipsoid((0.5, 0.5, 0.5)),
        ellipsoid((0.69, 0.92, 0.81)),
        ellipsoid((0.3, 0.6, 0.4), (0.11, -0.07, 0.05), about_z(25) @ about_x(-15)),
    ],
)
def test_coverage_sums_to_the_analytic_volume(shape, body):
    coverage = ellipsoid_coverage(shape, body)
    volume = 4 / 3 * np.pi * np.prod(body.semi_axes) * (min(shape) / 2) ** 3
    assert coverage.shape == shape and coverage.dtype == np.float32
    assert coverage.sum(dtype=np.float64) == pytest.approx(volume, rel=0.01)


def test_coverage_is_the_fraction_of_points_of_a_voxel_that_lie_inside():
    shape, fine = (24, 24, 24), 6
    body = ellipsoid((0.3, 0.7, 0.5), (0.1, 0.05, -0.15), about_z(30) @ about_x(20))
    points = voxel_centres([n * fine for n in shape])
    inside = (((points - body.centre) @ body.rotation / body.semi_axes) ** 2).sum(-1) <= 1
    fraction = inside.reshape(24, fine, 24, fine, 24, fine).mean(axis=(1, 3, 5))
    coverage = ellipsoid_coverage(shape, body)
    assert np.abs(coverage - fraction).max() < 0.25  # a linear edge is not the exact share of a slanted cut
    assert np.abs(coverage - fraction)[(fraction > 0) & (fraction < 1)].mean() < 0.06
    assert coverage.min() == 0 and coverage.max() == 1


def test_coverage_lies_at_the_centre_along_the_axes_that_were_asked_for():
    body = ellipsoid((0.2, 0.6, 0.35), (0.1, -0.05, 0.2), about_z(30))
    coverage = ellipsoid_coverage((64, 64, 64), body).astype(np.float64).ravel()
    points = voxel_centres((64, 64, 64)).reshape(-1, 3)
    centre = coverage @ points / coverage.sum()
    covariance = np.cov(points.T, aweights=coverage, ddof=0)
    np.testing.assert_allclose(centre, body.centre, atol=1e-3)
    # a homogeneous ellipsoid has the variance s^2 / 5 along an axis of half length s
    expected = about_z(30) @ np.diag(np.square(body.semi_axes) / 5) @ about_z(30).T
    np.testing.assert_allclose(covariance, expected, atol=1e-3)


def test_an_ellipsoid_centred_on_a_voxel_is_full_there():
    assert ellipsoid_coverage((33, 33, 33), ellipsoid((0.2, 0.2, 0.2)))[16, 16, 16] == 1


@pytest.mark.parametrize("seed", range(40))
def test_a_drawn_head_is_a_head(seed):
    skull, brain, left, right, front, *spots, lesion = draw_head(np.random.default_rng(seed))
    assert len(spots) == 5
    skull_cover, brain_cover, lesion_cover = (ellipsoid_coverage((48, 48, 48), part) for part in (skull, brain, lesion))
    assert (skull_cover[brain_cover > 0] > 0.99).all()  # bone all around the brain
    assert (brain_cover[lesion_cover > 0] == 1).all()
    for side in range(3):
        assert not np.take(skull_cover, (0, -1), axis=side).any()  # a free margin all around the head
    # the table's first ventricle is the one at +x; both lean outwards to the front, and the bright body lies in front
    assert left.centre[0] > 0.1 and right.centre[0] < -0.1 and front.centre[1] > 0.2
    assert left.rotation[0, 1] * left.rotation[1, 1] > 0 > right.rotation[0, 1] * right.rotation[1, 1]
    assert skull.amplitude + brain.amplitude + left.amplitude > 0  # darker than the brain, brighter than the background
    assert lesion.amplitude > 0.2 or lesion.amplitude < -0.1


@pytest.mark.parametrize("shape", [SHAPE, (24, 40, 33)])
def test_background_is_exactly_zero_and_grey_values_stay_in_range(shape):
    for seed in range(5):
        phantom = shepp_logan_phantom(shape, seed)
        skull = draw_head(np.random.default_rng(seed))[0]
        radius = np.linalg.norm((voxel_centres(shape) - skull.centre) @ skull.rotation / skull.semi_axes, axis=-1)
        voxel = 2 / min(shape) / skull.semi_axes.min()  # one voxel in units of the radius
        assert phantom.shape == shape and phantom.dtype == np.float32
        assert phantom.min() == 0 and 0.7 < phantom.max() <= 1
        assert not phantom[radius > 1 + voxel].any()
        assert (phantom[radius < 1 - voxel] > 0).all()
        assert np.median(phantom[radius < 0.6]) == pytest.approx(0.33, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_plain_brain_has_noise_and_a_bias_field(seed):
    phantom = shepp_logan_phantom((64, 64, 64), seed).astype(np.float64)
    _, brain, *others = draw_head(np.random.default_rng(seed))
    plain = ellipsoid_coverage(phantom.shape, brain) == 1
    for other in others:
        plain &= ellipsoid_coverage(phantom.shape, other) == 0
    x, y, z = voxel_centres(phantom.shape)[plain].T
    terms = np.stack([np.ones_like(x), x, y, z, x * x, x * y, x * z, y * y, y * z, z * z], axis=-1)
    smooth = terms @ np.linalg.lstsq(terms, phantom[plain], rcond=None)[0]
    assert 0.007 < (phantom[plain] - smooth).std() < 0.017
    assert 0.05 < 1 - smooth.min() / smooth.max() < 0.2


def test_the_same_seed_is_the_same_voxels_and_other_seeds_are_not():
    phantom = shepp_logan_phantom(SHAPE, 3)
    np.testing.assert_array_equal(phantom, shepp_logan_phantom(SHAPE, 3))
    for other in (4, (3, 1), (0, 3)):
        assert np.abs(phantom - shepp_logan_phantom(SHAPE, other)).mean() > 0.01


def test_the_same_seed_is_the_same_head_on_a_finer_grid():
    coarse, fine = shepp_logan_phantom(SHAPE, 5), shepp_logan_phantom((64, 64, 64), 5)
    averaged = fine.reshape(32, 2, 32, 2, 32, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(coarse.ravel(), averaged.ravel())[0, 1] > 0.99


def test_the_head_is_nearly_but_not_quite_symmetric():
    phantom = shepp_logan_phantom((48, 48, 48), 0)
    likeness = np.corrcoef(phantom.ravel(), phantom[::-1].ravel())[0, 1]
    assert 0.6 < likeness < 0.98


def test_nifti_files_say_where_the_voxels_are(cohort_dir):
    assert sorted(os.listdir(cohort_dir)) == [f"phantom_{i:03d}.nii.gz" for i in range(3)]
    for i in range(3):
        image = nib.load(os.path.join(cohort_dir, f"phantom_{i:03d}.nii.gz"))
        voxels = np.asanyarray(image.dataobj)
        assert image.shape == (24, 32, 28) and image.get_data_dtype() == np.int16 and voxels.dtype == np.int16
        assert image.header["sform_code"] == 1 and image.header["qform_code"] == 1
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms() == (2.5, 2.5, 2.5) and image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.get_sform(), image.get_qform(), atol=1e-5)
        np.testing.assert_allclose(image.affine @ [11.5, 15.5, 13.5, 1], [0, 0, 0, 1], atol=1e-5)
        assert voxels[0, 0, 0] == 0 and 700 < voxels.max() <= 1000
        np.testing.assert_allclose(voxels / 1000, shepp_logan_phantom((24, 32, 28), (7, i)), atol=5.1e-4)


def test_only_missing_phantoms_are_made(cohort_dir, capfd):
    paths = [os.path.join(cohort_dir, name) for name in sorted(os.listdir(cohort_dir))]
    written = [os.stat(path).st_mtime_ns for path in paths]
    with open(paths[1], "rb") as file:
        content = file.read()
    assert phantom_cohort(cohort_dir, 3, (24, 32, 28), 2.5, 7) == cohort_dir and isinstance(cohort_dir, str)
    assert [os.stat(path).st_mtime_ns for path in paths] == written
    assert capfd.readouterr().err == ""  # no progress bar when there is nothing to make
    os.remove(paths[1])
    phantom_cohort(cohort_dir, 3, (24, 32, 28), 2.5, 7)
    assert "phantoms" in capfd.readouterr().err
    assert [os.stat(path).st_mtime_ns for path in (paths[0], paths[2])] == [written[0], written[2]]
    with open(paths[1], "rb") as file:
        assert file.read() == content
    assert len(os.listdir(cohort_dir)) == 3


@pytest.mark.parametrize(
    "name", ["brain.nii.gz", "brain.nii", "T1.mgz", "sub-01/anat/sub-01_T1w.nii.gz", "old/phantom_000.nii.gz"]
)
def test_the_users_own_data_are_left_alone(tmp_path, name):
    own = tmp_path / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    assert phantom_cohort(tmp_path, 2, SHAPE) == str(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and own.read_bytes() == b"mine"


def test_a_folder_with_other_things_than_volumes_is_filled(tmp_path):
    (tmp_path / "notes.txt").write_text("no volume")
    phantom_cohort(tmp_path, 1, SHAPE)
    assert (tmp_path / "phantom_000.nii.gz").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    folder = str(tmp_path / "file" / "data")
    with pytest.raises(BundleError, match="^dataset_dir: ") as caught:
        phantom_cohort(folder, 1, SHAPE)
    assert folder in str(caught.value)


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full_disk(source, target):
        assert not source.endswith((".nii", ".nii.gz")) and os.path.dirname(source) == os.path.dirname(target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(BundleError, match="No space left on device"):
        phantom_cohort(tmp_path, 1, SHAPE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_subjects", 0),
        ("num_subjects", "3"),
        ("spatial_shape", (48, 48)),
        ("spatial_shape", (48, 48, 8)),
        ("spatial_shape", (48.5, 48, 48)),
        ("spatial_shape", 48),
        ("voxel_size", 0.0),
        ("voxel_size", float("nan")),
        ("seed", -1),
        ("seed", None),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, key, value):
    with pytest.raises(BundleError, match=f"^{key}: "):
        phantom_cohort(tmp_path / "data", **{key: value})
    assert not (tmp_path / "data").exists()


def test_age_widens_the_ventricles_and_sex_sets_the_size_of_the_head(tmp_path):
    def measured(person):
        volume = shepp_logan_phantom((48, 48, 48), (3, 1), person)
        inside = volume[16:32, 16:34, 18:30]  # the middle of the brain
        return (volume > 0).sum(), (inside < 0.2).sum()

    (large, young), (_, old), (small, _) = (measured(Person(*who)) for who in ((20, "m"), (80, "m"), (50, "f")))
    assert old > 2 * young
    assert small / large == pytest.approx(0.85**3, abs=0.04)
    folder = phantom_cohort(str(tmp_path / "people"), 20, (16, 16, 16), 12.0, people=True)
    rows = [line.split("\t") for line in (tmp_path / "people/participants.tsv").read_text().splitlines()]
    assert rows[0] == ["participant_id", "age", "sex"] and [row[0] for row in rows[1:3]] == [
        "phantom_000",
        "phantom_001",
    ]
    assert all(20 <= float(age) <= 80 for _, age, _ in rows[1:]) and {sex for _, _, sex in rows[1:]} == {"f", "m"}
    assert phantom_cohort(folder, 20, (16, 16, 16), 12.0, people=True) == folder
