"""What stands out among the brains of a training: size, pose, contrast, and likeness to the mean of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from scripts.running.errors import BundleError
from scripts.scans.brains import brain_in, millilitres

# optional, see scripts/scans/brains.py
ndimage, _ = optional_import("scipy.ndimage")
minimize, _ = optional_import("scipy.optimize", name="minimize")
COARSE = 4.0  # mm; so large are the voxels on which pose and likeness are measured
SIDE = 24  # voxels of the cube in which brains are compared
FAR = 5.0  # standard deviations, as the median absolute deviation of a normal distribution gives them


@dataclass
class Quantity:
    """A column of the table.

    Attributes:
        name: of the column, with its unit.
        words: how a sentence calls it.
        form: how a sentence writes a value.
        least: deviations from the median that are smaller are nothing to mention, however alike all others are.
        below: only values below the median stand out.
    """

    name: str
    words: str
    form: str
    least: float
    below: bool = False


QUANTITIES = (
    Quantity("volume_mL", "a volume of", "{:.0f} mL", 250),
    Quantity("right_left_mm", "an extent from right to left of", "{:.0f} mm", 15),
    Quantity("front_back_mm", "an extent from front to back of", "{:.0f} mm", 20),
    Quantity("up_down_mm", "an extent from top to bottom of", "{:.0f} mm", 20),
    Quantity("pitch_deg", "a nodding tilt of", "{:.0f} degrees", 12),
    Quantity("roll_deg", "a sideways tilt of", "{:.0f} degrees", 10),
    Quantity("yaw_deg", "a turn to the side of", "{:.0f} degrees", 10),
    Quantity("intensity", "a typical intensity of", "{:.2f}", 0.15),
    Quantity("likeness", "a correlation with the mean of all of", "{:.2f}", 0.15, below=True),
)


@dataclass
class Brain:
    """What is measured of one scan.

    Attributes:
        values: of QUANTITIES but the last, which needs all scans.
        cube: (24, 24, 24) float32, the brain in its box, 0 to 1 between its percentiles, 0 outside.
        slices: three (rows, columns) uint8 of the scan, sagittal, coronal and axial through the middle of the brain, up
            is superior or anterior and left is left, 2 mm a pixel.
        outlines: three (rows, columns) bool, the rim of the brain in them.
    """

    values: list[float]
    cube: np.ndarray
    slices: list[np.ndarray]
    outlines: list[np.ndarray]


def box_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last index (3,) of what a mask holds along each axis."""
    inside = [np.flatnonzero(mask.any(tuple(set(range(3)) - {axis}))) for axis in range(3)]
    return np.array([i[0] for i in inside]), np.array([i[-1] for i in inside])


