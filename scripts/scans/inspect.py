"""Every file is looked at before training begins: what cannot be used is named, all of it together."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
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

from scripts.running.checks import as_bool
from scripts.running.errors import BundleError
from scripts.running.files import write_text
from scripts.scans.find import header_of
from scripts.scans.images_2d import grey, is_picture

logger = logging.getLogger(__name__)
SMALLEST_SIDE = 8  # voxels; below it there is nothing to learn from and most likely the file is a slice or a localiser
MOST_VOXELS = 2**30  # 1024^3, 4 GB as float32; a damaged or hostile header claims any number
MOST_HEADER = 2**26  # bytes before the voxels
SPACINGS = (1e-4, 1e6)  # mm; wide, since some files are in metres or micrometres
CHUNK = 2**20  # voxels that are looked at together: a check takes little memory, whatever the file unpacks to
FEW_VALUES = 32  # whole numbers; an image has more, a label map seldom


@dataclass
class Finding:
    """What a check has found in a file.

    Attributes:
        problem: why it cannot be used, as half a sentence; "" where it can.
        doubts: what a user should know who trains on it, each as half a sentence about such images.
    """

    problem: str = ""
    doubts: tuple[str, ...] = ()


@dataclass
class Values:
    """What is known of the voxels of a file, chunk by chunk: of the numbers that training sees, scaling included."""

    lowest: float = np.inf
    highest: float = -np.inf
    not_finite: int = 0
    whole: bool = True
    different: set[float] = field(default_factory=set)  # no longer complete above FEW_VALUES

    def add(self, values: np.ndarray) -> None:
        """Take note of a chunk of at least one voxel."""
        self.lowest, self.highest = min(self.lowest, values.min()), max(self.highest, values.max())
        if values.dtype.kind == "f":
            self.not_finite += int((~np.isfinite(values)).sum())
            self.whole = self.whole and bool((values == np.rint(values)).all())
        for part in (values[:: len(values) // 4096 | 1], values):  # of most images a few voxels suffice, here and there
            if len(self.different) <= FEW_VALUES:
                self.different |= set(np.unique(part)[: FEW_VALUES + 1].tolist())

    def finding(self, is_mask: bool, spatial_dims: int) -> Finding:
        """Whether these are the voxels of an image, or of a mask of one."""
        element = "voxel" if spatial_dims == 3 else "pixel"
        if self.not_finite:
            return Finding(f"holds {self.not_finite} {element}s that are NaN or infinite; expected finite numbers")
        if self.lowest == self.highest:
            return Finding(f"holds the same value, {self.lowest}, in every {element}; expected an image")
        if is_mask:
            return self.finding_of_mask()
        if len(self.different) == 2 and spatial_dims == 3:
            values = " and ".join(f"{value:g}" for value in sorted(self.different))
            return Finding(f"holds no other values than {values}, as a mask does; expected an image")
        if len(self.different) <= FEW_VALUES and self.whole:
            return Finding(doubts=(f"hold at most {FEW_VALUES} different whole numbers each, as label maps do",))
        return Finding()

    def finding_of_mask(self) -> Finding:
        """Whether `scripts.scans.transforms.mask_of` finds a brain in it that is not everything."""
        limit = 0 if self.whole else self.highest / 2
        if not self.lowest <= limit < self.highest:
            return Finding(
                f"has values from {self.lowest:g} to {self.highest:g}; expected 0 outside of the brain, 1 in it"
            )
        if len(self.different) == 2:
            return Finding()
        if self.whole:
            return Finding(doubts=("have masks of several whole numbers; all above 0 count as brain",))
        return Finding(doubts=("have soft masks (fractions); what is above half of a mask's largest value is brain",))


def shape_of(path: str) -> tuple[int, ...]:
    """Voxels a side, from the header alone; of a PNG or JPEG (W, H)."""
    if is_picture(path):
        with Image.open(path) as picture:
            return picture.size
    return tuple(nib.load(path).shape)


def check_freesurfer(path: str) -> None:
    """`check_header` of an .mgz or .mgh: seven big-endian numbers, version, four dimensions, type."""
    with ImageOpener(path) as file:
        block = np.frombuffer(file.read(20), ">i4").tolist()
    if len(block) < 5 or block[0] != 1 or min(block[1:]) < 1 or np.prod(block[1:], dtype=object) > MOST_VOXELS:
        raise ValueError(f"its header begins with {block}; expected a 1 and the dimensions of a volume")


def check_header(path: str) -> None:
    """Raises ValueError for a header that nibabel must not even see: it reads all before the voxels into memory."""
    ending = path.lower()
    if ending.endswith((".mgz", ".mgh")):
        return check_freesurfer(path)
    pair = ending.endswith((".img", ".img.gz"))
    with ImageOpener(header_of(path)) as file:
        block = file.read(MOST_HEADER + 1 if pair else nib.Nifti2Header.sizeof_hdr + 1)
        second = any(block[:4] == nib.Nifti2Header.sizeof_hdr.to_bytes(4, order) for order in ("little", "big"))
        kind = nib.Nifti2Header if second else nib.Nifti1Header
        header = kind(block[: kind.sizeof_hdr], check=False)
        offset, place = header["vox_offset"], kind.sizeof_hdr + 4
        if pair and header["magic"].item()[:2] != b"ni":
            raise ValueError("an Analyze pair, which does not say where left is; expected NIfTI")
        if len(block) > MOST_HEADER or not 0 <= offset <= MOST_HEADER:
            raise ValueError(f"its voxels would begin at byte {offset:g}, more than {MOST_HEADER}")
        extended = not pair and block[kind.sizeof_hdr : kind.sizeof_hdr + 1] > b"\0"
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


def problem_of_two_sizes(header: nib.spatialimages.SpatialHeader, affine: np.ndarray, spacing: np.ndarray) -> str:
    """`problem_of` an sform that pixdim contradicts, where there is no qform to decide.

    MONAI's reader then takes the rotation of that qform, which nobody has set: left and right may change places.
    """
    if not isinstance(header, nib.Nifti1Header) or header["sform_code"] == 0 or header["qform_code"] != 0:
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
        "and no qform; expected one size"
    )


def values_of(path: str, data: ArrayProxy, with_tail: bool) -> Values:
    """The voxels of a file, read a chunk at a time; they must end where the file ends, but for a tail of tags.

    Raises:
        EOFError: voxels are missing.
        ValueError: there is more in the file.
    """
    found, left = Values(), int(np.prod(data.shape, dtype=object))
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
            found.add(values)
        tail = file.read(MOST_HEADER + 1 if with_tail else 1)  # to the end; then gzip compares its checksum
        if len(tail) > (MOST_HEADER if with_tail else 0):
            raise ValueError(f"it goes on after the {np.prod(data.shape)} voxels that its header names")
    return found


def examine(path: str, spatial_dims: int = 3, is_mask: bool = False) -> Finding:
    """Look at one file: a volume, a NIfTI slice or a picture."""
    if os.path.islink(path) and not os.path.exists(path):
        return Finding(f"is a link to {os.readlink(path)!r}, which is not there (of git-annex or DataLad: not fetched)")
    if is_picture(path):
        return examine_picture(path)
    try:
        check_header(path)
        image = nib.load(path)
        shape = image.shape
        while len(shape) > spatial_dims and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != spatial_dims:
            wanted = "a volume with three dimensions" if spatial_dims == 3 else "a slice with two dimensions"
            return Finding(f"has shape {tuple(image.shape)}; expected {wanted} and one channel")
        if min(shape) < SMALLEST_SIDE:
            return Finding(f"has shape {tuple(image.shape)}; expected at least {SMALLEST_SIDE} voxels a side")
        if image.get_data_dtype().fields is not None or image.get_data_dtype().kind not in "iuf":
            kind = image.get_data_dtype()
            return Finding(f"has voxels of type {kind}; expected integer or floating point numbers")
        spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
            return Finding(f"has an affine that cannot be inverted (voxel size {spacing.round(6).tolist()} mm)")
        if not SPACINGS[0] <= spacing.min() <= spacing.max() <= SPACINGS[1]:
            least, most = SPACINGS
            return Finding(f"has a voxel size of {spacing.tolist()} mm; expected from {least} to {most:g}")
        if problem := problem_of_two_sizes(image.header, image.affine, spacing):
            return Finding(problem)
        sides = np.array(shape) * spacing[: len(shape)]  # mm; training pads to a box of equal sides
        voxels = np.prod(shape, dtype=float) * np.prod(sides.max() / sides)
        if voxels > MOST_VOXELS:
            return Finding(
                f"has shape {tuple(image.shape)} and a voxel size of {spacing.round(6).tolist()} mm, in a box of equal "
                f"sides {voxels:.3g} voxels; expected at most {MOST_VOXELS}"
            )
        values = values_of(path, image.dataobj, with_tail=isinstance(image, nib.MGHImage))
        return values.finding(is_mask, spatial_dims)
    except Exception as e:  # nibabel, zlib and numpy each raise their own for a damaged file
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        return Finding(f"cannot be read as a volume ({reason[:160]}); it may be truncated or of another kind")


def examine_picture(path: str) -> Finding:
    """`examine` a PNG or JPEG."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(grey(picture))
    except Exception as e:  # Pillow and zlib each raise their own for a damaged file
        return Finding(
            f"cannot be read as a picture ({str(e)[:160] or type(e).__name__}); it may be truncated or of another kind"
        )
    if min(pixels.shape) < SMALLEST_SIDE:
        return Finding(f"has shape {pixels.shape[::-1]}; expected at least {SMALLEST_SIDE} pixels a side")
    values = Values()
    values.add(pixels.ravel())
    return values.finding(False, 2)


