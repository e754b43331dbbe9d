"""What a folder may hold, and what training takes of it: single files, masks, whole folders, and what is remembered."""

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
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.transforms import LoadImage
from scipy.ndimage import affine_transform

from scripts.running.errors import BundleError, root_bundle_error
from scripts.scans import inspect as inspection
from scripts.scans.find import find_images
from scripts.scans.inspect import Finding, examine, examine_item, readable

SHAPE = (9, 10, 11)
NOISE = np.random.default_rng(0).integers(1, 200, SHAPE).astype(np.int16)
GOOD = Finding()


def save(path: Path, voxels=NOISE, affine=None, kind=nib.Nifti1Image, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(kind(voxels, np.eye(4) if affine is None else affine, **options), path)
    return str(path)


def names(items) -> list[str]:
    return [Path(item["image"]).name for item in items]


# the table of what a folder may hold: built by a function, read by the `images` and `preprocessing` of train.json

AXES = np.stack(np.meshgrid(*[np.arange(n) for n in (18, 22, 20)], indexing="ij"), -1)
AFFINE = np.array([[2.0, 0, 0, -17], [0, 2, 0, -21], [0, 0, 2, -19], [0, 0, 0, 1]])
INSIDE = (((AXES - [8, 11, 9]) / [6, 8, 7]) ** 2).sum(-1) < 1
BRAIN = np.where(INSIDE, 100 + 8 * AXES[..., 0] - 2 * AXES[..., 2], 0).astype(np.int16)  # its two sides differ
MASK = INSIDE.astype(np.uint8)
HEAD = np.where(INSIDE, BRAIN, 40 + (AXES.sum(-1) % 7)).astype(np.int16)  # as bright as this outside of the mask


def image(voxels=BRAIN, affine=AFFINE, kind=nib.Nifti1Image):
    return kind(voxels, affine)


def turned(axcodes):
    to = nib.orientations.axcodes2ornt(axcodes)
    return image().as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to))


