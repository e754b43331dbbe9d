"""The embedded default dataset: a cohort of random 3D Shepp-Logan head phantoms.

Every subject is the classical phantom - a bright skull around a grey brain with two dark ventricles and a few small
bright spots - in which sizes, positions, rotations and contrasts are drawn from a seed, with one lesion, a smooth bias
field and Rician noise. It lets every workflow of the bundle run before the user's own data are there, and it is made in
a second instead of being shipped.

References:
    [1] L. A. Shepp and B. F. Logan, "The Fourier reconstruction of a head section", IEEE Trans. Nucl. Sci. 21(3), 1974.
    [2] A. C. Kak and M. Slaney, "Principles of Computerized Tomographic Imaging", IEEE Press, 1988, p. 55.
    [3] P. A. Toft, "The Radon Transform: Theory and Implementation", PhD thesis, DTU, 1996, table B.3 (the contrasts).
    [4] M. C. Schabel, "3D Shepp-Logan phantom", MATLAB Central File Exchange 9416, 2006 (the extents along z).
    [5] H. Gudbjartsson and S. Patz, "The Rician distribution of noisy MRI data", Magn. Reson. Med. 34(6), 1995.
"""

from __future__ import annotations

import glob
import gzip
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.running.errors import BundleError
from scripts.scans.find import is_image

__all__ = [
    "Ellipsoid",
    "draw_head",
    "ellipsoid_coverage",
    "phantom_cohort",
    "phantom_labels",
    "second_contrast",
    "shepp_logan_phantom",
]

# Modified 3D Shepp-Logan table: geometry of [2] and [4], contrasts of [3]. One row an ellipsoid:
#   grey value added | semi-axes along x, y, z | centre x, y, z | rotation about z in degrees, counter-clockwise
# Lengths are in head units, +x to the right, +y to the front, +z up (RAS). The 10 degrees that [4] adds to the rotation
# of both ventricles are left out, because they break the near symmetry of [1].
SKULL = (1.0, 0.69, 0.92, 0.81, 0.0, 0.0, 0.0, 0.0)
BRAIN = (-0.8, 0.6624, 0.874, 0.78, 0.0, -0.0184, 0.0, 0.0)
INTERIOR = (
    (-0.2, 0.11, 0.31, 0.22, 0.22, 0.0, 0.0, -18.0),
    (-0.2, 0.16, 0.41, 0.28, -0.22, 0.0, 0.0, 18.0),
    (0.1, 0.21, 0.25, 0.41, 0.0, 0.35, -0.15, 0.0),
    (0.1, 0.046, 0.046, 0.05, 0.0, 0.1, 0.25, 0.0),
    (0.1, 0.046, 0.046, 0.05, 0.0, -0.1, 0.25, 0.0),
    (0.1, 0.046, 0.023, 0.05, -0.08, -0.605, 0.0, 0.0),
    (0.1, 0.023, 0.023, 0.02, 0.0, -0.606, 0.0, 0.0),
    (0.1, 0.023, 0.046, 0.02, 0.06, -0.605, 0.0, 0.0),
)

MIN_SIZE = 16  # voxels; below this the ventricles are no longer two
INT16_SCALE = 1000  # grey value 1.0 in a NIfTI file
PHANTOM_FILE = re.compile(r"phantom_\d{3,}(_dseg|_T2w)?\.nii\.gz")
LABELS = {"skull": 1, "brain": 2, "ventricles": 3}
# A second contrast: fluid and lesions are bright, whatever the lesion is in the first, of which it is no function.
SECOND_SKULL, SECOND_BRAIN = 0.25, 0.45
SECOND_INTERIOR = (0.45, 0.45, -0.15, -0.2, 0.2, 0.2, -0.2, 0.2, 0.35)


@dataclass(frozen=True)
class Ellipsoid:
    """One homogeneous ellipsoid of a head, in head units: half the shortest side of the volume, 96 mm by default.

    Attributes:
        amplitude: grey value that it adds to what lies under it.
        semi_axes: (3,) half lengths along its own three axes, > 0.
        centre: (3,) position; (0, 0, 0) is the middle of the volume.
        rotation: (3, 3) rotation matrix whose columns are its own axes.
    """

    amplitude: float
    semi_axes: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray


