"""From a folder of NIfTI files, or of pictures where images are 2D, to checked lists of training and held-out ones."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import PIL
from nibabel.arrayproxy import ArrayProxy
from nibabel.openers import ImageOpener
from nibabel.volumeutils import apply_read_scaling
from PIL import Image
from tqdm import tqdm

from scripts.checks import check_knobs
from scripts.errors import BundleError
from scripts.files import write_text
from scripts.slices import grey, is_picture

logger = logging.getLogger(__name__)
SUFFIXES = (".nii", ".nii.gz")
SMALLEST_SIDE = 8  # voxels; below it there is nothing to learn from and most likely the file is a slice or a localiser
MOST_VOXELS = 2**30  # 1024^3, 4 GB as float32; a damaged or hostile header claims any number
MOST_HEADER = 2**26  # bytes before the voxels
SPACINGS = (1e-4, 1e6)  # mm; wide, since some files are in metres or micrometres
CHUNK = 2**20  # voxels that are looked at together: a check takes little memory, whatever the file unpacks to


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
    files = []
    for folder, subfolders, names in os.walk(dataset_dir):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        wanted = [name for name in names if name.endswith(SUFFIXES) or spatial_dims == 2 and is_picture(name)]
        files += [str(Path(folder, name)) for name in wanted if name[0] != "."]
    files.sort()
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


def check_header(path: str) -> None:
    """Raises ValueError for a header that nibabel must not even see: it reads all before the voxels into memory."""
    with ImageOpener(path) as file:
        block = file.read(nib.Nifti2Header.sizeof_hdr + 1)
        second = any(block[:4] == nib.Nifti2Header.sizeof_hdr.to_bytes(4, order) for order in ("little", "big"))
        kind = nib.Nifti2Header if second else nib.Nifti1Header
        header = kind(block[: kind.sizeof_hdr], check=False)
        offset, place = header["vox_offset"], kind.sizeof_hdr + 4
        if not 0 <= offset <= MOST_HEADER:
            raise ValueError(f"its voxels would begin at byte {offset:g}, more than {MOST_HEADER}")
        extended = block[kind.sizeof_hdr : kind.sizeof_hdr + 1] > b"\0"
        while extended and offset - place >= 16:  # each extension begins with its size
            file.seek(place)
            size = int.from_bytes(file.read(4), "little" if header.endianness == "<" else "big", signed=True)
            if not 16 <= size <= offset - place:
                raise ValueError(f"it would have an extension of {size} bytes in the {offset:g} before its voxels")
            place += size
    if header["sform_code"] == 0 and 0 in header["pixdim"][1 : 1 + min(3, header["dim"][0])]:
        raise ValueError(f"its voxels would have the size {header['pixdim'][1:4].tolist()} mm")
    bits = header.get_data_dtype().itemsize * 8
    if header["bitpix"] not in (0, bits):
        raise ValueError(f"its voxels would have {header['bitpix']} bits, and {bits} by their type")


def problem_of_two_sizes(header: nib.Nifti1Header, affine: np.ndarray, spacing: np.ndarray) -> str:
    """`problem_of` an sform that pixdim contradicts, where there is no qform to decide.

    MONAI's reader then takes the rotation of that qform, which nobody has set: left and right may change places.
    """
    if header["sform_code"] == 0 or header["qform_code"] != 0:
        return ""
    sizes = np.abs(header.get_zooms()[:3])
    if np.allclose(spacing[: len(sizes)], sizes):
        return ""
    if np.allclose(spacing[: len(sizes)], sizes, rtol=0.01):
        turned = [nib.aff2axcodes(each) for each in (affine, header.get_qform())]
        if turned[0] == turned[1]:
            return ""
    return (
        f"has voxels of {spacing.round(6).tolist()} mm by its sform and of {sizes.round(6).tolist()} mm by its pixdim, "
        "and no qform; one size would be right"
    )


def problem_of_voxels(path: str, data: ArrayProxy) -> str:
    """`problem_of` the voxels of a file, a chunk at a time; they must end where the file ends."""
    left, not_finite, lowest, highest = int(np.prod(data.shape, dtype=object)), 0, np.inf, -np.inf
    unscaled = (data.slope, data.inter) == (1, 0) and data.dtype.kind in "iu"
    with ImageOpener(path) as file:
        file.seek(data.offset)
        while left:
            chunk = file.read(min(left, CHUNK) * data.dtype.itemsize)
            if len(chunk) < min(left, CHUNK) * data.dtype.itemsize:
                raise EOFError("voxels are missing at its end")
            values = np.frombuffer(chunk, data.dtype)
            left -= len(values)
            if not unscaled:
                with np.errstate(over="ignore", invalid="ignore"):
                    values = apply_read_scaling(values, data.slope, data.inter).astype(np.float32)  # as training does
                not_finite += int((~np.isfinite(values)).sum())
            lowest, highest = min(lowest, values.min()), max(highest, values.max())
        if file.read(1):  # nothing; then gzip compares its checksum
            raise ValueError(f"it goes on after the {np.prod(data.shape)} voxels that its header names")
    if not_finite:
        return f"holds {not_finite} voxels that are NaN or infinite; finite numbers would be right"
    if lowest == highest:
        return f"holds the same value, {lowest}, in every voxel; an image would be right"
    return ""


def problem_of(path: str, spatial_dims: int = 3) -> str:
    """Why a file cannot be used for training, as half a sentence; an empty string where it can."""
    if is_picture(path):
        return problem_of_picture(path)
    try:
        check_header(path)
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
        if not SPACINGS[0] <= spacing.min() <= spacing.max() <= SPACINGS[1]:
            return f"has a voxel size of {spacing.tolist()} mm; from {SPACINGS[0]} to {SPACINGS[1]:g} would be right"
        if problem := problem_of_two_sizes(image.header, image.affine, spacing):
            return problem
        sides = np.array(shape) * spacing[: len(shape)]  # mm; training pads to a box of equal sides
        voxels = np.prod(shape, dtype=float) * np.prod(sides.max() / sides)
        if voxels > MOST_VOXELS:
            return (
                f"has shape {tuple(image.shape)} and a voxel size of {spacing.round(6).tolist()} mm, in a box of equal "
                f"sides {voxels:.3g} voxels; at most {MOST_VOXELS} would be right"
            )
        return problem_of_voxels(path, image.dataobj)
    except Exception as e:  # nibabel, zlib and numpy each raise their own for a damaged file
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        return f"cannot be read as a NIfTI volume ({reason[:160]}); it may be truncated or of another kind"


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


def version_of_checks() -> str:
    """A hash of the code that checks files; another one, and all of them are checked anew."""
    here = Path(__file__)
    versions = [here.read_bytes(), here.with_name("slices.py").read_bytes(), nib.__version__, PIL.__version__]
    return hashlib.blake2b(repr(versions).encode(), digest_size=16).hexdigest()


def mark_of(item: dict[str, str], spatial_dims: int) -> str | None:
    """A hash of path, size and time of change of an image and its mask; None where one of them is not there."""
    marked = hashlib.blake2b(str(spatial_dims).encode(), digest_size=16)
    try:
        for key in ("image", "mask"):
            if path := item.get(key):
                stat = os.stat(path)
                marked.update(os.fsencode(os.path.abspath(path)) + f"\0{stat.st_size} {stat.st_mtime_ns}\0".encode())
    except (OSError, ValueError):
        return None
    return marked.hexdigest()


def read_marks(path: str | None, version: str) -> set[str]:
    """Marks of the files that were found to be good by checks of this version; empty where the file is of no use."""
    try:
        content = json.loads(Path(path).read_text())
        return set(map(str, content["good"])) if content["version"] == version else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_marks(path: str, version: str, marks: set[str]) -> None:
    """Keep marks for `read_marks`; where that cannot be done, the next start checks all files again and it is said."""
    text = json.dumps({"version": version, "good": sorted(marks)})
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_text(path, text)
    except (OSError, BundleError) as e:
        logger.warning(f"the next start will check all files again: {e}")


def readable(
    images: Sequence[dict[str, str]],
    skip_bad_files: bool = False,
    key: str = "dataset_dir",
    spatial_dims: int = 3,
    checked_path: str | None = None,
) -> list[dict[str, str]]:
    """Read every file once, in parallel, and give back those that can be used.

    Args:
        key: what the user knows the files by, for the message.
        spatial_dims: 2 or 3, what the files must have.
        checked_path: JSON file that remembers which files were good, by path, size and time of change, so that they
            are not read again; None for no such memory. In a distributed run the first process checks for all.

    Raises:
        BundleError: lists ALL files that cannot be used, unless `skip_bad_files`, which warns of each instead.
    """
    with idist.one_rank_first():
        problems = problems_of_all(images, spatial_dims, checked_path)
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


def problems_of_all(images: Sequence[dict[str, str]], spatial_dims: int, checked_path: str | None) -> list[str]:
    """`problem_of_item` of each; what `checked_path` remembers as good is not read, see `readable`."""
    version = version_of_checks()
    known = read_marks(checked_path, version)
    marks = [mark_of(item, spatial_dims) for item in images] if checked_path else [None] * len(images)
    unknown = [item for item, mark in zip(images, marks, strict=True) if mark not in known]
    # decompression leaves the interpreter lock; each thread holds a part of one volume
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        checked = pool.map(partial(problem_of_item, spatial_dims=spatial_dims), unknown)
        found = iter(list(tqdm(checked, "checking files", len(unknown), disable=not unknown, leave=False)))
    problems = ["" if mark in known else next(found) for mark in marks]
    good = {mark for mark, problem in zip(marks, problems, strict=True) if mark and not problem}
    if checked_path and good - known and idist.get_rank() == 0:
        # marks of other folders are kept, as several cohorts share a file, but not without end
        write_marks(checked_path, version, good | known if len(known) < 10 * len(good) + 10_000 else good)
    return problems


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
    check_knobs(val_fraction=val_fraction)
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