def block_means(image: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """The means of blocks of so many voxels along each axis; what is left over at the ends is cut off."""
    blocks = [side // factor for side, factor in zip(image.shape, factors, strict=True)]
    image = image[tuple(slice(n * f) for n, f in zip(blocks, factors, strict=True))]
    return image.reshape([side for pair in zip(blocks, factors, strict=True) for side in pair]).mean((1, 3, 5))


def asymmetry(pose: Sequence[float], image: np.ndarray, spacing: np.ndarray, points: np.ndarray) -> float:
    """One minus the correlation of a brain with its mirror image.

    Args:
        pose: roll and yaw of the mirror in radians, and its distance from the centre in mm.
        image: (X, Y, Z), RAS, 0 outside of the brain.
        spacing: (3,) mm.
        points: (N, 3) in mm, where it is compared.
    """
    roll, yaw, distance = pose
    normal = np.array([np.cos(roll) * np.cos(yaw), np.cos(roll) * np.sin(yaw), np.sin(roll)])
    centre = points.mean(0)
    mirrored = points - 2 * (((points - centre) @ normal) - distance)[:, None] * normal
    pair = [ndimage.map_coordinates(image, (at / spacing).T, order=1) for at in (points, mirrored)]
    return 1 - float(np.corrcoef(*pair)[0, 1])


def tilts(image: np.ndarray, mask: np.ndarray, spacing: np.ndarray) -> list[float]:
    """[pitch, roll, yaw] of a brain in degrees.

    Pitch is the direction of the longest axis of its side view, upwards in front; roll and yaw are those of the plane
    in which it is most like its mirror image (within 30 degrees).
    """
    points = np.argwhere(mask) * spacing
    cov = np.cov(points.T)
    pitch = 0.5 * np.arctan2(2 * cov[1, 2], cov[1, 1] - cov[2, 2])
    points = points[:: max(1, len(points) // 3000)]
    # between voxels: on them nothing is interpolated, and the pose of the grid would seem the most symmetric one
    points = points + np.random.default_rng(0).uniform(-0.5, 0.5, points.shape) * spacing
    measure = partial(asymmetry, image=image, spacing=spacing, points=points)
    starts = [(roll, yaw, 0.0) for roll in (-0.3, 0, 0.3) for yaw in (-0.3, 0, 0.3)]
    simplex = np.array([[0, 0, 0], [0.15, 0, 0], [0, 0.15, 0], [0, 0, 4]])
    first = np.array(min(starts, key=measure))
    options = {"initial_simplex": first + simplex, "maxiter": 60, "xatol": 0.005, "fatol": 1e-4}
    roll, yaw, _ = minimize(measure, first, method="Nelder-Mead", options=options).x
    return np.degrees([pitch, roll, yaw]).tolist()


def in_box(image: np.ndarray, mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """A brain in the smallest cube around it, sampled at 24 x 24 x 24 places."""
    first, last = box_of(mask)
    half = ((last - first + 1) * spacing).max() / 2
    steps = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    axes = [((first[i] + last[i]) / 2 * spacing[i] + half * steps) / spacing[i] for i in range(3)]
    return ndimage.map_coordinates(image, np.meshgrid(*axes, indexing="ij"), order=1).astype(np.float32)


def views(shades: np.ndarray, mask: np.ndarray, spacing: np.ndarray, rows: int, mm: float) -> tuple[list, list]:
    """`slices` and `outlines` of a `Brain`, of rows x rows pixels of `mm`, around the middle of its box.

    Args:
        shades: (X, Y, Z), the scan; what is below 0 is black and what is above 1 white.
    """
    first, last = box_of(mask)
    middle = (first + last) / 2
    steps = (np.arange(rows) - (rows - 1) / 2) * mm
    slices, outlines = [], []
    for axis in range(3):
        across, up = (i for i in range(3) if i != axis)
        places = np.empty((3, rows, rows))
        places[axis] = round(middle[axis])
        places[across] = (middle[across] + steps / spacing[across])[None, :]
        places[up] = (middle[up] + steps / spacing[up])[::-1, None]
        cut = ndimage.map_coordinates(shades, places, order=1, output=np.float32)
        slices.append((np.clip(cut, 0, 1) * 255).astype(np.uint8))
        inside = ndimage.map_coordinates(mask.astype(np.uint8), places, order=0).astype(bool)
        inner = inside.copy()
        for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            inner &= np.roll(inside, shift, (0, 1))
        outlines.append(inside & ~inner)
    return slices, outlines


def measured(item: dict[str, str], rows: int = 112, mm: float = 2.0) -> Brain:
    """Measure one scan, with its "mask" if it has one, as training takes it.

    Raises:
        BundleError: names a file without foreground.
    """
    voxels, mask, affine = brain_in(item)
    ras = [nib.as_closest_canonical(nib.Nifti1Image(each, affine)) for each in (np.float32(voxels), np.uint8(mask))]
    image, mask = np.asarray(ras[0].dataobj), np.asarray(ras[1].dataobj) > 0
    if not mask.any() or image[mask].min() == image[mask].max():
        raise BundleError(f"{item['image']!r} has no foreground; expected an image")
    spacing = np.linalg.norm(ras[0].affine[:3, :3], axis=0)
    first, last = box_of(mask)
    low, high = np.percentile(image[mask], [0.5, 99.5])
    shades = (image - low) / max(high - low, 1e-6)
    slices, outlines = views(shades, mask, spacing, rows, mm)
    inside = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))
    scaled = np.clip(shades[inside], 0, 1) * mask[inside]
    factors = np.maximum(1, np.round(COARSE / spacing).astype(int))
    factors = np.minimum(factors, scaled.shape)
    coarse, coarse_mask = block_means(scaled, factors), block_means(mask[inside].astype(np.float32), factors) > 0.5
    size = spacing * factors
    values = [
        millilitres(mask, ras[0].affine),
        *((last - first + 1) * spacing).tolist(),
        *tilts(coarse, coarse_mask, size),
        float(np.median(scaled[mask[inside]])),
    ]
    return Brain(values, in_box(coarse, coarse_mask, size), slices, outlines)


def likeness(cubes: np.ndarray) -> np.ndarray:
    """The correlation of each brain (N, 24, 24, 24) with the mean of all, in the voxels that most brains fill: (N)."""
    mean = cubes.mean(0)
    common = (cubes > 0).mean(0) > 0.5
    return np.array([np.corrcoef(cube[common], mean[common])[0, 1] for cube in cubes])


def table_of(brains: Sequence[Brain]) -> np.ndarray:
    """The values of all QUANTITIES: (scans, quantities)."""
    return np.column_stack([np.array([b.values for b in brains]), likeness(np.stack([b.cube for b in brains]))])


def outliers(values: np.ndarray) -> dict[int, str]:
    """{row: what stands out in it, as half a sentence}, those that stand out most first.

    A value stands out where it lies further from the median of all than 5 standard deviations (1.4826 times the median
    absolute deviation), and than the least that is worth a sentence, see `Quantity`.

    Args:
        values: (scans, quantities), see `table_of`.
    """
    middle = np.median(values, 0)
    spread = np.maximum(1.4826 * np.median(np.abs(values - middle), 0), 1e-9)
    found: dict[int, list[tuple[float, str]]] = {}
    for row, line in enumerate(values):
        for column, quantity in enumerate(QUANTITIES):
            apart = line[column] - middle[column]
            far = -apart if quantity.below else abs(apart)
            if far > max(quantity.least, FAR * spread[column]):
                value, usual = (quantity.form.format(x) for x in (line[column], middle[column]))
                words = f"{quantity.words} {value} (median {usual})"
                found.setdefault(row, []).append((far / max(spread[column], quantity.least / FAR), words))
    order = sorted(found, key=lambda row: -max(found[row])[0])
    return {row: ", ".join(words for _, words in sorted(found[row], reverse=True)) for row in order}