@dataclass(frozen=True)
class Person:
    """Whom a phantom is of, which drives its anatomy.

    Attributes:
        age: 20 to 80 years; the ventricles are 0.5 to 1.4 times as long, wide and high as in the table.
        sex: "m", whose head is as large as in the table, or "f", whose head is 0.85 times as large.
    """

    age: float
    sex: str

    @property
    def ventricle_scale(self) -> float:
        return 0.5 + 0.9 * (self.age - 20) / 60

    @property
    def head_scale(self) -> float:
        return 1.0 if self.sex == "m" else 0.85


def draw_person(seed: int, subject: int) -> Person:
    """Age and sex of a subject, each as often as any other."""
    rng = _generator((seed, subject, 1))
    return Person(round(float(rng.uniform(20, 80)), 1), "fm"[int(rng.integers(2))])


def shepp_logan_phantom(
    spatial_shape: Sequence[int], seed: int | Sequence[int], person: Person | None = None
) -> np.ndarray:
    """Draw one random 3D Shepp-Logan head and sample it on a grid of isotropic voxels.

    The head depends on the seed alone, so the same seed on a finer grid is the same head; the noise is drawn voxel by
    voxel. The first axis runs from left to right, the second from back to front, the third upwards (RAS).

    Args:
        spatial_shape: (X, Y, Z), the number of voxels along each axis, 16 or more. The head fits the shortest of them.
        seed: integer(s) >= 0; the same seed gives the same voxels.
        person: whom it is of; None for nobody in particular.

    Returns:
        float32 array of shape (X, Y, Z), grey values in [0, 1], exactly 0 outside the head.

    Raises:
        BundleError: `spatial_shape` is not three whole numbers of 16 or more, or the seed is negative.
    """
    shape = _checked_shape(spatial_shape)
    rng = _generator(seed)
    skull, brain, *interior = draw_head(rng, person)
    bias_weights = rng.uniform(-1.0, 1.0, size=9)
    bias_depth = rng.uniform(0.1, 0.2)
    noise_std = rng.uniform(0.008, 0.016)

    head = ellipsoid_coverage(shape, skull)
    signal = brain.amplitude + sum(part.amplitude * ellipsoid_coverage(shape, part) for part in interior)
    # The interior is seen through the brain, so no draw can put a ventricle or a lesion into the skull.
    signal = skull.amplitude * head + ellipsoid_coverage(shape, brain) * signal
    signal = np.maximum(signal, 0.0) * _bias_field(head > 0, bias_weights, bias_depth)
    # The noise is weighted with the head's coverage: it fades over the edge voxels, and outside all is exactly 0.
    real, imaginary = noise_std * head * rng.standard_normal((2, *shape), dtype=np.float32)
    return np.minimum(np.hypot(signal + real, imaginary), 1.0).astype(np.float32)


def phantom_labels(spatial_shape: Sequence[int], seed: int | Sequence[int], person: Person | None = None) -> np.ndarray:
    """The label map (X, Y, Z) uint8 of `shepp_logan_phantom` with these arguments: `LABELS`, and 0 around the head."""
    shape = _checked_shape(spatial_shape)
    skull, brain, *interior = draw_head(_generator(seed), person)
    head, inside = (ellipsoid_coverage(shape, part) > 0.5 for part in (skull, brain))
    fluid = np.logical_or.reduce([ellipsoid_coverage(shape, part) > 0.5 for part in interior[:2]])
    labels = np.where(inside, np.where(fluid, LABELS["ventricles"], LABELS["brain"]), LABELS["skull"])
    return np.where(head, labels, 0).astype(np.uint8)


