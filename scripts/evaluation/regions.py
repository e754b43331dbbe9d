"""Label maps of brain regions: the names of their labels, and their volumes."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from scripts.running.errors import BundleError

# The labels of SynthSeg, numbered as in FreeSurfer's FreeSurferColorLUT.txt.
_SIDED = {
    "cerebral white matter": (2, 41),
    "cerebral cortex": (3, 42),
    "lateral ventricle": (4, 43),
    "inferior lateral ventricle": (5, 44),
    "cerebellum white matter": (7, 46),
    "cerebellum cortex": (8, 47),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "accumbens area": (26, 58),
    "ventral DC": (28, 60),
}
FREESURFER = {14: "3rd ventricle", 15: "4th ventricle", 16: "brain-stem", 24: "CSF"} | {
    label: f"{side} {name}" for name, labels in _SIDED.items() for side, label in zip(("left", "right"), labels)
}


def label_volumes(path: str) -> dict[int, float]:
    """{label: mL} of one label map: its voxels times |det| of its affine, which is in mm. 0 is background.

    Raises:
        BundleError: names a file that is no NIfTI image of whole numbers in two or three dimensions.
    """
    try:
        image = nib.load(path)
        labels = np.asarray(image.dataobj)
    except Exception as e:  # nibabel, zlib and numpy each raise their own for a damaged file
        raise BundleError(f"label map {path!r} cannot be read ({e}); a NIfTI image of whole numbers is right") from e
    if labels.dtype.kind not in "biuf":
        raise BundleError(f"label map {path!r} has voxels of type {labels.dtype}; expected whole numbers")
    if labels.ndim < 2 or any(side > 1 for side in labels.shape[3:]):
        raise BundleError(f"label map {path!r} has the shape {labels.shape}; expected two or three dimensions")
    found, counts = np.unique(labels, return_counts=True)
    wrong = found[~(np.isfinite(found) & (found == np.rint(found)))]
    if len(wrong):
        raise BundleError(f"label map {path!r} has the value {wrong[0]:g}; whole numbers (a segmentation) are right")
    ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    if not ml > 0:
        raise BundleError(f"label map {path!r} has an affine of volume {ml:g}; expected one in mm")
    return {int(label): float(count * ml) for label, count in zip(found, counts) if label != 0}
