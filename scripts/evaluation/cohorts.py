"""Folders of volumes of any origin, brought to one grid, as the measures of the evaluation take them."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ignite.distributed as idist
import numpy as np
from tqdm import tqdm

from scripts.running.errors import BundleError
from scripts.scans.brains import with_brains
from scripts.scans.datasets import VolumeDataset
from scripts.scans.find import find_images, stem, volumes_below
from scripts.scans.inspect import readable, shape_of

logger = logging.getLogger(__name__)
REAL, HELD_OUT = "real", "held-out"


@dataclass
class Cohort:
    """One folder of preprocessed volumes.

    Attributes:
        name: "real", "held-out", or the name that the user gave a synthetic folder.
        files: (N) paths, in the order of `volumes`.
        volumes: (N, *spatial) float16 in [-1, 1], RAS, background exactly -1; two or three spatial dims.
        voxel_size: (N, spatial dims) float32 in mm; it differs from volume to volume, since each brain fills its cube.
        label_maps: (N) paths of label maps (integers) of the volumes, "" where there is none; None without any.
        folder: the one that was given, below which folders of classes count.
        notes: what a reader of the report should know, one sentence each.
    """

    name: str
    files: list[str]
    volumes: np.ndarray
    voxel_size: np.ndarray
    label_maps: list[str] | None = None
    folder: str = ""
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.volumes)


@dataclass
class Cohorts:
    """Everything that one evaluation compares.

    Attributes:
        real: the reference, usually what the generator was trained on.
        held_out: real volumes that it has never seen, or None: a yardstick for every measure.
        synthetic: one cohort a generator, in the order given.
    """

    real: Cohort
    held_out: Cohort | None
    synthetic: list[Cohort]

    def __iter__(self) -> Iterator[Cohort]:
        """The real one, the held-out one if there is any, the synthetic ones."""
        yield self.real
        if self.held_out is not None:
            yield self.held_out
        yield from self.synthetic

    def check_one_shape(self) -> None:
        """Raises BundleError where a cohort's volumes have another shape than the real ones."""
        shape = self.real.volumes.shape[1:]
        for cohort in self:
            if cohort.volumes.shape[1:] != shape:
                raise BundleError(
                    f"{cohort.name}: volumes of {cohort.volumes.shape[1:]} voxels were found; expected {shape}, as the "
                    "real ones have"
                )

    @property
    def colours(self) -> dict[str, str]:
        """Matplotlib colours by name: the real cohort black, the held-out one grey, the others tab10 in its order."""
        tab10 = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
        synthetic = {cohort.name: f"tab:{tab10[i % len(tab10)]}" for i, cohort in enumerate(self.synthetic)}
        return {REAL: "black", HELD_OUT: "0.5", self.real.name: "black"} | synthetic


@dataclass
class Source:
    """Where the files of a cohort are: `folder`, and if `files` is not None those of them alone, with their masks."""

    folder: str
    files: list[str] | None = None
    masks: Mapping[str, str] = field(default_factory=dict)


def split_of(real_dir: str) -> dict[str, Any]:
    """The dataset.json of a training run; {} for a folder.

    Returns:
        {"training": [file, ...], "validation": [file, ...], "dataset_dir": folder, "masks": {file: mask},
        "data_description": {knob: value}, ...}

    Raises:
        BundleError: a file that is none.
    """
    if not (real_dir and os.path.isfile(real_dir) and real_dir.endswith(".json")):
        return {}
    try:
        with open(real_dir) as file:
            split = json.load(file)
        sides = {side: list(split[side]) for side in ("training", "validation")}
        kept = {key: dict(split.get(key, {})) for key in ("masks", "data_description")}
        folder = split.get("dataset_dir")
        if not folder:  # versions before 0.5 did not write it
            folder = os.path.commonpath([os.path.dirname(file) for files in sides.values() for file in files])
        return {**split, **sides, **kept, "dataset_dir": folder}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BundleError(
            f"real_dir: {real_dir!r} is not a dataset.json of a training run ({type(e).__name__}: {e}); expected "
            "output/training/dataset.json or a folder of NIfTI volumes"
        ) from e


def preprocessed_as(real_dir: str) -> dict[str, Any]:
    """The knobs of preprocessing that a training run had, by its dataset.json; {} for a folder.

    Raises:
        BundleError: see `split_of`.
    """
    split = split_of(real_dir)
    said = {**split.get("data_description", {}), **split}
    return {key: said[key] for key in ("spatial_shape", "crop_margin", "percentiles") if key in said}


