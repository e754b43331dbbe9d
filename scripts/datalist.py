"""From a folder of NIfTI files, or of pictures where images are 2D, to checked lists of training and held-out ones."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.openers import ImageOpener
from PIL import Image
from tqdm import tqdm

from scripts.errors import BundleError
from scripts.slices import grey, is_picture

logger = logging.getLogger(__name__)
SUFFIXES = (".nii", ".nii.gz")
SMALLEST_SIDE = 8  # voxels; below it there is nothing to learn from and most likely the file is a slice or a localiser


def stem(path: str) -> str:
    """File name without folder and without .nii, .nii.gz, .png, .jpg or .jpeg."""
    return re.sub(r"\.(nii(\.gz)?|(?i:png|jpe?g))$", "", os.path.basename(path))


def find_images(dataset_dir: str, mask_suffix: str | None = None, spatial_dims: int = 3) -> list[dict[str, str]]:
    """All images below a folder, sorted by path; hidden files and folders (.git, ._x.nii) are passed over.

    Args:
        dataset_dir: searched with its sub-folders; a missing folder gives an empty list (see `require`).
        mask_suffix: for example "_mask": `sub-01_mask.nii.gz` is then the brain mask of `sub-01.nii.gz`.
        spatial_dims: 3 finds NIfTI files; 2 also PNG and JPEG.

    Returns:
        [{"image": path}, ...], with "mask": path where `mask_suffix` is given.

    Raises:
        BundleError: names every image that has no mask although `mask_suffix` is given; masks in 2D.
    """
    if mask_suffix and spatial_dims == 2:
        raise BundleError(f"mask_suffix: {mask_suffix!r} was given, but 2D images are not masked; null would be right")
    root = Path(dataset_dir)
    named = (
        p
        for p in root.rglob("*")
        if (p.name.endswith(SUFFIXES) or spatial_dims == 2 and is_picture(p.name)) and not p.is_dir()
    )
    files = sorted(str(p) for p in named if not any(part[0] == "." for part in p.relative_to(root).parts))
    if not mask_suffix:
        return [{"image": f} for f in files]
    masks = {(os.path.dirname(f), stem(f)): f for f in files if stem(f).endswith(mask_suffix)}
    images = [f for f in files if not stem(f).endswith(mask_suffix)]
    pairs = [{"image": f, "mask": masks.get((os.path.dirname(f), stem(f) + mask_suffix), "")} for f in images]
    without = [p["image"] for p in pairs if not p["mask"]]
    if without:
        raise BundleError(
            f"mask_suffix: {mask_suffix!r} was given, but {len(without)} of {len(images)} images have no mask beside "
            f"them, for example {without[0]!r} (expected {stem(without[0]) + mask_suffix}.nii.gz)"
        )
    return pairs


def shape_of(path: str) -> tuple[int, ...]:
    """Voxels a side, from the header alone; of a PNG or JPEG (W, H)."""
    if is_picture(path):
        with Image.open(path) as picture:
            return picture.size
    return tuple(nib.load(path).shape)


def problem_of(path: str, spatial_dims: int = 3) -> str:
    """Why a file cannot be used for training, as half a sentence; an empty string where it can."""
    if is_picture(path):
        return problem_of_picture(path)
    try:
        image = nib.load(path)
        shape = image.shape
        while len(shape) > spatial_dims and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != spatial_dims:
            wanted = "a volume with three dimensions" if spatial_dims == 3 else "a slice with two dimensions"
            return f"has shape {tuple(image.shape)}; {wanted} and one channel would be right"
        if min(shape) < SMALLEST_SIDE:
            return f"has shape {tuple(image.shape)}; at least {SMALLEST_SIDE} voxels a side would be right"
        if image.get_data_dtype().fields is not None or image.get_data_dtype().kind not in "iuf":
            return f"has voxels of type {image.get_data_dtype()}; integer or floating point numbers would be right"
        spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
            return f"has an affine that cannot be inverted (voxel size {spacing.round(6).tolist()} mm)"
        data = image.dataobj
        layout = (data.shape, data.dtype, data.offset, data.slope, data.inter)
        with ImageOpener(path) as file:
            voxels = np.asanyarray(ArrayProxy(file, layout, mmap=False))
            file.read()  # to the end, where gzip keeps its checksum
    except Exception as e:  # nibabel, zlib and numpy each raise their own for a damaged file
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        return f"cannot be read as a NIfTI volume ({reason[:160]}); it may be truncated or of another kind"
    lowest, highest = voxels.min(), voxels.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        return (
            f"holds {int((~np.isfinite(voxels)).sum())} voxels that are NaN or infinite; finite numbers would be right"
        )
    if lowest == highest:
        return f"holds the same value, {lowest}, in every voxel; an image would be right"
    return ""


def problem_of_picture(path: str) -> str:
    """`problem_of` a PNG or JPEG."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(grey(picture))
    except Exception as e:  # Pillow and zlib each raise their own for a damaged file
        return (
            f"cannot be read as a picture ({str(e)[:160] or type(e).__name__}); it may be truncated or of another kind"
        )
    if min(pixels.shape) < SMALLEST_SIDE:
        return f"has shape {pixels.shape[::-1]}; at least {SMALLEST_SIDE} pixels a side would be right"
    if pixels.min() == pixels.max():
        return f"holds the same value, {pixels.min()}, in every pixel; an image would be right"
    return ""