def partners_of(item: dict) -> list[tuple[str, str]]:
    """(what it is, path) of each file that lies beside the image of an item."""
    return [(key, value) for key, value in item.items() if key != "image" and isinstance(value, str) and value]


def examine_item(item: dict[str, str], spatial_dims: int = 3) -> Finding:
    """`examine` an image, and its mask and condition images, where it has some; all must be of one grid."""
    found = examine(item["image"], spatial_dims)
    for key, path in partners_of(item):
        if found.problem:
            break
        beside = examine(path, spatial_dims, is_mask=key == "mask")
        if key != "mask" and (beside.doubts or re.search("as a mask does|the same value", beside.problem)):
            beside = Finding()  # a label map has few values, or none but 0
        problem = beside.problem or (problem_of_grid(item["image"], path) if spatial_dims == 3 else "")
        found = Finding(f"has a {key}, {path!r}, that {problem}" if problem else "", found.doubts + beside.doubts)
    return found


def problem_of_grid(image_path: str, path: str) -> str:
    """Why a mask or condition image does not lie on its image, as half a sentence: they must agree voxel by voxel, each
    turned to RAS."""
    image, mask = both = nib.load(image_path), nib.load(path)
    right, found = (f"shape {each.shape[:3]} and axes {''.join(nib.aff2axcodes(each.affine))}" for each in both)
    if found != right:
        return f"has {found}; expected {right}, as its image has"
    corners = np.array([[*place, 1] for place in product(*((0, side - 1) for side in image.shape[:3]))])
    apart = np.linalg.norm(corners @ (image.affine - mask.affine)[:3].T, axis=1).max()
    sizes = [np.linalg.norm(each.affine[:3, :3], axis=0) for each in both]
    if apart <= 0.5 * sizes[0].min():
        return ""
    return (
        f"lies up to {apart:.4g} mm from its image (voxels of {sizes[1].round(3).tolist()} mm, and "
        f"{sizes[0].round(3).tolist()} mm in the image); expected the affine of the image"
    )


