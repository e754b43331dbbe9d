"""Finding, checking and splitting files, against folders made by hand."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage

from scripts import datalist
from scripts.datalist import (
    find_images,
    problem_of,
    problem_of_item,
    readable,
    require,
    split_by_subject,
    stem,
    subject_of,
)
from scripts.errors import BundleError

SHAPE = (9, 10, 11)
NOISE = np.random.default_rng(0).integers(1, 200, SHAPE).astype(np.int16)


def save(path: Path, voxels=NOISE, affine=None, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine, **options), path)
    return str(path)


def names(items) -> list[str]:
    return [Path(item["image"]).name for item in items]


# finding


def test_images_are_found_at_any_depth_in_the_order_of_their_paths(tmp_path):
    for name in ("b.nii.gz", "a.nii", "c/deep/er/a.nii.gz", "a.nii.txt", "notes.csv", "c/scan.mgz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [{"image": str(tmp_path / name)} for name in ("a.nii", "b.nii.gz", "c/deep/er/a.nii.gz")]
    assert find_images(str(tmp_path)) == expected


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    """`._a.nii` is macOS', and .git/annex/objects holds a second copy of each volume of a DataLad dataset."""
    below = tmp_path / ".cache" / "data"  # a folder that is itself hidden may be asked for
    for name in ("a.nii", "._a.nii", ".b.nii.gz", ".git/annex/objects/x1/SHA.nii.gz/SHA.nii.gz", "c/.trash/d.nii"):
        (below / name).parent.mkdir(parents=True, exist_ok=True)
        (below / name).touch()
    assert names(find_images(str(below))) == ["a.nii"]


def test_a_folder_that_is_named_like_a_volume_is_searched_and_not_listed(tmp_path):
    (tmp_path / "t1.nii").mkdir()
    (tmp_path / "t1.nii" / "0001.nii").touch()
    assert find_images(str(tmp_path)) == [{"image": str(tmp_path / "t1.nii" / "0001.nii")}]


def test_a_link_to_nothing_is_reported_and_not_dropped(tmp_path):
    """A DataLad dataset whose contents were not fetched."""
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "annex" / "a.nii.gz")
    with pytest.raises(BundleError, match="1 file of 1 .*\n.*a.nii.gz' cannot be read"):
        readable(find_images(str(tmp_path)))