def problem_of_item(item: dict[str, str], spatial_dims: int = 3) -> str:
    """`problem_of` an image and of its mask, where it has one; the two must have the same shape and axes."""
    problem = problem_of(item["image"], spatial_dims)
    if not problem and item.get("mask"):
        problem = problem_of(item["mask"])
        if not problem:
            headers = [nib.load(item[key]) for key in ("image", "mask")]
            right, found = (f"shape {h.shape[:3]} and axes {''.join(nib.aff2axcodes(h.affine))}" for h in headers)
            if found != right:  # each is turned to RAS by its own affine
                problem = f"has {found}; {right}, as its image has, would be right"
        problem = f"has a mask, {item['mask']!r}, that {problem}" if problem else ""
    return problem


def readable(
    images: Sequence[dict[str, str]], skip_bad_files: bool = False, key: str = "dataset_dir", spatial_dims: int = 3
) -> list[dict[str, str]]:
    """Read every file once, in parallel, and give back those that can be used.

    Args:
        key: what the user knows the files by, for the message.
        spatial_dims: 2 or 3, what the files must have.

    Raises:
        BundleError: lists ALL files that cannot be used, unless `skip_bad_files`, which warns of each instead.
    """
    # decompression leaves the interpreter lock; each thread holds one volume, so not as many as a large machine has
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        checked = pool.map(partial(problem_of_item, spatial_dims=spatial_dims), images)
        problems = list(tqdm(checked, "checking files", len(images), disable=not images, leave=False))
    bad = [f"{item['image']!r} {problem}" for item, problem in zip(images, problems, strict=True) if problem]
    if bad and not skip_bad_files:
        files = "file" if len(bad) == 1 else "files"
        raise BundleError(
            f"{key}: {len(bad)} {files} of {len(images)} cannot be used "
            "(mend or remove, or go on without by --skip_bad_files true):\n  " + "\n  ".join(bad)
        )
    for line in bad:
        logger.warning(f"skipped: {line}")
    return [item for item, problem in zip(images, problems, strict=True) if not problem]


def subject_of(path: str) -> str:
    """The subject a scan belongs to: the first BIDS entity `sub-...` in its file name, with what stands before it (two
    datasets both have a sub-01), or else the innermost folder `sub-...`; else each file is a subject of its own."""
    if found := re.match(r".*?sub-[A-Za-z0-9]+", os.path.basename(path)):
        return found.group()
    folders = [found.group() for part in Path(path).parent.parts if (found := re.match(r"sub-[A-Za-z0-9]+", part))]
    return folders[-1] if folders else path


def split_by_subject(
    images: Sequence[dict[str, str]], val_fraction: float, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) lists; all scans of a subject are on one side. A seeded shuffle of the subjects decides.

    Args:
        val_fraction: share of the subjects to hold out, in (0, 1); at least one subject is held out.

    Raises:
        BundleError: `val_fraction` is out of range, or there are fewer than two subjects.
    """
    if not isinstance(val_fraction, (int, float)) or not 0 < val_fraction < 1:
        raise BundleError(f"val_fraction: {val_fraction!r} was given; it must lie between 0 and 1, for example 0.1")
    if not images:
        return [], []
    subjects = sorted({subject_of(item["image"]) for item in images})
    held_out = max(1, round(val_fraction * len(subjects)))
    if held_out >= len(subjects):
        raise BundleError(
            f"dataset_dir: {len(images)} usable images of {len(subjects)} subjects, too few to train on some and hold "
            f"out {held_out} (val_fraction = {val_fraction}); at least {held_out + 1} subjects would be right"
        )
    order = np.random.default_rng(seed).permutation(len(subjects))
    validation = {subjects[i] for i in order[:held_out]}
    sides: tuple[list, list] = ([], [])
    for item in images:
        sides[subject_of(item["image"]) in validation].append(item)
    return sides


def require(dataset_dir: str, training: Sequence, class_names: Sequence[str] | None = None) -> None:
    """Raises BundleError where there is nothing to train on, of all or of one class.

    Nothing held out is no error: `split_by_subject` holds out a subject at least, MONAI Label does so only on request.
    """
    if training:
        labels = {item.get("class_label") for item in training}
        without = [name for label, name in enumerate(class_names or ()) if label not in labels]
        if without:
            raise BundleError(
                f"class_names: of {len(training)} images to train on none is of {without}; at least one of each of "
                f"{list(class_names)} would be right"
            )
        return
    found = "it holds no usable images" if os.path.isdir(dataset_dir) else "there is no such folder"
    raise BundleError(
        f"dataset_dir: {str(dataset_dir)!r}: {found}; a folder with at least two brain-extracted NIfTI volumes "
        "(.nii or .nii.gz; in 2D also .png or .jpg) would be right, in MONAI Label images with a final label, or no "
        "folder at all and configs/presets/demo.json"
    )