def sources_of(real_dir: str, held_out_dir: str | None, synthetic_dirs: Mapping[str, str] | str) -> dict[str, Source]:
    """{cohort name: where its files are}, in the order of the report.

    Args:
        real_dir: a folder, or the dataset.json that training wrote: its training files are then the real cohort and
            its validation files the held-out one.
        held_out_dir: a folder or None.
        synthetic_dirs: {name: folder}, or one folder, which is then named "synthetic".

    Raises:
        BundleError: a folder that is missing, a name that is taken, no synthetic folder.
    """
    if isinstance(synthetic_dirs, str):
        synthetic_dirs = {"synthetic": synthetic_dirs}
    if not isinstance(synthetic_dirs, Mapping) or not synthetic_dirs:
        raise BundleError(
            f"synthetic_dirs: {synthetic_dirs!r} was given; expected a folder, or names and folders such as "
            "\"{'ours': 'output/samples', 'gan': 'other/samples'}\""
        )
    for name in synthetic_dirs:
        if str(name) in (REAL, HELD_OUT):
            raise BundleError(f"synthetic_dirs: the name {name!r} is taken by a cohort of real volumes; use another")
    keys: dict[str, tuple[str, str | None]] = {REAL: ("real_dir", real_dir)}
    sources: dict[str, Source] = {}
    split = split_of(real_dir)
    if split:
        sides = {REAL: split["training"], HELD_OUT: split["validation"]}
        sources = {name: Source(split["dataset_dir"], files, split["masks"]) for name, files in sides.items()}
        if held_out_dir:
            raise BundleError(f"held_out_dir: {held_out_dir!r} was given, but {real_dir!r} names the held-out files")
        keys = {}
    elif held_out_dir:
        keys[HELD_OUT] = ("held_out_dir", held_out_dir)
    keys |= {str(name): (f"synthetic_dirs[{str(name)!r}]", folder) for name, folder in synthetic_dirs.items()}
    for name, (key, folder) in keys.items():
        if not isinstance(folder, str) or not os.path.isdir(folder):
            raise BundleError(f"{key}: {folder!r}: there is no such folder; expected a folder of NIfTI volumes")
        sources[name] = Source(folder)
    return sources


def matching_label_maps(images: Sequence[str], label_dir: str) -> list[str]:
    """The label map of each image: `x.nii.gz` has x.nii.gz or x_anything.nii.gz below `label_dir`, "" where none is.

    Raises:
        BundleError: no image has a label map, or an image has two.
    """
    if not os.path.isdir(label_dir):
        raise BundleError(f"label_dirs: {label_dir!r}: there is no such folder; expected a folder of label maps")
    maps = volumes_below(label_dir)
    of_stem: dict[str, list[str]] = {}  # each beginning of a name that ends before "_": one look a file, not a product
    for label_map in maps:
        name = stem(label_map)
        for end in {len(name), *(i for i, letter in enumerate(name) if letter == "_")}:
            of_stem.setdefault(name[:end], []).append(label_map)
    matches = [of_stem.get(stem(image), []) for image in images]
    for image, found in zip(images, matches):
        if len(found) > 1:
            raise BundleError(f"label_dirs: {image!r} has {len(found)} label maps, {found}; expected one")
    if images and not any(matches):
        raise BundleError(
            f"label_dirs: none of the {len(maps)} label maps in {label_dir!r} belongs to an image; expected for "
            f"{images[0]!r} a name such as {stem(images[0])}_seg.nii.gz"
        )
    return [found[0] if found else "" for found in matches]


def load_cohort(
    name: str,
    images: Sequence[dict[str, str]],
    folder: str,
    transform: Callable,
    cache_dir: str,
    label_dir: str | None = None,
    num_workers: int = 2,
    spatial_shape: Sequence[int] | None = None,
    transform_on_grid: Callable | None = None,
) -> Cohort:
    """Preprocess the files of one cohort; each result is kept on the disk, so that a stopped run goes on.

    Args:
        images: [{"image": path, "mask": path}, ...], the masks of those that have one.
        folder: see `Cohort`.
        transform: the training's deterministic transforms, an image -> {"image": (1, *spatial), "voxel_size"}.
        cache_dir: folder of the preprocessed volumes.
        label_dir: folder of label maps, or None.
        num_workers: threads.
        spatial_shape, transform_on_grid: where every file of the cohort has that shape already and no mask, these
            transforms are used instead: cropping and resampling a second time would shrink and blur what a generator
            made.
    """
    files = [item["image"] for item in images]
    label_maps = matching_label_maps(files, label_dir) if label_dir else None
    shapes = Counter(map(shape_of, files))
    on_grid = transform_on_grid is not None and spatial_shape is not None and set(shapes) == {tuple(spatial_shape)}
    on_grid = on_grid and not any("mask" in item for item in images)
    used = transform_on_grid if on_grid else transform
    data = VolumeDataset(images, used, cache="disk", cache_dir=cache_dir).volumes
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        items = list(tqdm(pool.map(data.__getitem__, range(len(data))), f"preprocessing {name}", len(data)))
    cohort = Cohort(
        name,
        files,
        np.stack([item["image"][0].numpy().astype(np.float16) for item in items]),
        np.stack([np.asarray(item["voxel_size"], np.float32) for item in items]),
        label_maps,
        folder,
    )
    grid = " x ".join(map(str, cohort.volumes.shape[1:]))
    if on_grid:
        cohort.notes.append(
            f"{name}: files of {grid} voxels, the size that is compared, were not cropped or resampled."
        )
    elif set(shapes) != {cohort.volumes.shape[1:]}:
        found = ", ".join(f"{' x '.join(map(str, s))} ({n})" for s, n in shapes.most_common(5))
        cohort.notes.append(f"{name}: files of {found} voxels were cropped and resampled to {grid}.")
    if label_maps and not all(label_maps):
        cohort.notes.append(f"{name}: {label_maps.count('')} of {len(files)} volumes have no label map.")
    return cohort


