"""Diversity of a cohort: multi-scale structural similarity (MS-SSIM) of pairs of volumes, by three protocols.

With local means F[.] by a Gaussian window of sigma 1.5, a pair (x, y) has at each scale the maps

    cs = (2 (F[xy] - F[x] F[y]) + C2) / (F[x^2] - F[x]^2 + F[y^2] - F[y]^2 + C2)
    l  = (2 F[x] F[y] + C1) / (F[x]^2 + F[y]^2 + C1),        ssim = l cs,

each scale is the 2 x 2 (x 2) average pooling of the one before, and MS-SSIM is the product over the scales of the mean
of cs, or of ssim at the last scale, to the power of the scale's exponent.

| protocol   | window                                     | C1, C2 for [-1, 1] | exponents                           |
| ---------- | ------------------------------------------ | ------------------ | ----------------------------------- |
| `kwon2019` | SciPy's: 13 voxels, reflected borders      | 0.01^2, 0.03^2     | w_1 ... w_4, 4 w_5 [1], as in [2]   |
| `wang2003` | as `kwon2019`                              | 0.01^2, 0.03^2     | w_1 ... w_5 [3]                     |
| `monai`    | up to 11 voxels, only where it fits inside | 0.02^2, 0.06^2     | w_1 ... w_5, fewer on small volumes |

w = 0.0448, 0.2856, 0.3001, 0.2363, 0.1333. The code behind [1] multiplies ssim_5^w_5 into each of the four factors, so
it enters with 4 w_5. A mean below zero (two volumes that are opposites) has no real power: the code of [1] returns nan
there; here it counts as 0 in every protocol, as it does in MONAI, and `Diversity` says how many pairs that concerns.

    [1] G. Kwon et al., "Generation of 3D brain MRI using auto-encoding generative adversarial networks", MICCAI 2019;
        github.com/cyclomon/3dbraingen, `msssim_3d`.
    [2] Z. Dorjsembe et al., "Three-dimensional medical image synthesis with denoising diffusion probabilistic models",
        MIDL 2022.
    [3] Z. Wang et al., "Multiscale structural similarity for image quality assessment", Asilomar 2003, eq. 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import ignite.distributed as idist
import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

from scripts.running.errors import BundleError
from scripts.running.processes import gathered

PROTOCOLS = ("kwon2019", "wang2003", "monai")
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # table 1 of [3]
SIGMA = 1.5  # voxels, of the window at every scale
SCIPY_KERNEL = 13  # scipy.ndimage.gaussian_filter cuts the window at 4 sigma
ALIKE = 0.99  # the row says how many pairs are above it: copies, which a mean alone may hide
SINGLE_PRECISION_FROM = 32**3  # voxels of a scale; see Maps


@dataclass(frozen=True)
class Window:
    """What the maps depend on: protocols with the same window share them.

    Attributes:
        kernel_size: voxels along each side of the Gaussian window.
        cropped: maps only where the window lies inside the volume (MONAI); otherwise borders are reflected (SciPy).
        c1, c2: stability constants of luminance and contrast.
        num_scales: each half the size of the one before.
    """

    kernel_size: int
    cropped: bool
    c1: float
    c2: float
    num_scales: int


@dataclass(frozen=True)
class Protocol:
    """A window, the exponents of the scales, and a description for reports."""

    window: Window
    exponents: tuple[float, ...]
    note: str


def protocol_for(name: str, spatial_shape: Sequence[int]) -> Protocol:
    """The protocol of that name, one of PROTOCOLS, for volumes of that shape (2 or 3 sides).

    `monai` takes the largest odd kernel up to 11 that `MultiScaleSSIMMetric` accepts with five scales; where not even
    kernel 3 fits, it takes the most scales that it accepts (at least two), with the weights scaled to sum to 1.

    Raises:
        BundleError: the name is unknown or a side too short: `kwon2019` and `wang2003` need 16 voxels (the fifth scale
            has one voxel then; the code of [1] pools once more for nothing, so it stops below 32), `monai` needs 6.
    """
    if name not in PROTOCOLS:
        raise BundleError(f"protocols: {name!r} is unknown; it must be one of {PROTOCOLS}")
    side, least = min(spatial_shape), 6 if name == "monai" else 16
    if len(spatial_shape) not in (2, 3) or side < least:
        raise BundleError(
            f"MS-SSIM by the protocol {name!r}: the volumes have the shape {tuple(spatial_shape)}; it must have two or "
            f"three sides of {least} voxels or more"
        )
    if name == "kwon2019":
        exponents = (*WEIGHTS[:4], 4 * WEIGHTS[4])
    else:
        exponents = WEIGHTS
    if name != "monai":
        note = f"sigma {SIGMA}, reflected borders, 5 scales"
        return Protocol(Window(SCIPY_KERNEL, False, 0.01**2, 0.03**2, 5), exponents, note)
    num_scales, kernel = next((n, k) for n in (5, 4, 3, 2) for k in (11, 9, 7, 5, 3) if _monai_accepts(side, n, k))
    exponents = tuple(w / sum(WEIGHTS[:num_scales]) for w in WEIGHTS[:num_scales]) if num_scales < 5 else WEIGHTS
    weights = ", ".join(f"{w:.4f}" for w in exponents)
    note = f"kernel {kernel}, sigma {SIGMA}, {num_scales} scales, weights {weights}, data range 2"
    return Protocol(Window(kernel, True, (0.01 * 2) ** 2, (0.03 * 2) ** 2, num_scales), exponents, note)


def _monai_accepts(side: int, num_scales: int, kernel: int) -> bool:
    """MONAI's own check (it squares the number of poolings), and that the kernel fits the last scale too."""
    return side // (num_scales - 1) ** 2 > kernel - 1 and side // 2 ** (num_scales - 1) >= kernel


