"""Finding and splitting files, against folders made by hand."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from monai.bundle import ConfigParser

from scripts.running.errors import BundleError
from scripts.scans.find import find_images, require, stem, volumes_below
from scripts.scans.split import split_by_subject, subjects_of


def names(items) -> list[str]:
    return [Path(item["image"]).name for item in items]


# finding


def test_images_are_found_at_any_depth_in_the_order_of_their_paths(tmp_path):
    for name in ("b.nii.gz", "a.nii", "c/deep/er/a.nii.gz", "a.nii.txt", "notes.csv", "c/scan.nrrd"):
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


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    opened = os.scandir

    def scandir(place):
        if place.endswith("/a"):
            raise PermissionError(13, "Permission denied", place)
        return opened(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        BundleError, match="dataset_dir: .*/a' cannot be searched .Permission denied.; expected folders that"
    ):
        find_images(str(tmp_path))


def test_each_image_gets_the_mask_beside_it(tmp_path):
    for name in ("x/s.nii.gz", "x/s_mask.nii", "y/s.nii", "y/s_mask.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [{k: str(Path(v).relative_to(tmp_path)) for k, v in p.items()} for p in find_images(str(tmp_path), "_mask")]
    assert found == [{"image": "x/s.nii.gz", "mask": "x/s_mask.nii"}, {"image": "y/s.nii", "mask": "y/s_mask.nii.gz"}]
    assert len(find_images(str(tmp_path))) == 2  # without a suffix masks are left out all the same
    assert len(volumes_below(str(tmp_path))) == 4


def test_a_missing_mask_is_named_with_the_file_that_was_expected(tmp_path):
    for name in ("a.nii", "a_brain.nii", "b.nii", "c.nii.gz", "sub/b_brain.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(BundleError, match=r"mask_suffix: '_brain'.* 2 of 3 images .*b\.nii.*b_brain\.nii\.gz"):
        find_images(str(tmp_path), "_brain")


def test_a_missing_folder_holds_nothing(tmp_path):
    assert find_images(str(tmp_path / "nowhere")) == []


def test_the_stem_loses_nothing_but_the_suffix():
    paths = ("/a.b/x.nii", "y.1.nii.gz", "z.nii.bak", "nii.nii", "A.NII.GZ", "b.mgz", "c.img.gz", "d.JPEG", "e.nii.bz2")
    assert [stem(p) for p in paths] == ["x", "y.1", "z.nii.bak", "nii", "A", "b", "c", "d", "e"]


@pytest.mark.parametrize("pattern", ["", 3, ["*.nii"]])
def test_a_pattern_is_a_word(pattern, tmp_path):
    with pytest.raises(BundleError, match="image_pattern: .* was given; expected null or a pattern such as"):
        find_images(str(tmp_path), image_pattern=pattern)


# subjects


def subjects(*paths):
    return subjects_of([{"image": f"/data/{path}"} for path in paths], "/data")


@pytest.mark.parametrize(
    "path, subject",
    [
        ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01"),
        ("sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w.nii", "sub-01"),
        ("sub-01/ses-2/anat/T1.nii.gz", "sub-01"),
        ("T1_sub-01.nii.gz", "sub-01"),
        ("ixi_sub-01_T1w.nii.gz", "sub-01"),
        ("T2_sub-01/scan.nii.gz", "sub-01"),
        ("T2w/sub-01.nii.gz", "sub-01"),
        ("ses-2/sub-01.nii.gz", "sub-01"),
        ("rawdata/sub-01/anat/T1.nii", "sub-01"),
        ("derivatives/fmriprep/sub-01/anat/T1.nii", "sub-01"),
        ("oasis/sub-01/anat/T1.nii", "oasis/sub-01"),
        ("sub-01_ses-2_desc-sub-cortical_T1w.nii.gz", "sub-01"),
        ("sub-projects/d/sub-07/T1.nii", "sub-07"),
        ("brains-sub-sampled/case_1.nii", "brains-sub-sampled/case_1"),
        ("case_1.nii.gz", "case_1"),
        ("case_1_T1w.nii.gz", "case_1"),
        ("BraTS-GLI-00000-000-t1c.nii.gz", "BraTS-GLI-00000-000"),
        ("UPENN-GBM-00001_11/UPENN-GBM-00001_11_T2_FLAIR.mgz", "UPENN-GBM-00001_11/UPENN-GBM-00001_11"),
        ("patient_3/flair.nii", "patient_3"),
    ],
)
def test_a_scan_alone_belongs_to_the_subject_that_its_name_says(path, subject):
    assert subjects(path) == [subject]


FOLDERS = {
    # images, how many subjects they are of, what is said
    "two contrasts of each": ([f"{c}_sub-{s}.nii" for c in ("T1", "T2") for s in range(5)], 5, "T1_sub-0 and T2_sub-0"),
    "two datasets in one folder": (["ds000011_sub-01.nii", "ds002748_sub-01.nii"], 1, "give each dataset a folder"),
    "two datasets in two folders": (["a/sub-01.nii", "b/sub-01.nii"], 2, "2 subjects have the number of another one"),
    "a folder in another one": (["sub-01.nii", "more/sub-01.nii"], 1, "more/sub-01 and sub-01"),
    "raw data and derivatives": (["sub-01/anat/a.nii", "derivatives/x/sub-01/anat/b.nii"], 1, None),
    "sessions and runs": (["sub-1/ses-1/sub-1_ses-1.nii", "sub-1/ses-2/sub-1_ses-2_run-2.nii"], 1, None),
    "contrasts in folders": (["T1w/sub-01_T1w.nii", "T2w/sub-01_T2w.nii"], 1, None),
    "BraTS": ([f"p{i}/p{i}_{c}.nii" for i in range(3) for c in ("flair", "t1", "t1ce", "t2")], 3, None),
    "contrasts beside each other": ([f"IXI{i}-HH-{c}.nii" for i in range(3) for c in ("T1", "T2", "PD")], 3, None),
    "patients": ([f"p{i}/scan{j}.nii" for i in range(9) for j in range(4)], 9, None),
    "patients, a folder a scan": ([f"p{i}/mri/day{j}/{i}{j}.nii" for i in range(9) for j in range(1 + i % 3)], 9, None),
    "patients in groups": ([f"{'AD' if i % 2 else 'CN'}/p{i}/{j}.nii" for i in range(30) for j in (1, 2)], 30, None),
    "groups": ([f"{'AD' if i % 2 else 'CN'}/{i}.nii" for i in range(30)], 30, None),
    "classes of numbered slices": ([f"{c}/{i:04d}.png" for c in ("glioma", "healthy") for i in range(9)], 18, None),
    "contrasts before the names": ([f"{c}_{i:03d}.nii" for i in range(3) for c in ("T1", "FLAIR")], 3, None),
    "contrasts in folders of their own": ([f"{c}/{i:03d}.nii" for i in range(3) for c in ("T1w", "T2w")], 3, None),
    "sessions in folders of their own": ([f"session{j}/{i:03d}.nii" for i in range(3) for j in (1, 2)], 3, None),
    "one folder of scans": ([f"scans/{i}.nii" for i in range(9)], 9, None),
    "one scan, packed and not": (["a.nii", "a.nii.gz", "b.nii"], 2, None),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_scans_of_one_person_are_one_subject(what, caplog):
    paths, count, said = FOLDERS[what]
    with caplog.at_level(logging.INFO):
        assert len(set(subjects(*paths))) == count
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said) and all(re.search(said, line) for line in lines), lines


def test_nobody_stands_on_both_sides_of_the_split_of_a_training(tmp_path, caplog):
    """Ten people with two contrasts each, named with the contrast first: once four of ten did."""
    voxels = np.random.default_rng(0).integers(0, 200, (9, 9, 9)).astype(np.int16)
    for name in (f"{contrast}_sub-{person:02d}.nii" for contrast in ("T1", "T2") for person in range(10)):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / name)
    for seed in range(3):
        parser = ConfigParser()
        parser.read_config(ROOT / "configs/train.json")
        parser.update({"dataset_dir": str(tmp_path), "output_dir": str(tmp_path), "val_fraction": 0.4, "seed": seed})
        sides = [{name[3:9] for name in names(side)} for side in parser.get_parsed_content("split")]
        assert not sides[0] & sides[1] and len(sides[1]) == 4
    assert "10 subjects have names with different beginnings" in caplog.text
    assert "T1_sub-00 and T2_sub-00; T1_sub-01 and T2_sub-01; " in caplog.text


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
    with pytest.raises(BundleError, match=r"dataset_dir: .*nowhere': there is no such folder; expected a folder with"):
        require(str(tmp_path / "nowhere"), [])
    with pytest.raises(BundleError, match="it holds no usable images; expected a folder with"):
        require(str(tmp_path), [])
    require(str(tmp_path / "nowhere"), bids(1))  # lists that did not come from a folder
