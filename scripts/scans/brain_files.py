"""A folder of scans written as a folder of brains, with their masks and a table of their volumes."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence

import ignite.distributed as idist
import nibabel as nib
import numpy as np

from scripts.running.errors import BundleError
from scripts.running.files import write_text
from scripts.running.tables import read_table
from scripts.scans.brains import brain_in, for_each, write_volume
from scripts.scans.find import stem
from scripts.scans.look import look_at
from scripts.scans.outliers import QUANTITIES
from scripts.scans.split import subjects_of

logger = logging.getLogger(__name__)
TABLE = "participants.tsv"


def check_apart(dataset_dir: str, output_dir: str) -> None:
    """Raises BundleError where one of the folders is, or lies in, the other one."""
    ends = [os.path.realpath(each) + os.sep for each in (dataset_dir, output_dir)]
    if ends[0].startswith(ends[1]) or ends[1].startswith(ends[0]):
        raise BundleError(
            f"output_dir: {output_dir!r} and the dataset_dir {dataset_dir!r} lie in each other; expected two folders"
        )


def write_brain(item: dict[str, str], folder: str, output_dir: str) -> str:
    """Write `output_dir`/<place below folder>.nii.gz, 0 around the brain, and ..._mask.nii.gz; returns the first.

    What is a brain already has no "mask", and is written as it is.
    """
    voxels, mask, affine = brain_in(item)
    brain = np.where(mask, voxels, 0).astype(voxels.dtype) if "mask" in item else voxels
    place = os.path.join(output_dir, os.path.dirname(os.path.relpath(item["image"], folder)), stem(item["image"]))
    os.makedirs(os.path.dirname(place), exist_ok=True)
    for content, end in ((brain, ""), (mask.astype(np.uint8), "_mask")):
        image = nib.Nifti1Image(content, affine)
        image.header.set_xyzt_units("mm")
        write_volume(image, f"{place}{end}.nii.gz")
    return f"{place}.nii.gz"


def known_of(folder: str) -> dict[str, dict[str, str]]:
    """{participant_id: row} of the participants.tsv of a BIDS dataset; empty where there is none."""
    path = os.path.join(folder, TABLE)
    if not os.path.isfile(path):
        return {}
    rows = read_table(path, ("participant_id",), "dataset_dir", "a BIDS table of participants")
    return {row["participant_id"]: row for _, row in rows}


def write_participants(
    path: str, subjects: Sequence[str], files: Sequence[str], values: np.ndarray, folder: str
) -> None:
    """A table with a line a brain: participant, file, what participants.tsv in `folder` says, what was measured."""
    known = known_of(folder)
    measured = [quantity.name for quantity in QUANTITIES]
    kept = [name for name in next(iter(known.values()), {}) if name not in ("participant_id", "file", *measured)]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["participant_id", "file", *kept, *measured])
    shared = Counter(subject.rsplit("/", 1)[-1] for subject in set(subjects))
    for subject, file, line in zip(subjects, files, values, strict=True):
        name = subject.rsplit("/", 1)[-1]
        row = known.get(name, {})
        writer.writerow(
            [
                name if shared[name] == 1 else subject,
                file,
                *(row.get(name) or "n/a" for name in kept),
                *(f"{x:.5g}" for x in line),
            ]
        )
    write_text(path, text.getvalue())


def write_brains(images: Sequence[dict[str, str]], dataset_dir: str, output_dir: str) -> None:
    """Write the brains of all scans, their masks, participants.tsv, brains.csv and the pages of pictures. Collective.

    Voxels within a brain, their type and the grid stay as they are.

    Args:
        images: see `scripts.scans.collect.find_scans`.

    Raises:
        BundleError: there are no scans.
    """
    if not images:
        raise BundleError(f"dataset_dir: {dataset_dir!r} holds no usable scans; expected NIfTI volumes or .mgz")
    _, values = look_at(images, output_dir, dataset_dir)
    written = for_each(lambda item: write_brain(item, dataset_dir, output_dir), images, "writing brains")
    if idist.get_rank() == 0:
        files = [os.path.relpath(file, output_dir) for file in written]
        subjects = subjects_of(images, dataset_dir)
        write_participants(os.path.join(output_dir, TABLE), subjects, files, values, dataset_dir)
        logger.info(f"{len(files)} brains, their masks and {TABLE} are in {output_dir!r}")
