"""A hole in a scan is filled by the command; all else comes back as it was."""

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY_NETWORK, run_bundle


def fill(output, weights, known, known_mask, **more):
    places = {"config_file": "configs/inference.json", "ckpt_path": weights, "output_dir": output}
    scan = {"known": known} | ({"known_mask": known_mask} if known_mask else {})
    knobs = scan | {"num_inference_steps": 3, "num_samples": 2}
    return run_bundle("run", "fill", **TINY_NETWORK | places | knobs | more)


@pytest.fixture
def scan(tmp_path):
    """A brain of 30 x 34 x 28 voxels of 5 mm, left to the left, as whole numbers with a slope; and a hole in it."""
    shape = (30, 34, 28)
    radius = np.sqrt(sum(((g - (n - 1) / 2) / (0.4 * n)) ** 2 for g, n in zip(np.indices(shape), shape)))
    rng = np.random.default_rng(0)
    voxels = np.where(radius < 1, 400 + 300 * (radius < 0.6) + rng.integers(-20, 20, shape), 0).astype(np.int16)
    image = nib.Nifti1Image(voxels, np.diag([-5.0, 5, 5, 1]))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "sub-01_T1w.nii.gz")
    hole = np.zeros(shape, np.uint8)
    hole[12:17, 14:20, 12:16] = 1
    nib.save(nib.Nifti1Image(hole, image.affine), tmp_path / "lesion.nii.gz")
    return tmp_path / "sub-01_T1w.nii.gz", tmp_path / "lesion.nii.gz"


def test_only_the_hole_changes_and_the_file_stays_what_it_was(scan, trained, tmp_path):
    done = fill(tmp_path / "out", trained / "models/model.pt", *scan)
    assert done.returncode == 0, done.stderr
    before, hole = nib.load(scan[0]), np.asarray(nib.load(scan[1]).dataobj) > 0
    results = [nib.load(tmp_path / f"out/sub-01_T1w_filled_seed0_volume00{i}.nii.gz") for i in range(2)]
    for result in results:
        assert result.shape == before.shape and result.get_data_dtype() == np.int16
        assert np.array_equal(result.affine, before.affine)
        assert (result.dataobj.slope, result.dataobj.inter) == (0.5, 10)
        raw = result.dataobj.get_unscaled()
        assert np.array_equal(raw[~hole], before.dataobj.get_unscaled()[~hole])
        assert (raw[hole] != before.dataobj.get_unscaled()[hole]).mean() > 0.5
        inside = result.get_fdata()[hole]
        assert 10 <= inside.min() and inside.max() < 450  # within the scan's intensities: (0 to 720) / 2 + 10
    assert not np.array_equal(*[result.get_fdata() for result in results])
    assert (tmp_path / "out/filled.png").stat().st_size > 1000


def test_what_cannot_be_filled_gets_its_sentence(scan, trained, tmp_path):
    brain, hole = (nib.load(path) for path in scan)
    nib.save(nib.Nifti1Image(np.zeros(hole.shape, np.uint8), hole.affine), tmp_path / "empty.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), hole.affine), tmp_path / "other.nii.gz")
    whole = (np.asarray(brain.dataobj) > 20).astype(np.uint8)
    nib.save(nib.Nifti1Image(whole, hole.affine), tmp_path / "whole.nii.gz")
    (tmp_path / "text.nii.gz").write_text("no image")
    for mask, sentence in {
        "empty": "has no voxel above 0; expected those that are to be filled",
        "other": "has the shape (8, 8, 8) and another grid",
        "whole": "leaves 0% of the brain; expected 20% or more",
        "text": "cannot be read",
        None: "known_mask: nothing was given",
    }.items():
        path = f"{tmp_path / mask}.nii.gz" if mask else None
        done = fill(tmp_path / "out", trained / "models/model.pt", scan[0], path)
        assert done.returncode == 1 and sentence in done.stderr, done.stderr[-600:]
        assert not list((tmp_path / "out").glob("*filled*"))
