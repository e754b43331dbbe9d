"""Pose, size and likeness against brains of known pose and size."""

import nibabel as nib
import numpy as np
import pytest

from scripts.scans.outliers import QUANTITIES, box_of, likeness, measured, outliers, tilts


def egg(pitch=0.0, roll=0.0, yaw=0.0, spacing=(4.0, 4.0, 4.0), side=200.0):
    """A symmetric brain of 68 x 84 x 60 mm half axes with a bright front and two dark ventricles, turned in space."""
    a, b, c = np.radians([pitch, roll, yaw])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    axes = [np.arange(0, side, step) - side / 2 for step in spacing]
    mm = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    x, y, z = (about_z @ about_y @ about_x).T @ mm
    mask = (x / 68) ** 2 + (y / 84) ** 2 + (z / 60) ** 2 < 1
    image = 0.6 + 0.3 * y / 84 + 0.1 * z / 60
    for sign in (-1, 1):
        image[((x - sign * 20) / 10) ** 2 + (y / 30) ** 2 + ((z - 10) / 12) ** 2 < 1] = 0.1
    shape = [len(axis) for axis in axes]
    return (image * mask).reshape(shape), mask.reshape(shape), np.array(spacing)


@pytest.mark.parametrize("pitch, roll, yaw", [(0, 0, 0), (20, 0, 0), (0, 14, 0), (0, 0, -12), (-15, 8, 10)])
def test_the_tilt_of_a_brain_of_known_tilt(pitch, roll, yaw):
    found = tilts(*egg(pitch, roll, yaw))
    assert found[0] == pytest.approx(pitch, abs=3 if roll else 1)  # a projection: roll and yaw change it a little
    assert found[1:] == pytest.approx([roll, yaw], abs=2)


def test_what_is_measured_does_not_depend_on_the_grid_nor_on_the_orientation(tmp_path):
    image, mask, _ = egg(10, spacing=(2.0, 2.0, 4.0))
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    turned = np.array([[0, -2.0, 0, 9], [2.0, 0, 0, -7], [0, 0, -4.0, 3], [0, 0, 0, 1]])  # (y, -x, -z)
    nib.save(nib.Nifti1Image((image * 900).astype(np.int16), affine), tmp_path / "a.nii")
    nib.save(nib.Nifti1Image((np.rot90(image, -1)[:, :, ::-1] * 90).astype(np.float32), turned), tmp_path / "b.nii")
    one, other = (measured({"image": str(tmp_path / name)}) for name in ("a.nii", "b.nii"))
    assert one.values[0] == pytest.approx(4 / 3 * np.pi * 68 * 84 * 60 / 1000, rel=0.02)
    assert one.values[1:4] == pytest.approx([136, 168, 122], abs=6)
    assert other.values[:4] == pytest.approx(one.values[:4], rel=0.01)
    assert np.abs(np.subtract(other.values[4:], one.values[4:]) / [1, 1, 1, 0.02]).max() < 1
    assert np.corrcoef(one.cube.ravel(), other.cube.ravel())[0, 1] > 0.99
    for view, rim in zip(one.slices, one.outlines):
        assert view.shape == rim.shape == (112, 112) and view[~rim].max() > 200 and 80 < rim.sum() < 400


def test_slices_lie_as_the_words_say(tmp_path):
    """The front is bright: to the right in the sagittal slice, up in the axial one."""
    image, _, spacing = egg()
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([*spacing, 1.0])), tmp_path / "a.nii")
    sagittal, coronal, axial = measured({"image": str(tmp_path / "a.nii")}).slices
    assert sagittal[56, 85] > sagittal[56, 27] + 50 and axial[27, 56] > axial[85, 56] + 50
    assert coronal[35, 56] > coronal[80, 56]  # brighter at its top


def test_box():
    mask = np.zeros((5, 6, 7), bool)
    mask[1:3, 2, 4:7] = True
    assert [each.tolist() for each in box_of(mask)] == [[1, 2, 4], [2, 2, 6]]


def test_likeness_is_the_correlation_with_the_mean_of_all():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 1, (24, 24, 24))
    cubes = np.stack([base + rng.normal(0, 0.05, base.shape) for _ in range(9)] + [1.2 - base]).astype(np.float32)
    found = likeness(cubes)
    mean = cubes.mean(0)
    assert found == pytest.approx([np.corrcoef(cube.ravel(), mean.ravel())[0, 1] for cube in cubes], abs=1e-6)
    assert found[:9].min() > 0.9 and found[9] < -0.9


def values_of(rows):
    usual = [1400, 135, 170, 137, 15, 0, 0, 0.56, 0.92]
    spread = [100, 5, 8, 5, 3, 1, 1, 0.02, 0.02]
    return np.random.default_rng(1).normal(usual, spread, (rows, len(usual)))


def test_what_stands_out_gets_a_sentence_and_nothing_else_does():
    values = values_of(40)
    assert outliers(values) == {}
    values[7, 0] = 2600  # a mask with the skull
    values[3, 4], values[3, 8] = 45, 0.2  # far and unlike
    values[9, 8] = 1.4  # better than all others is no fault
    found = outliers(values)
    assert list(found) == [3, 7]
    assert found[7].startswith("a volume of 2600 mL (median 1")
    assert "a correlation with the mean of all of 0.20 (median 0.9" in found[3]
    assert "a nodding tilt of 45 degrees (median 1" in found[3]


def test_among_scans_that_are_all_alike_little_differences_are_not_mentioned():
    values = np.tile(values_of(1), (12, 1))
    values[0] *= 1.02
    assert outliers(values) == {}
    assert len(QUANTITIES) == values.shape[1]
