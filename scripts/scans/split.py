"""Which scans are of one person, and which people are held out."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError
from scripts.running.settings import differing
from scripts.scans.find import stem

logger = logging.getLogger(__name__)
CONTRAST = r"(?:t[12](?:w|c|ce|gd|n|f|star)?|pdw?|flair|dwi|adc|swi|mprage|mp2rage|spgr)"
CONTRASTS = re.compile(rf"^(?:{CONTRAST}[-_. ]+)+|(?:(?:^|[-_. ]+){CONTRAST})+$", re.IGNORECASE)  # around a name
SUBJECT = re.compile(r"(?<![A-Za-z0-9-])sub-[A-Za-z0-9]+")
# Folders that hold the same people as those beside them.
SAME_PEOPLE = re.compile(rf"rawdata|sourcedata|images?|(?:ses|session|visit)[-_]?\w*|{CONTRAST}", re.IGNORECASE)


def subjects_of(images: Sequence[dict[str, str]], dataset_dir: str | None = None) -> list[str]:
    """The subject that each image is of.

    - It is the first BIDS entity `sub-...` in the file's name, wherever it stands, else that of the innermost folder.
      In two folders neither of which holds the other (two datasets) the same entity is two subjects.
    - Else a folder that holds several images, at any depth, is a subject where there are at least as many such folders
      at its depth as images in the fullest of them: folders of patients, and not of classes or sites.
    - Else it is the file's path without words for the contrast around its name: a_T1.nii and a_FLAIR.nii are of one.

    Folders of contrasts, sessions and the like (SAME_PEOPLE) are passed over in all of this. A warning says which names
    with different words before `sub-...` were taken as one subject.

    Args:
        dataset_dir: above which no folder counts; None for the root.
    """
    paths = [people_of(Path(os.path.relpath(item["image"], dataset_dir or "/")).parts) for item in images]
    entities = [next((found.group() for part in path[::-1] if (found := SUBJECT.search(part))), None) for path in paths]
    scopes: dict[str, set[tuple[str, ...]]] = {}
    for path, entity in zip(paths, entities, strict=True):
        scopes.setdefault(entity or "", set()).add(dataset_of(path))
    patients = patient_folders([path for path, entity in zip(paths, entities, strict=True) if not entity])
    subjects = []
    for path, entity in zip(paths, entities, strict=True):
        if entity:
            around = (scope for scope in scopes[entity] if dataset_of(path)[: len(scope)] == scope)
            parts = (*min(around, key=len), entity)
        else:
            above = [path[:depth] for depth in range(1, len(path)) if path[:depth] in patients]
            parts = above[0] if above else (*path[:-1], CONTRASTS.sub("", stem(path[-1])))
        subjects.append("/".join(part for part in parts if part))
    warn_of_joined(paths, entities, subjects)
    return subjects


def people_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """A path without the folders that hold the same people as those beside them."""
    return (*(part for part in path[:-1] if not SAME_PEOPLE.fullmatch(part)), path[-1])


def dataset_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that name the dataset of a path: those above `derivatives` or `sub-...`."""
    ends = (i for i, part in enumerate(path[:-1]) if part == "derivatives" or SUBJECT.search(part))
    return path[: next(ends, len(path) - 1)]