def put(content, name="scan.nii.gz"):
    """A builder of one file."""

    def build(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = folder / re.sub("(?i)nii", "nii", name).replace("GZ", "gz").replace("MGH", "mgh")
        nib.save(content, plain)  # nibabel writes small letters alone
        plain.rename(path)

    return build


def damaged(change, name="scan.nii.gz"):
    def build(folder):
        put(image(), name)(folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return build


def together(*builders):
    def build(folder):
        for builder in builders:
            builder(folder)

    return build


def touched(*files):
    return lambda folder: [(folder / name).touch() for name in files]


def linked(name, target):
    def build(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)

    return build


def elsewhere(folder):
    """A subject outside of the dataset, and a link to its folder in it."""
    put(image(), "store/k7/anat/scan.nii.gz")(folder.parent)
    linked("sub-01", folder.parent / "store" / "k7")(folder)


def masked(mask, affine=AFFINE):
    return together(put(image(HEAD)), put(image(mask, affine), "scan_mask.nii.gz"))


def shifted(*mm):
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


def waves(voxels):
    """+-1 around the brain, as a spline leaves it in whole numbers."""
    ring = np.pad(INSIDE, 2)
    around = sum(np.roll(ring, step, axis) for axis in range(3) for step in (-2, -1, 1, 2))[2:-2, 2:-2, 2:-2] > 0
    return np.where(around & ~INSIDE, np.where(AXES.sum(-1) % 2, 1, -1), voxels).astype(np.int16)


def resampled(order, dtype=np.int16):
    """On a grid of half the step, by splines of that order."""
    fine = affine_transform(BRAIN.astype(float), np.full(3, 0.5), order=order, output_shape=[36, 44, 40])
    return image((np.rint(fine) if dtype == np.int16 else fine).astype(dtype), AFFINE @ np.diag([0.5, 0.5, 0.5, 1]))


def scaled():
    content = image((BRAIN / 2).astype(np.uint8))
    content.header.set_slope_inter(2, 0)
    return content


PREP = "derivatives/fmriprep/sub-01/anat/sub-01_"
FMRIPREP = [f"{PREP}desc-preproc_T1w.nii.gz", f"{PREP}dseg.nii.gz", f"{PREP}desc-brain_mask.nii.gz"]
FMRIPREP += [f"{PREP}label-{tissue}_probseg.nii.gz" for tissue in ("CSF", "GM", "WM")]
BRATS = [f"BraTS20_Training_001/BraTS20_Training_001_{kind}.nii.gz" for kind in ("flair", "t1", "t1ce", "t2", "seg")]
ONE = ["scan.nii.gz"]
NAN = np.where(AXES.sum(-1) == 30, np.nan, BRAIN).astype(np.float32)
TISSUES = (MASK + (AXES[..., 0] > 9) * MASK).astype(np.int16)
SOFT = np.where(INSIDE, 0.9, 0.3 * (AXES[..., 0] > 9)).astype(np.float32)

SITUATIONS = {
    # name: builder, knobs, the images that are right (or words of the refusal), words that are logged
    "LAS": (put(turned("LAS")), {}, ONE, None),
    "PIR": (put(turned("PIR")), {}, ONE, None),
    "big-endian": (put(image(BRAIN.astype(">i2"))), {}, ONE, None),
    "float64": (put(image(BRAIN.astype(np.float64))), {}, ONE, None),
    "8 bits with a slope": (put(scaled()), {}, ONE, None),
    "a fourth axis of one": (put(image(BRAIN[..., None])), {}, ONE, None),
    "NIfTI-2": (put(image(kind=nib.Nifti2Image)), {}, ONE, None),
    ".NII.GZ": (put(image(), "scan.NII.GZ"), {}, ["scan.NII.GZ"], None),
    ".NII": (put(image(), "SCAN.NII"), {}, ["SCAN.NII"], None),
    ".nii.bz2": (put(image(), "scan.nii.bz2"), {}, ["scan.nii.bz2"], None),
    ".mgz": (put(image(kind=nib.MGHImage), "scan.mgz"), {}, ["scan.mgz"], None),
    ".MGH": (put(image(kind=nib.MGHImage), "scan.MGH"), {}, ["scan.MGH"], None),
    "a NIfTI pair": (put(image(kind=nib.Nifti1Pair), "scan.img"), {}, ["scan.img"], None),
    "an Analyze pair": (put(image(kind=nib.AnalyzeImage), "scan.img"), {}, "does not say where left is", None),
    ".nrrd and .dcm": (
        together(put(image()), touched("b.nrrd", "c.NRRD", "d.dcm", "e.json")),
        {},
        ONE,
        r"WARNING.*dataset_dir: 4 files are passed over by their endings: nrrd \(2\), dcm \(1\), json \(1\); of scans",
    ),
    "tables beside": (together(put(image()), touched("a.tsv", "b.json")), {}, ONE, r"INFO.*tsv \(1\), json \(1\)$"),
    "a linked subject": (elsewhere, {}, ["sub-01/anat/scan.nii.gz"], None),
    "a loop of links": (
        together(put(image(), "a/scan.nii.gz"), linked("a/b/up", "../.."), linked("a/self", ".")),
        {},
        ["a/scan.nii.gz"],
        None,
    ),
    "one file by two ways": (
        together(put(image(), "a/scan.nii.gz"), linked("all/scan.nii.gz", "../a/scan.nii.gz")),
        {},
        ["a/scan.nii.gz"],
        "WARNING.*1 of 2 images are links to others of them and left out, for example .*all/scan",
    ),
    "a file not fetched": (
        linked("scan.nii.gz", ".git/annex/SHA.nii.gz"),
        {},
        "scan.nii.gz' is a link to '.git/annex/SHA.nii.gz', which is not there .of git-annex or DataLad: not fetched",
        None,
    ),
    "a folder not there": (
        together(put(image()), linked("sub-02", "nowhere")),
        {},
        ONE,
        "WARNING.*1 links lead to nothing and are passed over, for example .*sub-02",
    ),
    "fMRIPrep": (
        together(*(put(image(), name) for name in FMRIPREP)),
        {},
        FMRIPREP[:1],
        r"WARNING.*5 of 6 files are taken for masks, label maps .*probseg \(3\), (dseg|mask) \(1\).*image_pattern says",
    ),
    "BraTS": (together(*(put(image(), name) for name in BRATS)), {}, sorted(BRATS[:4]), r"1 of 5 .*seg \(1\)"),
    "a pattern": (
        together(put(image(), "a_T1w.nii.gz"), put(image(), "a_T2w.nii.gz"), put(image(), "a_seg.nii.gz")),
        {"image_pattern": "*_T1w.nii.gz"},
        ["a_T1w.nii.gz"],
        r"INFO dataset_dir: 1 of 3 files fit the image_pattern '\*_T1w.nii.gz'",
    ),
    "a pattern of labels": (put(image(), "a_seg.nii.gz"), {"image_pattern": "*_seg*"}, ["a_seg.nii.gz"], "INFO"),
    "a pattern of folders": (
        together(put(image(), "sub-1/anat/a.nii"), put(image(), "sub-1/func/b.nii")),
        {"image_pattern": "sub-*/anat/*"},
        ["sub-1/anat/a.nii"],
        "INFO",
    ),
    "a pattern of nothing": (
        put(image()),
        {"image_pattern": "*_T1w.nii.gz"},
        r"image_pattern: '\*_T1w.nii.gz' fits none of the 1 files in dataset_dir, such as 'scan.nii.gz'",
        None,
    ),
    "masks by other names": (
        together(put(image()), put(image(MASK), "a_brain.nii.gz"), put(image(MASK * 255), "b_brain.nii.gz")),
        {},
        "(?s)2 files of 3 cannot be used.*a_brain.nii.gz' holds no other values than 0 and 1, as a mask.*0 and 255",
        None,
    ),
    "such masks, skipped": (
        together(put(image()), put(image(MASK), "a_brain.nii.gz"), put(image(MASK * 255), "b_brain.nii.gz")),
        {"skip_bad_files": "true"},
        ONE,
        "skipped: .*b_brain.nii.gz",
    ),
    "a label map by another name": (
        together(put(image()), put(image(TISSUES), "tissues.nii.gz")),
        {},
        ["scan.nii.gz", "tissues.nii.gz"],
        "WARNING.*1 of 2 images hold at most 32 different whole numbers each, as label maps do; .*tissues.nii.gz",
    ),
    "a mask": (masked(MASK), {"mask_suffix": "_mask"}, ONE, None),
    "a mask moved by 0.9 mm": (masked(MASK, shifted(0, 0.9, 0)), {"mask_suffix": "_mask"}, ONE, None),
    "a mask moved by 40 mm": (
        masked(MASK, shifted(0, 40, 0)),
        {"mask_suffix": "_mask"},
        "has a mask, .*scan_mask.nii.gz', that lies up to 40 mm from its image",
        None,
    ),
    "a mask of other voxels": (
        masked(MASK, np.diag([4.0, 4, 4, 1])),
        {"mask_suffix": "_mask"},
        r"that lies up to .* mm from its image \(voxels of \[4.0, 4.0, 4.0\] mm, and \[2.0, 2.0, 2.0\] mm in the image",
        None,
    ),
    "a soft mask": (masked(SOFT), {"mask_suffix": "_mask"}, ONE, "WARNING.*1 of 1 images have soft masks .fractions."),
    "labels as a mask": (masked(TISSUES), {"mask_suffix": "_mask"}, ONE, "masks of several whole numbers; all above 0"),
    "a mask of everything": (
        masked(MASK + 1),
        {"mask_suffix": "_mask"},
        "that has values from 1 to 2; expected 0 outside of the brain, 1 in it",
        None,
    ),
    "a ring of +-1": (put(image(waves(BRAIN))), {}, ONE, None),
    "NaN": (put(image(NAN)), {}, r"holds \d+ voxels that are NaN", None),
    "truncated": (damaged(lambda content: content[:-200]), {}, "scan.nii.gz' cannot be read as a volume", None),
    "a truncated .mgz": (
        damaged(lambda content: gzip.compress(gzip.decompress(content)[:5000]), "scan.mgz"),
        {},
        "cannot be read as a volume .voxels are missing",
        None,
    ),
    "an empty file": (touched("scan.nii"), {}, "scan.nii' cannot be read as a volume", None),
    "a time series": (
        put(image(np.stack([BRAIN] * 3, -1))),
        {},
        r"\(18, 22, 20, 3\); expected a volume with three",
        None,
    ),
    "one value": (put(image(BRAIN * 0)), {}, "holds the same value, 0, in every voxel", None),
    "hidden files": (together(put(image()), touched("._scan.nii.gz")), {}, ONE, None),
}


@pytest.fixture(scope="module")
def train_config():
    """A parser of train.json that takes knobs, for cubes of 16 voxels."""
    parser = ConfigParser()
    parser.read_config(ROOT / "configs/train.json")

    def with_knobs(**knobs):
        parser.update({"spatial_shape": [16, 16, 16], "mask_suffix": None, "image_pattern": None, **knobs})
        parser.ref_resolver.reset()
        return parser

    return with_knobs


@pytest.fixture(scope="module")
def right_cube(train_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("right") / "scan.nii"
    nib.save(image(), path)
    return train_config().get_parsed_content("train#preprocessing")({"image": str(path)})


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_a_folder_may_hold(situation, train_config, right_cube, tmp_path, caplog):
    """The images that are right, each the cube of the same brain; or a sentence; and what is said of the others."""
    build, knobs, expected, logged = SITUATIONS[situation]
    folder = tmp_path / "data"
    folder.mkdir()
    build(folder)
    parser = train_config(dataset_dir=str(folder), output_dir=str(tmp_path / "out"), skip_bad_files=False)
    parser.update(knobs)
    with caplog.at_level(logging.INFO):
        try:
            images = parser.get_parsed_content("images")
        except Exception as error:
            assert isinstance(expected, str) and re.search(expected, str(root_bundle_error(error))), error
            return
    assert [os.path.relpath(item["image"], folder) for item in images] == expected
    for item in images[:1]:
        cube = parser.get_parsed_content("train#preprocessing")(item)
        torch.testing.assert_close(cube["voxel_size"], right_cube["voxel_size"])
        torch.testing.assert_close(cube["image"], right_cube["image"], atol=0.02, rtol=0)
    ours = [record for record in caplog.records if record.name.startswith("scripts")]
    said = [f"{record.levelname} {record.getMessage()}" for record in ours]
    if logged is None:
        assert said == []
    else:
        assert sum(re.search(logged, line) is not None for line in said) == 1, said


@pytest.mark.parametrize("order, dtype", [(1, np.int16), (3, np.int16), (3, np.float32)])
def test_a_brain_that_was_resampled_by_splines_is_cropped_as_without_their_waves(order, dtype, train_config, tmp_path):
    nib.save(resampled(order, dtype), tmp_path / "scan.nii")
    nib.save(resampled(0), tmp_path / "right.nii")
    found, right = (
        train_config().get_parsed_content("train#preprocessing")({"image": str(tmp_path / f"{name}.nii")})
        for name in ("scan", "right")
    )
    assert (found["voxel_size"] - right["voxel_size"]).abs().max() <= 2 / 16  # a voxel of the scan on each side
    assert ((found["image"] > -1) != (right["image"] > -1)).float().mean() < 0.1


def test_a_pair_whose_voxels_change_is_read_again(tmp_path):
    images = [{"image": save(tmp_path / "scan.img", kind=nib.Nifti1Pair)}]
    marks = {inspection.mark_of(item, 3) for item in images}
    for ending in (".hdr", ".img"):
        os.utime(tmp_path / f"scan{ending}", ns=(0, 10**18))
        marks |= {inspection.mark_of(item, 3) for item in images}
    assert len(marks) == 3


# checking one file


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_of_numbers_can_be_used(dtype, suffix, tmp_path):
    assert examine(save(tmp_path / f"a{suffix}", NOISE.astype(dtype))) == GOOD


@pytest.mark.parametrize("trailing", [(1,), (1, 1)])
def test_trailing_axes_of_one_can_be_used(trailing, tmp_path):
    assert examine(save(tmp_path / "a.nii.gz", NOISE.reshape(*SHAPE, *trailing))) == GOOD


def test_the_smallest_sides_and_obliquely_turned_axes_can_be_used(tmp_path):
    c, s = np.cos(0.4), np.sin(0.4)
    affine = np.array([[-c, s, 0, 7], [0, 0, 5, -3], [s, c, 0, 1], [0, 0, 0, 1.0]])
    assert examine(save(tmp_path / "a.nii", NOISE[:8, :8, :8], affine)) == GOOD


def with_voxel(value, dtype="f4"):
    voxels = NOISE.astype(dtype)
    voxels[4, 5, 6] = value
    return voxels


COLOUR = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD_VOLUMES = {
    "a time series": (np.stack([NOISE] * 3, -1), r"shape \(9, 10, 11, 3\); expected a volume with three dimensions"),
    "a vector field": (
        NOISE.reshape(*SHAPE, 1)[..., None].repeat(3, -1),
        r"shape \(9, 10, 11, 1, 3\); expected a volume",
    ),
    "a picture": (NOISE[0], r"shape \(10, 11\); expected a volume with three dimensions"),
    "one slice": (NOISE[:, :, :1], r"three dimensions|at least 8 voxels a side"),
    "seven slices": (NOISE[:, :, :7], r"shape \(9, 10, 7\); expected at least 8 voxels a side"),
    "colours": (COLOUR, r"voxels of type .*'R'.*; expected integer or floating"),
    "complex numbers": (NOISE.astype("c8"), "voxels of type complex64; expected integer or floating"),
    "one value": (np.full(SHAPE, 7, "i2"), "the same value, 7, in every voxel"),
    "a NaN": (with_voxel(np.nan), "holds 1 voxels that are NaN or infinite"),
    "infinity": (with_voxel(np.inf, "f8"), "holds 1 voxels that are NaN or infinite"),
    "minus infinity": (with_voxel(-np.inf), "holds 1 voxels that are NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_what_cannot_be_used_is_said(name, tmp_path):
    voxels, sentence = BAD_VOLUMES[name]
    assert re.search(sentence, examine(save(tmp_path / "a.nii.gz", voxels)).problem)


@pytest.mark.parametrize("column", [[0, 0, 0], [1, 0, 0], [np.nan, 0, 1], [0, 0, np.inf]])
def test_an_affine_that_cannot_be_inverted_is_said(column, tmp_path):
    image = nib.Nifti1Image(NOISE, np.eye(4))
    for row, value in zip(("srow_x", "srow_y", "srow_z"), column, strict=True):
        image.header[row][2] = value
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + NOISE.tobytes("F"))
    header = nib.load(path).header
    assert header["sform_code"] == 2 and np.array_equal(header.get_sform()[:3, 2], column, equal_nan=True)
    assert "affine that cannot be inverted" in examine(str(path)).problem


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
    problem = examine(path).problem
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
        assert "cannot be read as a volume" in examine(str(tmp_path / name)).problem, name
    assert "cannot be read" in examine(str(tmp_path / "missing.nii")).problem


# masks


def test_a_mask_must_have_the_shape_and_the_axes_of_its_image(tmp_path):
    cube = np.random.default_rng(0).random((9, 9, 9)).astype(np.float32)
    las = np.diag([-1.0, 1, 1, 1])
    image = save(tmp_path / "a.nii", cube, las)
    mask = (cube > 0.5).astype(np.uint8)
    assert examine_item({"image": image, "mask": save(tmp_path / "a_good.nii", mask, las)}) == GOOD
    assert examine_item({"image": image}) == GOOD

    cases = {
        "a_small.nii": (mask[:8], las, r"has shape \(8, 9, 9\).*; expected shape \(9, 9, 9\) .* as its image has"),
        "a_mirrored.nii": (
            mask,
            np.eye(4),
            "axes RAS; expected shape .* axes LAS, as its image has",
        ),  # saved without an affine
        "a_turned.nii": (mask, las[[2, 0, 1, 3]], "axes .*; expected shape .* axes LAS"),
        "a_empty.nii": (np.zeros_like(mask), las, "the same value, 0, in every voxel"),
    }
    for name, (voxels, affine, sentence) in cases.items():
        problem = examine_item({"image": image, "mask": save(tmp_path / name, voxels, affine)}).problem
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
    with caplog.at_level(logging.WARNING, logger="scripts.scans.inspect"):
        assert names(readable(find_images(str(mixed)), skip_bad_files=True)) == ["a.nii.gz", "c.nii.gz", "e.nii.gz"]
    warned = [record.getMessage() for record in caplog.records]
    assert [name in line for name, line in zip(("b.nii", "d.nii", "f.nii.gz"), warned, strict=True)] == [True] * 3


# memory of what was checked


@pytest.fixture
def checked(monkeypatch):
    """Names of the files that were read by a check."""
    seen, check = [], inspection.examine_item

    def counted(item, spatial_dims):
        seen.append(Path(item["image"]).name)
        return check(item, spatial_dims)

    monkeypatch.setattr(inspection, "examine_item", counted)
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
        monkeypatch.setattr(inspection, "version_of_checks", lambda: "another")
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
    inspection.write_marks(str(place), inspection.version_of_checks(), {f"{i:032x}" for i in range(10_020)})
    readable(images, checked_path=str(place))
    assert "PATIENT" not in place.read_text()
    assert len(json.loads(place.read_text())["good"]) == 1


def test_a_memory_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    save(tmp_path / "a.nii")
    (tmp_path / "file").touch()
    images = find_images(str(tmp_path))
    assert readable(images, checked_path=str(tmp_path / "file" / "checked.json")) == images
    assert "the next start will check all files again" in caplog.text
