"""Numbers of one volume: its power spectrum, its faces, its symmetry."""

from __future__ import annotations

import numpy as np
from scipy import fft

NYQUIST = 0.5  # cycles a voxel
LEAST_POWER = 1e-12  # an empty volume has a logarithm too


def radial_power(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Power spectrum averaged over shells of equal spatial frequency.

    Args:
        volume: (*spatial), two or three dims.

    Returns:
        (F) mean frequency of a shell in cycles a voxel; the shells are 1 / (shortest side) wide and reach beyond the
            Nyquist frequency, 0.5, into the corners of the frequency cube, so that no power is left out;
        (F) mean power |FFT|^2 / voxels of a shell: white noise of variance v has v everywhere;
        (F) number of frequencies in a shell; power @ number is the sum of squared voxels (Parseval).
    """
    shape = volume.shape
    power = np.abs(fft.fftn(np.asarray(volume, np.float32))) ** 2 / volume.size
    squared = sum(np.reshape(fft.fftfreq(n) ** 2, [-1] + [1] * (len(shape) - 1 - axis)) for axis, n in enumerate(shape))
    radius = np.sqrt(squared).ravel()
    shell = np.rint(radius * min(shape)).astype(int)
    number = np.bincount(shell)
    return np.bincount(shell, radius) / number, np.bincount(shell, power.ravel()) / number, number


def outermost_shell(spatial_shape: tuple[int, ...]) -> np.ndarray:
    """(*spatial) bool: the voxels at the faces of the volume, which lie outside of the brain."""
    shell = np.ones(spatial_shape, bool)
    shell[tuple(slice(1, -1) for _ in spatial_shape)] = False
    return shell


def mirror_correlation(volume: np.ndarray) -> float:
    """Pearson correlation of a volume (first axis left to right) with its mirror image; nan if it is constant."""
    x = np.asarray(volume, np.float64)
    x = x - x.mean()
    power = (x * x).sum()
    return float((x * np.flip(x, 0)).sum() / power) if power > 1e-12 * x.size else float("nan")
