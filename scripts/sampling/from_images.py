"""Volumes made from images: a brain for a label map, another contrast, or thin slices for thick ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch

from scripts.diffusion.sampler import DiffusionSampler
from scripts.running.condition_images import ConditionImage
from scripts.running.errors import BundleError
from scripts.running.pictures import mosaic, save_png, triplanar
from scripts.sampling.shown import Shown
from scripts.sampling.volumes import save_nifti, write_nifti
from scripts.scans.find import NO_IMAGE, stem, volumes_below
from scripts.scans.inspect import problem_of_grid

logger = logging.getLogger(__name__)


def images_in(condition_dir: str | None, known: Sequence[ConditionImage]) -> dict[str, dict[str, str]]:
    """{name of a subject: {name of a condition image: path}}: files whose names differ in their ends alone are of one.

    Raises:
        BundleError: weights that are shown nothing; no folder, no such files; a subject who lacks one, or has two of
            different grids.
    """
    if not known:
        raise BundleError(
            "condition_dir: these weights were not trained with condition_images; expected ones that were"
        )
    ends = {each["name"]: each["suffix"] for each in known}
    said = ", ".join(f"{name} (*{end}.nii.gz)" for name, end in ends.items())
    if not condition_dir:
        raise BundleError(f"condition_dir: nothing was given; expected a folder with {said}")
    found: dict[str, dict[str, str]] = {}
    # longest first, since "" ends every name
    by_length = sorted(ends, key=lambda name: -len(ends[name]))
    for path in volumes_below(condition_dir):
        name = next((name for name in by_length if stem(path).endswith(ends[name])), None)
        if name is not None and (ends[name] or not NO_IMAGE.search(stem(path))):
            subject = os.path.relpath(path, condition_dir).removesuffix(os.path.basename(path))
            subject += stem(path).removesuffix(ends[name])
            found.setdefault(subject, {})[name] = path
    if not found:
        raise BundleError(f"condition_dir: {condition_dir!r} holds none; expected {said}")
    for subject, paths in found.items():
        if missing := [name for name in ends if name not in paths]:
            raise BundleError(f"condition_dir: {subject!r} lacks {missing}; expected {said}")
        first, *others = paths.values()
        for other in others:
            if problem := problem_of_grid(first, other):
                raise BundleError(f"condition_dir: {other!r} {problem.replace('its image', repr(first))}")
    return found


def shown_as_one(image: torch.Tensor, known: Sequence[ConditionImage]) -> np.ndarray:
    """A picture of the first condition image: labels as shades of grey, (*spatial) from -1 to 1."""
    labels = len(known[0].get("labels", ()))
    if not labels:
        return image[0].numpy()
    shades = torch.linspace(-1, 1, labels + 1)[1:].reshape(-1, *[1] * (image.ndim - 1))
    return torch.where(image[:labels] > 0, shades, -1.0).amax(0).numpy()


def sample_from_images(
    sampler: DiffusionSampler,
    condition_dir: str | None,
    known: Sequence[ConditionImage],
    transforms: Sequence[Callable],
    noise: Callable[[int, int], torch.Tensor],
    requests: Sequence[Mapping[str, Any]],
    postprocessing: Callable,
    output_dir: str,
    seed: int = 0,
) -> list[str]:
    """Write volumes for each subject of a folder, on the grid of its images, and a picture with a row a subject.

    Thick slices are divided into as many as the network's voxels are thin. Beside each volume lie the label maps that
    it was made from, so that a network for segmentation can be trained on the pairs.

    Args:
        sampler, postprocessing: see `Shown.sample`.
        condition_dir, known: see `images_in` and `scripts.running.condition_images`.
        transforms: the training's deterministic ones.
        noise: (seed, volume) -> (1, *spatial).
        requests: the volumes of each subject, see `scripts.diffusion.asked.requests`.
        output_dir: gets <subject>_seed0_volume000.nii.gz (float32, 0 to 255), the label maps and from_images.png.

    Returns:
        the paths of the volumes.

    Raises:
        BundleError: what `images_in` and `Shown` raise.
    """
    subjects = images_in(condition_dir, known)
    every = {subject: Shown(paths, known, transforms) for subject, paths in subjects.items()}
    written, strips, rows = [], [], []
    for row, (subject, paths) in enumerate(subjects.items()):
        shown = every[subject]
        strips.append(triplanar(shown_as_one(shown.image, known)))
        rows.append(row)
        for request in requests:
            volume = request["image"]
            voxels, result = shown.sample(sampler, noise(seed, volume), request["condition"], postprocessing)
            base = os.path.join(output_dir, f"{subject}_seed{seed}_volume{volume:03d}{request['suffix']}")
            os.makedirs(os.path.dirname(base), exist_ok=True)
            description = f"synthetic, brain_mri_ddpm_3d, seed {seed}, volume {volume}"
            save_nifti(voxels, shown.affine, base + ".nii.gz", description)
            for each in known:
                if "labels" in each:
                    write_nifti(nib.load(paths[each["name"]]), base + each["suffix"] + ".nii.gz")
            logger.info(f"wrote {base}.nii.gz")
            written.append(base + ".nii.gz")
            strips.append(triplanar(result))
            rows.append(row)
    save_png(mosaic(strips, labels=rows), os.path.join(output_dir, "from_images.png"), -1, 1)
    return written