def second_contrast(
    spatial_shape: Sequence[int], seed: int | Sequence[int], person: Person | None = None
) -> np.ndarray:
    """The head of `shepp_logan_phantom` with these arguments as another pulse sequence shows it, (X, Y, Z) float32."""
    shape = _checked_shape(spatial_shape)
    skull, brain, *interior = draw_head(_generator(seed), person)
    head = ellipsoid_coverage(shape, skull)
    signal = SECOND_BRAIN - SECOND_SKULL
    signal = signal + sum(grey * ellipsoid_coverage(shape, part) for grey, part in zip(SECOND_INTERIOR, interior))
    signal = np.maximum(SECOND_SKULL * head + ellipsoid_coverage(shape, brain) * signal, 0.02 * head)
    noise = 0.01 * head * _generator((*np.atleast_1d(seed), 2)).standard_normal(shape, dtype=np.float32)
    return np.clip(signal + noise, 0.0, 1.0).astype(np.float32)


def phantom_cohort(
    dataset_dir: str | os.PathLike,
    num_subjects: int = 48,
    spatial_shape: Sequence[int] = (48, 48, 48),
    voxel_size: float = 4.0,
    seed: int = 0,
    people: bool = False,
    images: bool = False,
) -> str:
    """Make sure that a folder holds data to train on: phantoms, unless the user's own volumes are already there.

    Writes `phantom_000.nii.gz`, `phantom_001.nii.gz`, ...: int16, grey values 0 to 1000, background 0, RAS axes with
    the middle of the volume at world 0, sform and qform set. Each file appears whole or not at all, so that several
    processes may call this at once. A file that exists is left as it is, even if it was made with other arguments. A
    folder with any other volume (NIfTI, FreeSurfer), at any depth, is the user's own and nothing is written to it.

    Args:
        dataset_dir: folder of the dataset, made if it does not exist.
        num_subjects: number of phantoms, 1 or more.
        spatial_shape: (X, Y, Z), voxels along each axis, 16 or more.
        voxel_size: edge of the cubic voxels in mm, > 0.
        seed: integer >= 0; subject `i` of the seed is the same head whatever `num_subjects` is.
        people: each phantom is of a person, whose age and sex a BIDS participants.tsv beside the volumes says.
        images: beside `phantom_000.nii.gz` come its label map, `phantom_000_dseg.nii.gz`, and the same head in a second
            contrast, `phantom_000_T2w.nii.gz`.

    Returns:
        `dataset_dir` as a str, so that a config can use the call itself as the name of the folder.

    Raises:
        BundleError: an argument is out of its range, or the folder cannot be written.
    """
    folder = os.fspath(dataset_dir)
    if _holds_user_data(folder):
        return folder
    _check_cohort(num_subjects, voxel_size, seed)
    shape = _checked_shape(spatial_shape)
    kinds = {"": shepp_logan_phantom} | ({"_dseg": phantom_labels, "_T2w": second_contrast} if images else {})
    ids = [(subject, end) for subject in range(num_subjects) for end in kinds]
    names = {(i, end): os.path.join(folder, f"phantom_{i:03d}{end}.nii.gz") for i, end in ids}
    missing = [key for key, path in names.items() if not os.path.exists(path)]
    persons = [draw_person(seed, subject) if people else None for subject in range(num_subjects)]
    if not missing:
        return folder
    try:
        os.makedirs(folder, exist_ok=True)
        if people:
            rows = [f"phantom_{i:03d}\t{person.age}\t{person.sex}\n" for i, person in enumerate(persons)]
            _write_atomically(
                os.path.join(folder, "participants.tsv"), "".join(["participant_id\tage\tsex\n", *rows]).encode()
            )
        for subject, end in tqdm(missing, desc="phantoms", unit="volume"):
            image = _nifti(kinds[end](shape, (seed, subject), persons[subject]), voxel_size)
            image.header["descrip"] = f"Shepp-Logan phantom, seed {seed}, subject {subject}"
            _write_atomically(names[subject, end], gzip.compress(image.to_bytes(), 6, mtime=0))
    except OSError as error:
        raise BundleError(
            f"dataset_dir: the phantoms cannot be written to the folder {folder} ({error.strerror or error});"
            " it must be a folder that can be written, or one that holds your own volumes"
        ) from error
    return folder


