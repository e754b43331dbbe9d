"""The images that a network is shown: found beside each scan, named where they are wrong, stacked, or made."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from scripts.running.condition_images import channels_of
from scripts.running.errors import BundleError
from scripts.scans.collect import find_scans
from scripts.scans.condition_images import ConditionImages, StackConditionsd, labels_in
from scripts.scans.degraded import LowResolutiond, RandHoled
from scripts.scans.find import find_images
from scripts.scans.warps import RandWarpd

RNG = np.random.default_rng(0)


def save(path, voxels, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return str(path)


def labels(*values, side=10):
    found = np.zeros((side,) * 3, np.uint8)
    for i, value in enumerate(values):
        found[2 + i, 2:8, 2:8] = value
    return found


@pytest.fixture
def folder(tmp_path):
    """Two subjects with a label map each and a second contrast, as BIDS names them."""
    for i, values in enumerate([(1, 2), (1, 5)]):
        save(tmp_path / f"sub-{i}_T1w.nii.gz", RNG.normal(size=(10, 10, 10)).astype(np.float32))
        save(tmp_path / f"sub-{i}_T2w.nii.gz", RNG.normal(size=(10, 10, 10)).astype(np.float32))
        save(tmp_path / f"sub-{i}_dseg.nii.gz", labels(*values))
    return tmp_path


def test_what_lies_beside_an_image_is_found_and_is_no_image_itself(folder):
    found = find_images(str(folder), beside={"seg": "_dseg", "t2": "_T2w"})
    names = [{key: path.rsplit("/", 1)[1] for key, path in item.items()} for item in found]
    assert names[1] == {"image": "sub-1_T1w.nii.gz", "seg": "sub-1_dseg.nii.gz", "t2": "sub-1_T2w.nii.gz"}
    assert len(found) == 2
    save(folder / "sub-1_T1w_dseg.nii.gz", labels(1))  # the whole name comes first
    assert find_images(str(folder), beside={"seg": "_dseg", "t2": "_T2w"})[1]["seg"].endswith("sub-1_T1w_dseg.nii.gz")


def test_label_maps_are_known_by_their_values_and_have_a_channel_a_label(folder):
    found = ConditionImages({"seg": "_dseg", "t2": "_T2w"}, str(folder)).known
    assert found == [{"name": "seg", "suffix": "_dseg", "labels": [1, 2, 5]}, {"name": "t2", "suffix": "_T2w"}]
    assert channels_of(found) == [("seg", 1), ("seg", 2), ("seg", 5), ("t2", None)]
    assert ConditionImages({}, str(folder)).known == [] == ConditionImages(None, str(folder)).known
    before = {"condition_images": [{"name": "seg", "suffix": "_dseg", "labels": [5, 2, 1, 7]}]}
    assert ConditionImages({"seg": "_dseg"}, str(folder), description=before).known == before["condition_images"]


def test_the_labels_of_a_file(tmp_path):
    assert labels_in(save(tmp_path / "a.nii.gz", labels(3, 7))) == [3, 7]
    assert labels_in(save(tmp_path / "b.nii.gz", labels(3).astype(np.float32))) == [3]
    assert labels_in(save(tmp_path / "c.nii.gz", RNG.normal(size=(9, 9, 9)).astype(np.float32))) is None
    assert labels_in(str(tmp_path / "none.nii.gz")) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"suffixes": {"image": "_T2w"}}, ["'image'", "a name that begins with a letter"]),
        ({"suffixes": {"2": "_T2w"}}, ["'2'", "a name that begins with a letter"]),
        ({"suffixes": {"t2": "_T2w"}, "made": LowResolutiond("image", [1, 1, 2])}, ["beside made_condition"]),
        (
            {"suffixes": {}, "description": {"condition_images": [{"name": "t2", "suffix": "_T2w"}]}, "resumed": True},
            [r"[] were given", "was begun with ['t2']"],
        ),
        (
            {"description": {"condition_images": [{"name": "seg", "suffix": "_dseg", "labels": [1, 2]}]}},
            ["sub-1_dseg.nii.gz", "the label [5]", "has [1, 2]"],
        ),
    ],
)
def test_condition_images_that_cannot_be_get_a_sentence(folder, arguments, words):
    with pytest.raises(BundleError) as error:
        ConditionImages(**{"suffixes": {"seg": "_dseg"}, "dataset_dir": str(folder)} | arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_an_image_among_label_maps_and_too_many_labels_are_named(folder):
    save(folder / "sub-1_dseg.nii.gz", RNG.normal(size=(10, 10, 10)).astype(np.float32))
    with pytest.raises(
        BundleError, match="sub-1_dseg.nii.gz' has fractions .*, but .*sub-0_dseg.nii.gz' is a label map"
    ):
        ConditionImages({"seg": "_dseg"}, str(folder))
    for i in (0, 1):
        voxels = np.zeros((10, 10, 10), np.uint8)
        voxels[0, 0, :] = voxels[0, 1, :] = 1
        voxels.reshape(-1)[200:220] = np.arange(1, 21) + 20 * i
        save(folder / f"sub-{i}_dseg.nii.gz", voxels)
    with pytest.raises(BundleError, match="the files of 'seg' have 40 labels"):
        ConditionImages({"seg": "_dseg"}, str(folder))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda f: (f / "sub-1_dseg.nii.gz").unlink(),
            ["condition_images: '_dseg'", "1 of 2", "have no seg", "sub-1_T1w"],
        ),
        (
            lambda f: save(f / "sub-1_dseg.nii.gz", labels(1, side=12)),
            ["has a seg, ", "sub-1_dseg.nii.gz', that has shape (12, 12, 12)", "expected shape (10, 10, 10)"],
        ),
        (
            lambda f: save(f / "sub-1_dseg.nii.gz", labels(1), np.diag([1, 1, 1.5, 1])),
            ["has a seg, ", "lies up to", "expected the affine of the image"],
        ),
        (lambda f: (f / "sub-1_dseg.nii.gz").write_bytes(b"no image"), ["has a seg, ", "cannot be read as a volume"]),
    ],
)
def test_every_bad_partner_gets_its_sentence(folder, spoil, words):
    spoil(folder)
    known = ConditionImages({"seg": "_dseg", "t2": "_T2w"}, str(folder))
    with pytest.raises(BundleError) as error:
        find_scans(str(folder), 3, condition_images=known)
    assert all(word in str(error.value) for word in words), error.value


def test_channels_go_from_minus_one_to_one():
    known = [{"name": "seg", "suffix": "_dseg", "labels": [1, 5]}, {"name": "t2", "suffix": "_T2w"}]
    seg = MetaTensor(torch.tensor([[[[0.0, 1.0, 5.0]]]]))
    t2 = MetaTensor(torch.tensor([[[[-1.0, 0.25, 1.0]]]]))
    item = StackConditionsd(known)({"image": t2, "seg": seg, "t2": t2})
    assert item["condition_image"].tolist() == [[[[-1, 1, -1]]], [[[-1, -1, 1]]], [[[-1, 0.25, 1]]]]
    assert set(item) == {"image", "condition_image"}
    assert set(StackConditionsd(known)({"image": t2})) == {"image"}
    with pytest.raises(BundleError, match=r"has the label \[3\], but 'seg' of these weights has \[1, 5\]"):
        StackConditionsd(known)({"seg": MetaTensor(torch.full((1, 2, 2, 2), 3.0)), "t2": t2})


def test_a_warp_moves_labels_with_the_image_and_keeps_them_whole():
    ball = (torch.stack(torch.meshgrid(*[torch.arange(24.0) - 11.5] * 3, indexing="ij")).norm(dim=0) < 7)[None].float()
    warp = RandWarpd(["image", "condition_image"], prob=1.0, rotate=0.3, translate=0.1, scale=0.1, bend=0.02)
    warp.set_random_state(3)
    shown = torch.cat([2 * ball - 1, 0.5 * ball - 1])
    item = warp({"image": ball, "condition_image": shown})
    label, soft = item["condition_image"]
    assert set(label.unique().tolist()) == {-1.0, 1.0}
    inside = item["image"][0] > 0.5
    overlap = 2 * (inside & (label > 0)).sum() / (inside.sum() + (label > 0).sum())
    assert overlap > 0.93 and ((label > 0) != (ball[0] > 0)).any()
    torch.testing.assert_close(soft, 0.5 * item["image"][0] - 1, atol=1e-5, rtol=0)


def test_thick_slices_are_means_of_thin_ones_between_which_it_is_linear():
    image = torch.arange(16.0).reshape(1, 1, 1, 16).repeat(1, 4, 4, 1) / 8 - 1
    found = LowResolutiond("image", [1, 1, 4])({"image": image})
    assert set(found) == {"image", "condition_image"} and torch.equal(found["image"], image)
    line = found["condition_image"][0, 0, 0]
    centres = image[0, 0, 0].reshape(4, 4).mean(1)
    wanted = np.interp(np.arange(16), 1.5 + 4 * np.arange(4), centres)
    np.testing.assert_allclose(line, wanted, atol=1e-6)
    for factors, word in (([1, 1, 1], "one of them 2 or more"), ([1, 1, 0.5], "a whole number"), ([1, 2], "3 numbers")):
        with pytest.raises(BundleError, match=f"factors: .*{word}"):
            LowResolutiond("image", factors)({"image": image})


def test_a_hole_lies_in_the_brain_and_is_marked():
    image = torch.full((1, 20, 20, 20), -1.0)
    image[:, 5:15, 5:15, 5:15] = torch.rand(10, 10, 10)
    vary = Compose([RandHoled("image", [0.1, 0.2])])
    masks = []
    for seed in (1, 2, 1):
        vary.set_random_state(seed=seed)
        item = vary({"image": image})
        shown, mask = item["condition_image"]
        hole = mask == 1
        assert torch.equal(mask, torch.where(hole, 1.0, -1.0)) and (image[0][hole] > -1).any()
        assert (shown[hole] == 0).all() and torch.equal(shown[~hole], image[0][~hole])
        assert 0 < hole.sum() < 4 / 3 * np.pi * 5**3
        masks.append(hole)
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    with pytest.raises(BundleError, match=r"radii: \[0.3, 0.1\]"):
        RandHoled("image", [0.3, 0.1])