def random_pairs(n: int, num_pairs: int, seed: int = 0) -> np.ndarray:
    """`num_pairs` distinct unordered pairs i < j < n, drawn without replacement; all n (n - 1) / 2 if that is fewer.

    Returns:
        (P, 2) int64, sorted.
    """
    total = n * (n - 1) // 2
    if num_pairs >= total:
        number = np.arange(total)
    else:
        number = np.random.default_rng(seed).choice(total, num_pairs, replace=False)
    # Pair (i, j) has the number j (j - 1) / 2 + i; the root may be off by one where it is rounded.
    j = ((1 + np.sqrt(1 + 8 * number.astype(float))) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > number
    j += j * (j + 1) // 2 <= number
    pairs = np.stack([number - j * (j - 1) // 2, j], 1)
    return pairs[np.lexsort(pairs.T[::-1])]


def ms_ssim_pairs(
    first: np.ndarray,
    second: np.ndarray | None,
    pairs: np.ndarray,
    protocol: str = "kwon2019",
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
    memory: float = 4.0,
    description: str | None = None,
) -> np.ndarray:
    """MS-SSIM of the pairs (first[i], second[j]); see `scale_terms` for the arguments and `combine` for the powers.

    Returns:
        (P) float64; 1 for identical volumes.
    """
    terms = scale_terms(first, second, pairs, protocol, device, batch_size, memory, description)
    return combine(terms, protocol, first.shape[1:])


def combine(terms: np.ndarray, protocol: str, spatial_shape: Sequence[int]) -> np.ndarray:
    """(P, scales) means, as `scale_terms` returns them -> (P) MS-SSIM; a mean below 0 counts as 0."""
    return np.prod(np.maximum(terms, 0) ** np.array(protocol_for(protocol, spatial_shape).exponents), axis=1)


def scale_terms(
    first: np.ndarray,
    second: np.ndarray | None,
    pairs: np.ndarray,
    protocol: str = "kwon2019",
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
    memory: float = 4.0,
    description: str | None = None,
) -> np.ndarray:
    """The mean of cs at every scale but the last, and that of ssim at the last, for each pair.

    What depends on one volume alone (its scales, F[x] and F[x^2]) is computed once a volume, and once more a block
    where the maps of all volumes would not fit `memory`: then the pairs are taken block of volumes by block of volumes.
    Several processes share the pairs out, and all get the terms of all: each must call this.

    Args:
        first: (N, *spatial) float in [-1, 1], two or three spatial dims.
        second: (M, *spatial), or None for the volumes of `first`.
        pairs: (P, 2) integers, i in `first` and j in `second`.
        protocol: one of PROTOCOLS.
        device: where to compute.
        batch_size: pairs filtered at once; None for one on a CPU, whose cache a pair fills, and 16 elsewhere.
        memory: GiB of maps that may be held on the device at once; a volume takes about 14 bytes a voxel (28 if it
            has fewer than SINGLE_PRECISION_FROM), and two volumes are always held.
        description: of the progress bar; None for no bar.

    Returns:
        (P, scales) float64 in the order of `pairs`.

    Raises:
        BundleError: shapes differ or are too small, a pair is out of range, or the protocol is unknown.
    """
    arrays = (first, first if second is None else second)
    pairs = np.asarray(pairs)
    _check_pairs(arrays, pairs)
    window = protocol_for(protocol, first.shape[1:]).window
    device = torch.device(device)
    batch_size = batch_size or (1 if device.type == "cpu" else 16)
    # neighbours share volumes, so each process takes one stretch of them
    own_pairs = np.array_split(pairs, idist.get_world_size())[idist.get_rank()]
    return np.concatenate(gathered(_terms_of(arrays, own_pairs, window, device, batch_size, memory, description)))


def _terms_of(
    arrays: tuple[np.ndarray, np.ndarray],
    pairs: np.ndarray,
    window: Window,
    device: torch.device,
    batch_size: int,
    memory: float,
    description: str | None,
) -> np.ndarray:
    """`scale_terms` of the pairs of this process."""
    first = arrays[0]
    filters = _filters(first.shape[1:], window, device)
    # One number a volume: those of a second array follow those of the first.
    numbers = pairs.astype(np.int64) + np.array([0, 0 if arrays[1] is first else len(first)])
    # Three maps a volume at every scale, none larger than the scale itself.
    sides = [[side // 2**scale for side in first.shape[1:]] for scale in range(window.num_scales)]
    bytes_per_volume = sum(3 * np.prod(s) * matrices[0].element_size() for s, matrices in zip(sides, filters))
    capacity = max(2, int(memory * 2**30 / bytes_per_volume))

    terms = np.empty((len(pairs), window.num_scales))
    kept_maps: dict[int, list[Maps]] = {}
    with _full_precision(), torch.inference_mode(), tqdm(
        total=len(pairs), desc=description, unit="pair", disable=description is None
    ) as bar:
        for rows, volumes in pairs_in_blocks(numbers, capacity):
            kept_maps = {number: maps for number, maps in kept_maps.items() if number in volumes}
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                for number in np.unique(numbers[batch]).tolist():
                    if number not in kept_maps:
                        volume = first[number] if number < len(first) else arrays[1][number - len(first)]
                        kept_maps[number] = _maps(torch.as_tensor(volume, device=device), window, filters)
                x, y = ([kept_maps[number] for number in column] for column in numbers[batch].T.tolist())
                terms[batch] = _compare(x, y, window, filters).cpu().numpy()
                bar.update(len(batch))
    return terms


def _check_pairs(arrays: tuple[np.ndarray, np.ndarray], pairs: np.ndarray) -> None:
    """A sentence about arrays of different shape or pairs that are not there."""
    if arrays[0].shape[1:] != arrays[1].shape[1:]:
        raise BundleError(
            f"MS-SSIM: volumes of {arrays[0].shape[1:]} and {arrays[1].shape[1:]} voxels cannot be compared; "
            "all must have one shape"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise BundleError(f"MS-SSIM: pairs of shape {pairs.shape} and type {pairs.dtype}; (P, 2) integers are right")
    if len(pairs) and ((pairs < 0).any() or (pairs.max(0) >= [len(array) for array in arrays]).any()):
        raise BundleError(
            f"MS-SSIM: pairs go from {pairs.min(0).tolist()} to {pairs.max(0).tolist()}, but there are "
            f"{len(arrays[0])} and {len(arrays[1])} volumes"
        )


def pairs_in_blocks(numbers: np.ndarray, capacity: int) -> Iterator[tuple[np.ndarray, set[int]]]:
    """(P, 2) volume numbers -> groups of rows of pairs, each with its volumes, never more than `capacity` of them.

    The volumes are cut into blocks of capacity / 2, and a group holds the pairs between two blocks.
    """
    volumes, rank = np.unique(numbers, return_inverse=True)
    size = len(volumes) if len(volumes) <= capacity else capacity // 2
    block = np.sort(rank.reshape(numbers.shape) // max(1, size), 1)
    order = np.lexsort((numbers[:, 1], numbers[:, 0], block[:, 1], block[:, 0]))
    edges = np.flatnonzero((np.diff(block[order], axis=0) != 0).any(1)) + 1
    for rows in np.split(order, edges) if len(order) else []:
        of_blocks = [volumes[b * size : (b + 1) * size] for b in np.unique(block[rows[0]])]
        yield rows, set(np.concatenate(of_blocks).tolist())


class _full_precision:
    """float32 products in full, whatever the program around it chose: TF32 would cost more than the third digit."""

    def __enter__(self) -> None:
        self.previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.previous)


@dataclass
class Maps:
    """What one volume brings to every pair at one scale; each (*spatial), cropped by the window but for `x`.

    Rounding in F[xy] - F[x] F[y] is about 1e-7, and where a region is flat it is divided by C2 = 9e-4. Over many voxels
    that averages out, so float32 does for them; scales of fewer voxels than SINGLE_PRECISION_FROM, which are
    cheap, are float64.

    Attributes:
        x: the volume at this scale, plus 1. Variances do not change with that, and the background, which is most of a
            volume, becomes an exact 0, so that F[x^2] - F[x]^2 loses no digits there.
        mean: F[x] of it.
        spread: (F[x^2] - F[x]^2 + C2 / 2) / 2, so that cs = (covariance + C2 / 2) / (sum of both spreads).
    """

    x: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor


def _filters(spatial_shape: Sequence[int], window: Window, device: torch.device) -> list[list[torch.Tensor]]:
    """For each scale and axis the matrix (sides out, side) of the Gaussian filter.

    A dense product per axis is several times faster than a convolution at the sides in question. The matrix is SciPy's
    own answer to unit impulses, so that borders are reflected as SciPy does it, also where the window is larger than
    the volume.
    """
    radius = window.kernel_size // 2
    gaussian = partial(gaussian_filter1d, sigma=SIGMA, axis=0, radius=radius)
    filters = []
    for scale in range(window.num_scales):
        matrices = []
        sides = [side // 2**scale for side in spatial_shape]
        dtype = torch.float32 if np.prod(sides) >= SINGLE_PRECISION_FROM else torch.float64
        for side in sides:
            if window.cropped:
                matrix = gaussian(np.eye(side), mode="constant")[radius : side - radius]
            else:
                matrix = gaussian(np.eye(side), mode="reflect")
            matrices.append(torch.as_tensor(np.ascontiguousarray(matrix), dtype=dtype, device=device))
        filters.append(matrices)
    return filters


def _filtered(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """F[x] of a batch (B, *spatial)."""
    for axis, matrix in enumerate(matrices, start=1):
        shape = [*x.shape[:axis], len(matrix), *x.shape[axis + 1 :]]
        if axis == x.ndim - 1:
            x = x.reshape(-1, x.shape[axis]) @ matrix.T
        else:
            lines = x.reshape(int(np.prod(x.shape[:axis])), x.shape[axis], -1)
            x = torch.bmm(matrix.expand(len(lines), -1, -1), lines)
        x = x.reshape(shape)
    return x


def _maps(volume: torch.Tensor, window: Window, filters: list[list[torch.Tensor]]) -> list[Maps]:
    """The maps of one volume (*spatial) at every scale."""
    pool = torch.nn.functional.avg_pool2d if volume.ndim == 2 else torch.nn.functional.avg_pool3d
    x = volume.float()[None] + 1
    maps = []
    for scale, matrices in enumerate(filters):
        if scale:
            x = pool(x, 2)
        x = x.to(matrices[0].dtype)
        mean, power = _filtered(torch.cat([x, x * x]), matrices)
        maps.append(Maps(x[0], mean, (power - mean * mean + window.c2 / 2) / 2))
    return maps


def _compare(
    x: list[list[Maps]], y: list[list[Maps]], window: Window, filters: list[list[torch.Tensor]]
) -> torch.Tensor:
    """A batch of pairs of volumes, each with the maps of all scales -> (B, scales) means."""
    means = []
    for scale, matrices in enumerate(filters):
        of_x, of_y = [maps[scale] for maps in x], [maps[scale] for maps in y]
        product = of_x[0].x.new_empty(len(x), *of_x[0].x.shape)
        for row, a, b in zip(product, of_x, of_y):
            torch.mul(a.x, b.x, out=row)
        values = _filtered(product, matrices)
        for value, a, b in zip(values, of_x, of_y):
            value.addcmul_(a.mean, b.mean, value=-1).add_(window.c2 / 2).div_(a.spread + b.spread)
            if scale == window.num_scales - 1:
                mean_x, mean_y = a.mean - 1, b.mean - 1
                value *= (2 * mean_x * mean_y + window.c1) / (mean_x**2 + mean_y**2 + window.c1)
        means.append(values.flatten(1).mean(1).double())
    return torch.stack(means, 1)