def draw_head(rng: np.random.Generator, person: Person | None = None) -> list[Ellipsoid]:
    """Draw the ellipsoids of one head: the Shepp-Logan table, jittered, and one lesion.

    All draws are bounded, so the head never leaves the volume. Skull and small spots are drawn thicker than in the
    table, where they measure less than one voxel of a 48^3 grid; the brain is brighter, so that a ventricle is not as
    dark as the background, and the contrasts within it are 1 to 1.4 times (spots 1.6 to 2.2 times) those of the table.

    Args:
        rng: source of all the draws.
        person: scales the head and the ventricles; no draw depends on it.

    Returns:
        skull, brain, the eight interior ellipsoids of the table in its order, lesion: 11 in all.
    """
    stretch = rng.uniform(0.93, 1.0, size=3) * (person.head_scale if person else 1.0)
    shift = rng.uniform(-0.02, 0.02, size=3)
    tilt = _rotation(rng.uniform(-5.0, 5.0, size=3))
    skull_semi_axes, skull_centre = np.array(SKULL[1:4]), np.array(SKULL[4:7])
    bone = rng.uniform(1.8, 2.6) * (skull_semi_axes - np.array(BRAIN[1:4]))
    skull_grey, brain_grey = rng.uniform(0.85, 0.95), rng.uniform(0.3, 0.4)
    upright = [
        Ellipsoid(skull_grey, skull_semi_axes, skull_centre, np.eye(3)),
        Ellipsoid(brain_grey - skull_grey, skull_semi_axes - bone, np.array(BRAIN[4:7]), np.eye(3)),
        *(_jittered(row, rng) for row in INTERIOR),
        _lesion(rng),
    ]
    if person:
        upright[2:4] = [replace(p, semi_axes=person.ventricle_scale * p.semi_axes) for p in upright[2:4]]
    return [
        Ellipsoid(
            part.amplitude, stretch * part.semi_axes, shift + tilt @ (stretch * part.centre), tilt @ part.rotation
        )
        for part in upright
    ]


def ellipsoid_coverage(spatial_shape: Sequence[int], ellipsoid: Ellipsoid) -> np.ndarray:
    """How much of each voxel an ellipsoid fills, with a linear edge one voxel wide (anti-aliasing).

    With p = R^T (x - centre) / semi_axes, the distance of x from the surface |p| = 1 is to first order
    d = |p| (|p| - 1) / |p / semi_axes|, which is exact for a sphere; the coverage is 0.5 - d, d in voxels, cut to
    [0, 1].

    Args:
        spatial_shape: (X, Y, Z), voxels along each axis.
        ellipsoid: what to sample; its amplitude does not count.

    Returns:
        float32 array of shape (X, Y, Z) with values in [0, 1]; exactly 0 outside and exactly 1 inside the edge.
    """
    half_side = min(spatial_shape) / 2  # voxels in one head unit
    x, y, z = (
        ((np.arange(size) - (size - 1) / 2) / half_side - middle).astype(np.float32)
        for size, middle in zip(spatial_shape, ellipsoid.centre)
    )
    squared_norm = squared_gradient = np.float32(1e-12)  # not 0, so that the middle of the ellipsoid is no 0 / 0
    for axis, length in zip(ellipsoid.rotation.T.astype(np.float32), ellipsoid.semi_axes.astype(np.float32)):
        squared = ((axis[0] * x)[:, None, None] + (axis[1] * y)[:, None] + axis[2] * z) ** 2 / length**2
        squared_norm = squared_norm + squared
        squared_gradient = squared_gradient + squared / length**2
    norm = np.sqrt(squared_norm)
    distance = norm * (norm - 1) / np.sqrt(squared_gradient)
    return np.clip(0.5 - half_side * distance, 0.0, 1.0)


def _jittered(row: Sequence[float], rng: np.random.Generator) -> Ellipsoid:
    """Vary one interior row of the table: size by 12 %, place by 0.025 head units, rotation by 7 degrees, contrast."""
    small = min(row[1:4]) < 0.1  # a spot, which would be lost between the voxels of a small grid
    contrast = row[0] * rng.uniform(1.0, 1.4) * (1.6 if small else 1.0)
    semi_axes = np.array(row[1:4]) * rng.uniform(0.88, 1.12, size=3) * (1.5 if small else 1.0)
    centre = np.array(row[4:7]) + rng.uniform(-0.025, 0.025, size=3)
    angles = rng.uniform(-7.0, 7.0, size=3) + (0.0, 0.0, row[7])
    return Ellipsoid(contrast, semi_axes, centre, _rotation(angles))