def check_enough(counts: Mapping[str, int], places: Mapping[str, str], num_images: int | None = None) -> None:
    """Every cohort has as many volumes as a reader study asks for, or the two that an evaluation needs."""
    least = 2 if num_images is None else num_images
    few = ", ".join(f"{name} has {count} in {places[name]!r}" for name, count in counts.items() if count < least)
    if few and num_images is None:
        raise BundleError(f"volumes: {few}; expected at least 2 usable ones of each")
    if few:
        raise BundleError(
            f"num_images: {num_images} of each source were asked for, but {few}; expected fewer images or more volumes"
        )


def load_cohorts(
    real_dir: str,
    held_out_dir: str | None,
    synthetic_dirs: Mapping[str, str] | str,
    transform: Callable,
    cache_dir: str,
    label_dirs: Mapping[str, str] | None = None,
    max_volumes: int | None = None,
    skip_bad_files: bool = False,
    num_workers: int = 2,
    spatial_shape: Sequence[int] | None = None,
    transform_on_grid: Callable | None = None,
    image_pattern: str | None = None,
    num_images: int | None = None,
    exclude: Sequence[str] = (),
    brain_extraction: bool | str = False,
    mask_dir: str = "",
) -> Cohorts:
    """Check every file of every folder, then bring all to one grid by the training's own preprocessing.

    Args:
        real_dir, held_out_dir, synthetic_dirs: see `sources_of`.
        transform, cache_dir, num_workers, spatial_shape, transform_on_grid: see `load_cohort`.
        label_dirs: {cohort name: folder of label maps}, any of the cohorts.
        max_volumes: only the first so many volumes of each folder (sorted by path); None for all.
        skip_bad_files: warn of files that cannot be used instead of refusing them.
        image_pattern, exclude: which files of `real_dir` and `held_out_dir` are images, see
            `scripts.scans.find.find_images`. An entry of `exclude` must fit a file of `real_dir`.
        num_images: volumes of each cohort that a reader study shows, which has no held-out one; None for an evaluation.
        brain_extraction, mask_dir: of the volumes in these two folders, see `scripts.scans.brains.with_brains`. Those
            of a dataset.json have the masks that they were trained with.

    Raises:
        BundleError: what `sources_of` raises; files that cannot be used; a cohort of too few, see `check_enough`.
    """
    sources = sources_of(real_dir, held_out_dir, synthetic_dirs)
    if num_images is not None:
        sources.pop(HELD_OUT, None)
    unknown = sorted(set(label_dirs or {}) - set(sources))
    if unknown:
        raise BundleError(f"label_dirs: there is no cohort named {unknown[0]!r}; known are {list(sources)}")
    dims = len(spatial_shape or (0, 0, 0))
    images: dict[str, list[dict[str, str]]] = {}
    for name, source in sources.items():
        if source.files is None:
            pattern, left_out = (image_pattern, exclude) if name in (REAL, HELD_OUT) else (None, ())
            images[name] = find_images(source.folder, None, dims, pattern, f"{name} volumes", left_out)[:max_volumes]
        else:
            masks = source.masks
            images[name] = [
                {"image": f} | ({"mask": masks[f]} if f in masks else {}) for f in source.files[:max_volumes]
            ]
    places = {name: source.folder if source.files is None else real_dir for name, source in sources.items()}
    check_enough({name: len(found) for name, found in images.items()}, places, num_images)  # before any is read
    for name, found in images.items():
        checked_path = os.path.join(cache_dir, "checked.json")
        images[name] = readable(found, skip_bad_files, f"{name} volumes", dims, checked_path)
    check_enough({name: len(found) for name, found in images.items()}, places, num_images)
    for name, source in sources.items():
        if name in (REAL, HELD_OUT) and source.files is None and dims == 3:
            images[name] = with_brains(images[name], brain_extraction, mask_dir, f"{name} volumes")
    with idist.one_rank_first():  # it fills the cache
        cohorts = {
            name: load_cohort(
                name,
                found,
                sources[name].folder,
                transform,
                cache_dir,
                (label_dirs or {}).get(name),
                num_workers,
                spatial_shape,
                transform_on_grid,
            )
            for name, found in images.items()
        }
    names = list(cohorts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if np.array_equal(cohorts[first].volumes, cohorts[second].volumes):
                note = f"{first} and {second} hold the same volumes, so every distance between them is zero."
                logger.warning(note)
                cohorts[second].notes.append(note)
    return Cohorts(cohorts.pop(REAL), cohorts.pop(HELD_OUT, None), list(cohorts.values()))