def patient_folders(paths: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The folders that are a subject each, see `subjects_of`."""
    counts = Counter(path[:depth] for path in paths for depth in range(1, len(path)))
    innermost = {
        next((path[:depth] for depth in range(len(path) - 1, 0, -1) if counts[path[:depth]] > 1), ()) for path in paths
    } - {()}
    depths: dict[int, list[tuple[str, ...]]] = {}
    for folder in innermost:
        depths.setdefault(len(folder), []).append(folder)
    plausible = (folders for folders in depths.values() if len(folders) >= max(counts[folder] for folder in folders))
    return {folder for folders in plausible for folder in folders}


def warn_of_joined(paths: Sequence[tuple[str, ...]], entities: Sequence[str | None], subjects: Sequence[str]) -> None:
    """Say which names with different words before `sub-...` are one subject, and how many numbers are several."""
    named: dict[str, set[str]] = {}
    for path, entity, subject in zip(paths, entities, subjects, strict=True):
        if entity:
            carrier = next(part for part in path[::-1] if SUBJECT.search(part))
            beginning = carrier[: SUBJECT.search(carrier).end()]
            named.setdefault(subject, set()).add("/".join((*dataset_of(path), beginning)))
    joined = {subject: sorted(names) for subject, names in named.items() if len(names) > 1}
    if joined:
        examples = "; ".join(" and ".join(names) for names in list(joined.values())[:3])
        logger.warning(
            f"{len(joined)} subjects have names with different beginnings, which are taken as scans of one person: "
            f"{examples}; where they are of different people, give each dataset a folder"
        )
    numbers = Counter(subject.rsplit("/", 1)[-1] for subject in named)
    apart = sum(numbers[subject.rsplit("/", 1)[-1]] > 1 for subject in named)
    if apart:
        logger.info(f"{apart} subjects have the number of another one, in another folder: taken as different people")


def split_as_before(
    images: Sequence[dict[str, str]], path: str, dataset_dir: str, data_description: Mapping[str, Any]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The split of a run that goes on; subjects that are new join the training part, and are named.

    Args:
        path: the dataset.json of that run. Its files are known by their places below its `dataset_dir`.
        dataset_dir: where they are now.
        data_description: knobs as they are now, which must be those of the run.

    Raises:
        BundleError: it is not readable, the run was begun with another value of a knob, such as the seed, or none of
            what was held out is there any more.
    """
    try:
        record = json.loads(Path(path).read_text())
        then, sides = record.get("data_description", {}), [record[side] for side in ("training", "validation")]
        then_dir = record.get("dataset_dir") or dataset_dir
        places = [{os.path.relpath(file, then_dir) for file in files} for files in sides]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as e:
        raise BundleError(
            f"{path!r} does not say how the run was split ({e}); mend it, or remove it to split anew"
        ) from e
    for key in differing(then, data_description):
        raise BundleError(
            f"{key}: {data_description[key]!r} was given, but the run that goes on was begun with {then[key]!r} "
            f"({path!r}); give the same, or begin a new run with --init_ckpt"
        )
    training, held_out = ({str(Path(dataset_dir, place)) for place in of_side} for of_side in places)
    present = {item["image"] for item in images}
    if held_out and not held_out & present:
        raise BundleError(
            f"dataset_dir: {dataset_dir!r} holds none of the {len(held_out)} held-out files of the run that goes on "
            f"({path!r}); expected the folder that it was begun with"
        )
    if gone := (training | held_out) - present:
        logger.warning(f"{len(gone)} files of the run that goes on are not there any more, such as {min(gone)!r}")
    files = sorted(present | training | held_out)  # a new visit goes with the others
    subjects = dict(zip(files, subjects_of([{"image": file} for file in files], dataset_dir), strict=True))
    validation = {subjects[file] for file in held_out}
    if new := sorted({subjects[file] for file in present} - {subjects[file] for file in training | held_out}):
        names = ", ".join(new[:10]) + (", ..." if len(new) > 10 else "")
        logger.warning(f"{len(new)} subjects are new since the run began, and join its training part: {names}")
    return tuple([i for i in images if (subjects[i["image"]] in validation) == side] for side in (False, True))


def split_by_subject(
    images: Sequence[dict[str, str]],
    val_fraction: float,
    seed: int,
    dataset_dir: str | None = None,
    kept: str | None = None,
    data_description: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) lists; all scans of a subject are on one side. A seeded shuffle of the subjects decides.

    Args:
        val_fraction: share of the subjects to hold out, in (0, 1); at least one subject is held out.
        dataset_dir: see `subjects_of`.
        kept: the dataset.json of a run that goes on, whose split is kept, see `split_as_before`; None for a new run.
        data_description: see there.

    Raises:
        BundleError: `val_fraction` is out of range, or there are fewer than two subjects.
    """
    check_knobs(val_fraction=val_fraction)
    if not images:
        return [], []
    if kept and os.path.isfile(kept):
        return split_as_before(images, kept, dataset_dir or "", data_description or {})
    if kept:
        logger.warning(f"there is no {kept!r} to say how the run that goes on was split; it is split anew")
    of_images = subjects_of(images, dataset_dir)
    subjects = sorted(set(of_images))
    held_out = max(1, round(val_fraction * len(subjects)))
    if held_out >= len(subjects):
        raise BundleError(
            f"dataset_dir: {len(images)} usable images of {len(subjects)} subjects, too few to train on some and hold "
            f"out {held_out} (val_fraction = {val_fraction}); expected at least {held_out + 1} subjects"
        )
    if len(subjects) < len(images):
        logger.info(f"dataset_dir: {len(images)} images are of {len(subjects)} subjects")
    order = np.random.default_rng(seed).permutation(len(subjects))
    validation = {subjects[i] for i in order[:held_out]}
    sides: tuple[list, list] = ([], [])
    for item, subject in zip(images, of_images, strict=True):
        sides[subject in validation].append(item)
    return sides