def _lesion(rng: np.random.Generator) -> Ellipsoid:
    """A small ellipsoid anywhere in the inner 70 % of the brain, bright or dark (then a ventricle may hide it)."""
    contrast = rng.uniform(0.25, 0.4) if rng.random() < 0.5 else rng.uniform(-0.26, -0.16)
    semi_axes = rng.uniform(0.06, 0.12, size=3)
    direction = rng.standard_normal(3)
    radius = 0.7 * np.cbrt(rng.random())  # the cube root makes the place uniform in volume
    centre = radius * direction / np.linalg.norm(direction) * np.array(BRAIN[1:4])
    return Ellipsoid(contrast, semi_axes, centre, _rotation(rng.uniform(-90.0, 90.0, size=3)))


def _rotation(angles: Sequence[float]) -> np.ndarray:
    """(3, 3) matrix that turns about x, then y, then z, by angles in degrees, counter-clockwise."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _bias_field(head: np.ndarray, weights: np.ndarray, depth: float) -> np.ndarray:
    """A smooth field in [1 - depth, 1] over the head: the quadratic polynomial with 9 weights (x, y, z, xx, xy, ...).

    It only ever darkens, as a surface coil does, so that the grey values stay below 1.
    """
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, size, dtype=np.float32) for size in head.shape), indexing="ij", sparse=True
    )
    terms = (x, y, z, x * x, x * y, x * z, y * y, y * z, z * z)
    field = sum(np.float32(weight) * term for weight, term in zip(weights, terms))
    low, high = field[head].min(), field[head].max()
    return 1 - np.float32(depth) * (high - field) / (high - low)


def _nifti(phantom: np.ndarray, voxel_size: float) -> nib.Nifti1Image:
    """(X, Y, Z) grey values in [0, 1], as int16 0 to 1000, or labels; RAS, `voxel_size` in mm, middle at world 0."""
    affine = np.diag([voxel_size, voxel_size, voxel_size, 1.0])
    affine[:3, 3] = -voxel_size * (np.array(phantom.shape) - 1) / 2
    image = nib.Nifti1Image(phantom if phantom.dtype == np.uint8 else np.int16(np.rint(INT16_SCALE * phantom)), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    return image


def _write_atomically(path: str, content: bytes) -> None:
    """Write under a hidden name that no search for NIfTI files finds, then rename it within the same folder."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _holds_user_data(folder: str) -> bool:
    """Whether there is a volume, at any depth, that is not one of the phantoms."""
    return any(
        is_image(name) and not PHANTOM_FILE.fullmatch(name)
        for name in glob.iglob("**", root_dir=folder, recursive=True)
    )


def _generator(seed: int | Sequence[int]) -> np.random.Generator:
    """A generator for the seed(s), or a sentence about the seed; None, which numpy would take, is no seed."""
    seeds = np.atleast_1d(seed)
    if seeds.dtype.kind not in "iu" or (seeds < 0).any():
        raise BundleError(f"seed: {seed!r} was given; it must be a whole number of 0 or more")
    return np.random.default_rng(seeds.tolist())


def _checked_shape(spatial_shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape as a tuple of int, or a sentence about it."""
    shape = np.atleast_1d(spatial_shape)
    if shape.shape != (3,) or shape.dtype.kind not in "iu" or shape.min() < MIN_SIZE:
        raise BundleError(
            f"spatial_shape: {spatial_shape!r} was given; a phantom needs three whole numbers of {MIN_SIZE} or more"
        )
    return tuple(shape.tolist())


def _check_cohort(num_subjects: int, voxel_size: float, seed: int) -> None:
    """A sentence about the first argument that is out of its range, before anything is written."""
    if not isinstance(num_subjects, int) or num_subjects < 1:
        raise BundleError(f"num_subjects: {num_subjects!r} was given; it must be a whole number above 0")
    if not isinstance(voxel_size, (int, float)) or not 0 < voxel_size < float("inf"):
        raise BundleError(f"voxel_size: {voxel_size!r} was given; it must be a length in mm above 0")
    _generator(seed)