def test_each_image_gets_the_mask_beside_it(tmp_path):
    for name in ("x/s.nii.gz", "x/s_mask.nii", "y/s.nii", "y/s_mask.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [{k: str(Path(v).relative_to(tmp_path)) for k, v in p.items()} for p in find_images(str(tmp_path), "_mask")]
    assert found == [{"image": "x/s.nii.gz", "mask": "x/s_mask.nii"}, {"image": "y/s.nii", "mask": "y/s_mask.nii.gz"}]
    assert len(find_images(str(tmp_path))) == 4  # without a suffix a mask is a file like any other


def test_a_missing_mask_is_named_with_the_file_that_was_expected(tmp_path):
    for name in ("a.nii", "a_brain.nii", "b.nii", "c.nii.gz", "sub/b_brain.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(BundleError, match=r"mask_suffix: '_brain'.* 2 of 3 images .*b\.nii.*b_brain\.nii\.gz"):
        find_images(str(tmp_path), "_brain")


def test_a_missing_folder_holds_nothing(tmp_path):
    assert find_images(str(tmp_path / "nowhere")) == [] == readable([])


def test_the_stem_loses_nothing_but_the_suffix():
    assert [stem(p) for p in ("/a.b/x.nii", "y.1.nii.gz", "z.nii.bak", "nii.nii")] == ["x", "y.1", "z.nii.bak", "nii"]


# checking one file


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_of_numbers_can_be_used(dtype, suffix, tmp_path):
    assert problem_of(save(tmp_path / f"a{suffix}", NOISE.astype(dtype))) == ""


@pytest.mark.parametrize("trailing", [(1,), (1, 1)])
def test_trailing_axes_of_one_can_be_used(trailing, tmp_path):
    assert problem_of(save(tmp_path / "a.nii.gz", NOISE.reshape(*SHAPE, *trailing))) == ""


def test_the_smallest_sides_and_obliquely_turned_axes_can_be_used(tmp_path):
    c, s = np.cos(0.4), np.sin(0.4)
    affine = np.array([[-c, s, 0, 7], [0, 0, 5, -3], [s, c, 0, 1], [0, 0, 0, 1.0]])
    assert problem_of(save(tmp_path / "a.nii", NOISE[:8, :8, :8], affine)) == ""


def with_voxel(value, dtype="f4"):
    voxels = NOISE.astype(dtype)
    voxels[4, 5, 6] = value
    return voxels


COLOUR = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD_VOLUMES = {
    "a time series": (np.stack([NOISE] * 3, -1), r"shape \(9, 10, 11, 3\); a volume with three dimensions"),
    "a vector field": (NOISE.reshape(*SHAPE, 1)[..., None].repeat(3, -1), r"shape \(9, 10, 11, 1, 3\); a volume"),
    "a picture": (NOISE[0], r"shape \(10, 11\); a volume with three dimensions"),
    "one slice": (NOISE[:, :, :1], r"three dimensions|at least 8 voxels a side"),
    "seven slices": (NOISE[:, :, :7], r"shape \(9, 10, 7\); at least 8 voxels a side"),
    "colours": (COLOUR, r"voxels of type .*'R'.*; integer or floating"),
    "complex numbers": (NOISE.astype("c8"), "voxels of type complex64; integer or floating"),
    "one value": (np.full(SHAPE, 7, "i2"), "the same value, 7, in every voxel"),
    "a NaN": (with_voxel(np.nan), "holds 1 voxels that are NaN or infinite"),
    "infinity": (with_voxel(np.inf, "f8"), "holds 1 voxels that are NaN or infinite"),
    "minus infinity": (with_voxel(-np.inf), "holds 1 voxels that are NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_what_cannot_be_used_is_said(name, tmp_path):
    voxels, sentence = BAD_VOLUMES[name]
    assert re.search(sentence, problem_of(save(tmp_path / "a.nii.gz", voxels)))


@pytest.mark.parametrize("column", [[0, 0, 0], [1, 0, 0], [np.nan, 0, 1], [0, 0, np.inf]])
def test_an_affine_that_cannot_be_inverted_is_said(column, tmp_path):
    image = nib.Nifti1Image(NOISE, np.eye(4))
    for row, value in zip(("srow_x", "srow_y", "srow_z"), column, strict=True):
        image.header[row][2] = value
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + NOISE.tobytes("F"))
    header = nib.load(path).header
    assert header["sform_code"] == 2 and np.array_equal(header.get_sform()[:3, 2], column, equal_nan=True)
    assert "affine that cannot be inverted" in problem_of(str(path))


def contradicting(path: Path, factor: float, flip: float, qform_code: int) -> str:
    """A file whose sform and pixdim differ by a factor in the first axis, which the sform turns to the left if -1."""
    image = nib.Nifti1Image(NOISE, np.diag([2.0 * flip, 2, 2, 1]))
    if qform_code:
        image.set_qform(np.diag([2.0, 2, 2, 1]), qform_code)
    else:  # as a program leaves it that knows the sform alone
        image.header["quatern_b"] = image.header["quatern_c"] = image.header["quatern_d"] = 0
        image.header["pixdim"][0] = 1
    image.header["pixdim"][1], image.header["vox_offset"] = 2 * factor, 352
    path.write_bytes(image.header.binaryblock + bytes(4) + NOISE.tobytes("F"))
    return str(path)


@pytest.mark.parametrize(
    "factor, flip, qform_code, good",
    [
        (1, 1, 0, True),
        (1, -1, 0, True),
        (1.0001, 1, 0, True),
        (1.0001, -1, 0, False),
        (1.1, 1, 0, False),
        (1.1, 1, 1, True),
    ],
)
def test_two_voxel_sizes_in_one_file_are_said_where_monai_would_turn_it(factor, flip, qform_code, good, tmp_path):
    path = contradicting(tmp_path / "a.nii", factor, flip, qform_code)
    problem = problem_of(path)
    assert (problem == "") == good and (good or "by its sform and of" in problem)
    loaded = LoadImage(reader="NibabelReader")(path).affine.numpy()
    if qform_code == 0:  # what is refused is what MONAI reads otherwise than it is written
        assert np.allclose(loaded, np.diag([2.0 * flip, 2, 2, 1]), rtol=0.01) == good


def test_damaged_files_are_said_to_be_unreadable(tmp_path):
    whole = Path(save(tmp_path / "whole.nii.gz", np.random.default_rng(1).random((20, 20, 20)))).read_bytes()
    plain = Path(save(tmp_path / "plain.nii")).read_bytes()
    damaged = {
        "truncated.nii.gz": whole[: len(whole) // 2],
        "truncated.nii": plain[: len(plain) // 2],
        "header_only.nii": plain[:348],
        "flipped_bits.nii.gz": whole[:9000] + bytes(255 - b for b in whole[9000:9100]) + whole[9100:],
        "text.nii": b"subject,age\n1,60\n" * 100,
        "text.nii.gz": gzip.compress(b"subject,age\n1,60\n" * 100),
        "not_compressed.nii.gz": b"subject,age\n1,60\n" * 100,
        "empty.nii": b"",
        "empty.nii.gz": b"",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be read as a NIfTI volume" in problem_of(str(tmp_path / name)), name
    assert "cannot be read" in problem_of(str(tmp_path / "missing.nii"))


# masks


def test_a_mask_must_have_the_shape_and_the_axes_of_its_image(tmp_path):
    cube = np.random.default_rng(0).random((9, 9, 9)).astype(np.float32)
    las = np.diag([-1.0, 1, 1, 1])
    image = save(tmp_path / "a.nii", cube, las)
    mask = (cube > 0.5).astype(np.uint8)
    assert problem_of_item({"image": image, "mask": save(tmp_path / "a_good.nii", mask, las)}) == ""
    assert problem_of_item({"image": image}) == ""

    cases = {
        "a_small.nii": (mask[:8], las, r"has shape \(8, 9, 9\).*; shape \(9, 9, 9\) .* as its image has"),
        "a_mirrored.nii": (mask, np.eye(4), "axes RAS; shape .* axes LAS, as its image has"),  # saved without an affine
        "a_turned.nii": (mask, las[[2, 0, 1, 3]], "axes .*; shape .* axes LAS"),
        "a_empty.nii": (np.zeros_like(mask), las, "the same value, 0, in every voxel"),
    }
    for name, (voxels, affine, sentence) in cases.items():
        problem = problem_of_item({"image": image, "mask": save(tmp_path / name, voxels, affine)})
        assert problem.startswith("has a mask, ") and name in problem
        assert re.search(sentence, problem), problem


# a whole folder


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Three good volumes, and three bad ones among them."""
    for name in ("a", "c", "e"):
        save(tmp_path / f"{name}.nii.gz")
    save(tmp_path / "b.nii", np.zeros(SHAPE, "i2"))
    save(tmp_path / "d.nii", with_voxel(np.nan))
    (tmp_path / "f.nii.gz").write_bytes(b"nothing")
    return tmp_path


def test_all_bad_files_are_listed_at_once(mixed):
    with pytest.raises(BundleError) as error:
        readable(find_images(str(mixed)))
    first, *lines = str(error.value).splitlines()
    assert first.startswith("dataset_dir: 3 files of 6 cannot be used") and "--skip_bad_files" in first
    expected = {"b.nii": "the same value, 0", "d.nii": "NaN", "f.nii.gz": "cannot be read"}
    assert len(lines) == len(expected)
    for line, (name, problem) in zip(lines, expected.items(), strict=True):
        assert repr(str(mixed / name)) in line and problem in line


def test_bad_files_are_skipped_with_a_warning_each_on_demand(mixed, caplog):
    with caplog.at_level(logging.WARNING, logger="scripts.datalist"):
        assert names(readable(find_images(str(mixed)), skip_bad_files=True)) == ["a.nii.gz", "c.nii.gz", "e.nii.gz"]
    warned = [record.getMessage() for record in caplog.records]
    assert [name in line for name, line in zip(("b.nii", "d.nii", "f.nii.gz"), warned, strict=True)] == [True] * 3


# subjects


@pytest.mark.parametrize(
    "path, subject",
    [
        ("/d/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01"),
        ("/d/sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w.nii", "sub-01"),
        ("/d/sub-01/ses-2/anat/T1.nii.gz", "sub-01"),
        ("/d/ixi_sub-01_T1w.nii.gz", "ixi_sub-01"),
        ("/d/oasis_sub-01_T1w.nii.gz", "oasis_sub-01"),
        ("/d/sub-01_ses-2_desc-sub-cortical_T1w.nii.gz", "sub-01"),
        ("/data/sub-projects/d/sub-07/T1.nii", "sub-07"),
        ("/d/brains-sub-sampled/case_1.nii", "/d/brains-sub-sampled/case_1.nii"),
        ("/d/case_1.nii.gz", "/d/case_1.nii.gz"),
    ],
)
def test_a_scan_belongs_to_the_subject_that_bids_says(path, subject):
    assert subject_of(path) == subject


def bids(subjects=20, sessions=2):
    return [
        {"image": f"/d/sub-{s:02d}/ses-{v}/anat/sub-{s:02d}_ses-{v}_T1w.nii.gz"}
        for s in range(subjects)
        for v in range(1, sessions + 1)
    ]


@pytest.mark.parametrize("val_fraction, held_out", [(0.1, 2), (0.25, 5), (0.01, 1), (0.99, None)])
def test_both_sessions_of_a_subject_are_on_one_side(val_fraction, held_out):
    images = bids()
    if held_out is None:
        with pytest.raises(BundleError, match="20 subjects"):
            split_by_subject(images, val_fraction, 0)
        return
    training, validation = split_by_subject(images, val_fraction, 0)
    assert len(validation) == 2 * held_out and len(training) == 40 - 2 * held_out
    sides = [{item["image"].split("/")[2] for item in side} for side in (training, validation)]
    assert not sides[0] & sides[1]
    assert sorted(names(training + validation)) == names(images)
    assert names(training) == sorted(names(training))


def test_the_split_is_a_function_of_the_seed_and_not_of_the_order_of_files():
    images = bids()
    sides = [{frozenset(names(split_by_subject(order, 0.2, 3)[1])) for order in (images, images[::-1])}]
    assert len(sides[0]) == 1
    held_out = {frozenset(names(split_by_subject(images, 0.2, seed)[1])) for seed in range(10)}
    assert len(held_out) > 5
    every = set().union(*({n[:6] for n in side} for side in held_out))
    assert len(every) > 10  # of 20 subjects; no subject is always or never held out


def test_a_mask_goes_with_its_image_to_one_side():
    images = [item | {"mask": item["image"].replace("T1w", "T1w_mask")} for item in bids(4, 1)]
    for side in split_by_subject(images, 0.5, 0):
        assert all(stem(item["mask"]) == stem(item["image"]) + "_mask" for item in side) and len(side) == 2


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, 1.5, 10, "0.1", None, float("nan")])
def test_a_share_out_of_range_is_named(val_fraction):
    with pytest.raises(BundleError, match=f"val_fraction: {val_fraction!r} was given; it must be a number between 0"):
        split_by_subject(bids(), val_fraction, 0)


def test_too_few_subjects_are_counted():
    with pytest.raises(BundleError, match="3 usable images of 1 subjects.*at least 2 subjects"):
        split_by_subject(bids(1, 3), 0.1, 0)
    training, validation = split_by_subject(bids(2, 1), 0.1, 0)
    assert len(training) == len(validation) == 1


def test_no_images_are_no_error_until_they_are_required(tmp_path):
    assert split_by_subject([], 0.1, 0) == ([], [])
    with pytest.raises(BundleError, match=r"dataset_dir: .*nowhere': there is no such folder; a folder with"):
        require(str(tmp_path / "nowhere"), [])
    with pytest.raises(BundleError, match="it holds no usable images; a folder with"):
        require(str(tmp_path), [])
    require(str(tmp_path / "nowhere"), bids(1))  # lists that did not come from a folder


# memory of what was checked


@pytest.fixture
def checked(monkeypatch):
    """Names of the files that were read by a check."""
    seen, check = [], datalist.problem_of_item

    def counted(item, spatial_dims):
        seen.append(Path(item["image"]).name)
        return check(item, spatial_dims)

    monkeypatch.setattr(datalist, "problem_of_item", counted)
    return seen


def test_good_files_are_read_once_and_bad_ones_each_time(mixed, tmp_path, checked):
    place, images = str(tmp_path / "out" / "checked.json"), find_images(str(mixed))
    for names_read in (
        ["a.nii.gz", "b.nii", "c.nii.gz", "d.nii", "e.nii.gz", "f.nii.gz"],
        ["b.nii", "d.nii", "f.nii.gz"],
    ):
        checked.clear()
        assert names(readable(images, True, checked_path=place)) == ["a.nii.gz", "c.nii.gz", "e.nii.gz"]
        assert sorted(checked) == names_read


def spoilt(place: Path, what: str, monkeypatch) -> None:
    if what == "version":
        monkeypatch.setattr(datalist, "version_of_checks", lambda: "another")
    else:
        content = {
            "torn": place.read_text()[:40],
            "list": "[1, 2]",
            "binary": "\0\1",
            "number": '{"version": 3, "good": 4}',
        }
        place.write_text(content[what])


@pytest.mark.parametrize("what", ["torn", "list", "binary", "number", "version"])
def test_a_memory_that_is_torn_or_of_other_checks_is_of_no_use(what, tmp_path, checked, monkeypatch):
    save(tmp_path / "a.nii.gz")
    place, images = tmp_path / "checked.json", find_images(str(tmp_path))
    readable(images, checked_path=str(place))
    spoilt(place, what, monkeypatch)
    for reads in (2, 2):  # it is whole again
        assert readable(images, checked_path=str(place)) == images and len(checked) == reads


@pytest.mark.parametrize("change", ["size", "time", "mask"])
def test_a_file_that_was_changed_is_read_again(change, tmp_path, checked):
    image, place = Path(save(tmp_path / "a.nii")), str(tmp_path / "checked.json")
    mask = Path(save(tmp_path / "a_mask.nii", (NOISE > 90).astype("u1")))
    images = find_images(str(tmp_path), "_mask")
    for _ in range(2):
        assert readable(images, checked_path=place) == images
    assert len(checked) == 1
    if change == "size":
        image.write_bytes(image.read_bytes()[:-1])
    else:
        os.utime(image if change == "time" else mask, ns=(0, 10**18))
    assert len(readable(images, True, checked_path=place)) == (change != "size")
    assert len(checked) == 2


def test_the_memory_names_no_file_and_does_not_grow_without_end(tmp_path, monkeypatch):
    save(tmp_path / "PATIENT.nii")
    place, images = tmp_path / "checked.json", find_images(str(tmp_path))
    datalist.write_marks(str(place), datalist.version_of_checks(), {f"{i:032x}" for i in range(10_020)})
    readable(images, checked_path=str(place))
    assert "PATIENT" not in place.read_text()
    assert len(json.loads(place.read_text())["good"]) == 1


def test_a_memory_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    save(tmp_path / "a.nii")
    (tmp_path / "file").touch()
    images = find_images(str(tmp_path))
    assert readable(images, checked_path=str(tmp_path / "file" / "checked.json")) == images
    assert "the next start will check all files again" in caplog.text
