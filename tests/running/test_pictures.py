import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib import image as png

from scripts.diffusion.sampler import DiffusionSampler
from scripts.running import pictures
from scripts.sampling import mosaic
from scripts.sampling import volumes as nifti


def test_a_strip_holds_the_three_middle_slices_the_right_way_up():
    volume = np.zeros((4, 6, 8))  # R, A, S
    volume[2, 3, 7] = 1  # the most superior voxel of the middle column
    volume[2, 5, 4] = 2  # the most anterior one
    volume[0, 3, 4] = 3  # the leftmost one
    strip = pictures.triplanar(volume)
    assert strip.shape == (8, 6 + 4 + 4)
    sagittal, coronal, axial = strip[:, :6], strip[:, 6:10], strip[:, 10:]
    assert sagittal[0, 3] == 1 and sagittal[8 - 1 - 4, 5] == 2  # superior up, anterior right
    assert coronal[0, 2] == 1 and coronal[8 - 1 - 4, 0] == 3
    assert axial[1 + 0, 2] == 2 and axial[1 + 6 - 1 - 3, 0] == 3  # anterior up; one padded row above


def test_a_mosaic_keeps_every_strip_and_enlarges_by_whole_factors():
    strips = [np.full((10, 30), float(i)) for i in range(5)]
    picture = pictures.mosaic(strips, gap=2, smallest=20)
    assert picture.shape[0] % (12 * 2) == 0 and picture.shape[1] % (32 * 2) == 0
    for i in range(5):
        assert (picture == i).sum() >= 10 * 30 * 4


def test_grey_values_of_the_png(tmp_path):
    pictures.save_png(np.array([[-1.0, 0.0, 1.0]]), str(tmp_path / "a.png"), -1, 1)
    np.testing.assert_allclose(png.imread(tmp_path / "a.png")[0, :, 0], [0, 0.5, 1], atol=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(4, 5, 6), (8, 8, 8)])
def test_a_nifti_file_holds_voxels_affine_codes_and_description(tmp_path, shape):
    volume = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    affine = np.array([[2.0, 0, 0, -3], [0, 2.5, 0, -4], [0, 0, 3, -5], [0, 0, 0, 1]])
    nifti.save_nifti(volume, affine, str(tmp_path / "v.nii.gz"), "synthetic " * 20)
    image = nib.load(tmp_path / "v.nii.gz")
    assert np.array_equal(np.asanyarray(image.dataobj), volume)
    np.testing.assert_allclose(image.affine, affine)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (2, 2)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S") and image.header.get_xyzt_units()[0] == "mm"
    assert image.header["descrip"].item().decode().startswith("synthetic")
    assert [p.name for p in tmp_path.iterdir()] == ["v.nii.gz"]


def test_the_way_from_noise_to_volume_is_a_strip_of_the_asked_number_of_frames(unet, scheduler, tmp_path):
    sampler = DiffusionSampler(unet, scheduler, 5, "ddim")
    noise = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "denoising.png"
    mosaic.save_denoising(sampler, noise, str(path), num_frames=4)
    picture = png.imread(path)[..., 0]
    enlarged = 96 // 8
    assert picture.shape == (3 * 96, 4 * 96)
    first, last = (picture[:, i * 96 : (i + 1) * 96][::enlarged, ::enlarged] for i in (0, 3))
    for found, volume in ((first, noise), (last, sampler(noise))):
        wanted = np.concatenate(np.split(pictures.triplanar(volume[0, 0].numpy()), 3, 1))
        np.testing.assert_allclose(found, np.clip((wanted + 1) / 2, 0, 1), atol=0.01)
