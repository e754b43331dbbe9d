"""Whole heads: which scans are heads, and where the brain is in them.

The brain is found by deepbet (Fisch et al. 2024), a network for T1-weighted heads of adults, whose weights come with
its package. A mask is kept on the disk by the content of its scan, so that it is made once.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from monai.utils import optional_import
from tqdm import tqdm

from scripts.running.checks import as_bool
from scripts.running.errors import BundleError
from scripts.running.files import write_atomically, write_text
from scripts.running.locks import check_writable
from scripts.running.processes import gathered, in_turn, share
from scripts.scans.inspect import mark_of
from scripts.scans.transforms import background_of, foreground_of, mask_of

# optional: the Model Zoo looks at the workflow of a training where there is no scipy
ndimage, _ = optional_import("scipy.ndimage")
logger = logging.getLogger(__name__)
LARGEST_BRAIN = 2000.0  # mL; brains of adults have 900 to 1900, heads from 2500 on
INSTALL = "deepbet is not installed: `pip install -r requirements.txt`, or --brain_extraction false"


def volume_of(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The voxels (*spatial) of a scan, without a fourth axis of one, and their affine in mm."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    return voxels.reshape(voxels.shape[:3]), image.affine


def millilitres(mask: np.ndarray, affine: np.ndarray) -> float:
    """The volume of a mask."""
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def brain_in(item: dict[str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(voxels, mask of the brain, affine) of a scan: its "mask" if it has one, else what is no background."""
    voxels, affine = volume_of(item["image"])
    mask = mask_of(volume_of(item["mask"])[0]) if "mask" in item else foreground_of(voxels)
    return voxels, mask, affine


def is_head(path: str) -> bool:
    """Whether a scan is a whole head: nothing even lies around it, or it is larger than any brain.

    A brain that was extracted has one value around it, and at most 2000 mL of others.
    """
    voxels, affine = volume_of(path)
    return not background_of(voxels)[2] or millilitres(foreground_of(voxels), affine) > LARGEST_BRAIN


@lru_cache(maxsize=1)
def extractor() -> Any:
    """deepbet with its weights, on the GPU where there is one."""
    from deepbet import BrainExtraction  # here, since programs that only sample do without it

    return BrainExtraction(no_gpu=not torch.cuda.is_available())


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """The largest connected piece of a mask (voxels that share a face), with its holes filled."""
    pieces, count = ndimage.label(mask)
    if not count:
        return mask
    return ndimage.binary_fill_holes(pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]))


def brain_mask(path: str) -> nib.Nifti1Image:
    """The mask of the brain in a head, 0 and 1, on the grid of its scan: one piece, without holes.

    Raises:
        BundleError: nothing in it looks like a brain.
    """
    voxels, affine = volume_of(path)
    try:
        _, mask, _ = extractor().run(nib.Nifti1Image(voxels.astype(np.float32), affine))
        found, reason = largest_piece(np.asarray(mask.dataobj) > 0), "the mask is empty"
    except Exception as e:  # deepbet's assertions, and what numpy says of an empty mask
        found, reason = np.zeros(1, bool), (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
    if not found.any():
        raise BundleError(
            f"{path!r}: no brain was found in it ({reason}); expected a T1-weighted head of an adult; go on with "
            f"--exclude \"['{os.path.basename(path)}']\", with masks (--mask_suffix), or with --brain_extraction false"
        )
    return nib.Nifti1Image(found.astype(np.uint8), affine)


def write_volume(image: nib.Nifti1Image, path: str) -> None:
    """Write a .nii.gz file, whole or not at all."""
    content = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def kept_mask(path: str, mask_dir: str) -> str:
    """The path of the mask of a scan, named by its content, so that a copy finds it; made if it is not there.

    The file appears whole or not at all.
    """
    with open(path, "rb") as file:
        place = os.path.join(mask_dir, hashlib.file_digest(file, "blake2b").hexdigest()[:32] + ".nii.gz")
    if not os.path.exists(place):
        write_volume(brain_mask(path), place)
    return place


def for_each(work: Callable[[Any], Any], items: Sequence, what: str, threads: int | None = None) -> list[Any]:
    """[work(item) for item in items] with a bar, shared out among the processes and within each among threads.

    Collective.
    """
    mine = share(items)
    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
        done = list(tqdm(pool.map(work, mine), what, len(mine), unit="scan", disable=len(mine) < 2))
    return in_turn(gathered(done))


def heads_among(images: Sequence[dict[str, str]], mask_dir: str) -> list[bool]:
    """Whether each is a whole head; what was found is kept by path, size and time of change. Collective."""
    memory = Path(mask_dir, "heads.json")
    try:
        known = dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    known = gathered(known)[0]  # one process may see a file that another one does not see yet
    marks = [mark_of(item, 3) for item in images]
    unknown = [item["image"] for item, mark in zip(images, marks, strict=True) if mark not in known]
    found = dict(zip(unknown, for_each(is_head, unknown, "heads or brains"), strict=True))
    heads = [found.get(item["image"], known.get(mark)) for item, mark in zip(images, marks, strict=True)]
    if unknown and idist.get_rank() == 0:
        try:
            os.makedirs(mask_dir, exist_ok=True)
            write_text(str(memory), json.dumps(known | {m: h for m, h in zip(marks, heads, strict=True) if m}))
        except (OSError, BundleError) as e:
            logger.warning(f"mask_dir: the next start will look again which scans are heads: {e}")
    return heads


def with_brains(
    images: Sequence[dict[str, str]], brain_extraction: bool | str, mask_dir: str, key: str = "dataset_dir"
) -> list[dict[str, str]]:
    """The images, with "mask": path for those whose brain is to be taken out. Collective.

    Args:
        images: [{"image": path, ...}, ...] of volumes; those with a "mask" keep it.
        brain_extraction: true extracts every scan, "auto" the whole heads, false none.
        mask_dir: folder of the masks.
        key: what the user knows the scans by.

    Raises:
        BundleError: a scan without a brain; true without deepbet; a folder that cannot be written.
    """
    auto = brain_extraction == "auto"
    without = [item for item in images if "mask" not in item]
    if not without or not auto and not as_bool(brain_extraction=brain_extraction):
        return list(images)
    chosen = heads_among(without, mask_dir) if auto else [True] * len(without)
    heads = [item["image"] for item, head in zip(without, chosen, strict=True) if head]
    if not heads:
        return list(images)
    if find_spec("deepbet") is None:
        if not auto:
            raise BundleError(f"brain_extraction: {brain_extraction!r} was given, but {INSTALL}")
        logger.warning(f"{key}: {len(heads)} of {len(images)} scans are whole heads and are used as such; {INSTALL}")
        return list(images)
    logger.info(f"{key}: {len(heads)} of {len(images)} scans are whole heads; their brains are taken out")
    check_writable(mask_dir=mask_dir)
    made = for_each(lambda path: kept_mask(path, mask_dir), heads, "extracting brains", 1)
    masks = dict(zip(heads, made, strict=True))
    return [item | {"mask": masks[item["image"]]} if item["image"] in masks else item for item in images]