def version_of_checks() -> str:
    """A hash of the code that checks files; another one, and all of them are checked anew."""
    here = Path(__file__)
    versions = [here.read_bytes(), here.with_name("images_2d.py").read_bytes(), nib.__version__, PIL.__version__]
    return hashlib.blake2b(repr(versions).encode(), digest_size=16).hexdigest()


def mark_of(item: dict[str, str], spatial_dims: int) -> str | None:
    """A hash of path, size and time of change of an image and what lies beside it; None where one of them is not
    there."""
    marked = hashlib.blake2b(str(spatial_dims).encode(), digest_size=16)
    try:
        for listed in [item["image"], *(path for _, path in partners_of(item))]:
            for path in dict.fromkeys((listed, header_of(listed))):
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
    skip_bad_files: bool | str = False,
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
        findings = findings_of_all(images, spatial_dims, checked_path)
    bad = [f"{item['image']!r} {found.problem}" for item, found in zip(images, findings, strict=True) if found.problem]
    if bad and not as_bool(skip_bad_files=skip_bad_files):
        files = "file" if len(bad) == 1 else "files"
        raise BundleError(
            f"{key}: {len(bad)} {files} of {len(images)} cannot be used "
            "(mend or remove, or go on without by --skip_bad_files true):\n  " + "\n  ".join(bad)
        )
    for line in bad:
        logger.warning(f"skipped: {line}")
    doubted: dict[str, list[str]] = {}
    for item, found in zip(images, findings, strict=True):
        for doubt in found.doubts if not found.problem else ():
            doubted.setdefault(doubt, []).append(item["image"])
    for doubt, files in doubted.items():
        logger.warning(f"{key}: {len(files)} of {len(images)} images {doubt}; for example {files[0]!r}")
    return [item for item, found in zip(images, findings, strict=True) if not found.problem]


def findings_of_all(images: Sequence[dict[str, str]], spatial_dims: int, checked_path: str | None) -> list[Finding]:
    """`examine_item` of each; what `checked_path` remembers as good is not read, see `readable`."""
    version = version_of_checks()
    known = read_marks(checked_path, version)
    marks = [mark_of(item, spatial_dims) for item in images] if checked_path else [None] * len(images)
    unknown = [item for item, mark in zip(images, marks, strict=True) if mark not in known]
    # decompression leaves the interpreter lock; each thread holds a part of one volume
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        checked = pool.map(partial(examine_item, spatial_dims=spatial_dims), unknown)
        found = iter(list(tqdm(checked, "checking files", len(unknown), disable=not unknown, leave=False)))
    findings = [Finding() if mark in known else next(found) for mark in marks]
    good = {mark for mark, found in zip(marks, findings, strict=True) if mark and found == Finding()}
    if checked_path and good - known and idist.get_rank() == 0:
        # marks of other folders are kept, as several cohorts share a file, but not without end
        write_marks(checked_path, version, good | known if len(known) < 10 * len(good) + 10_000 else good)
    return findings
