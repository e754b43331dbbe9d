"""How near volumes are to those of training, and what would be so by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from scripts.running.errors import BundleError


def correlations(
    first: np.ndarray,
    second: np.ndarray,
    device: str | torch.device = "cpu",
    memory: float = 1.0,
    description: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pearson correlation over the voxels of every volume of `first` with every one of `second`, mirrored or not.

    Args:
        first: (N, *spatial).
        second: (M, *spatial); the first spatial axis is left to right.
        device: where to compute.
        memory: GiB of standardised volumes held at once; at least three volumes are held.
        description: of the progress bar; None for no bar.

    Returns:
        (N, M) float32, the larger correlation of (first[i], second[j]) and (mirror image of first[i], second[j]), and
        (N, M) bool, True where the mirror image's is larger. A constant volume correlates with nothing: 0.

    Raises:
        BundleError: the shapes differ.
    """
    if first.shape[1:] != second.shape[1:]:
        raise BundleError(
            f"memorisation: volumes of {first.shape[1:]} and {second.shape[1:]} voxels cannot be compared; "
            "all must have one shape"
        )
    size = max(1, int(memory * 2**30 / (3 * 4 * np.prod(first.shape[1:]))))
    values = np.empty((len(first), len(second)), np.float32)
    flipped = np.empty(values.shape, bool)
    starts = [(i, j) for i in range(0, len(first), size) for j in range(0, len(second), size)]
    x = x_flipped = None
    for i, j in tqdm(starts, description, unit="block", disable=description is None):
        if j == 0:
            block = torch.as_tensor(first[i : i + size], device=device)
            x, x_flipped = _standardised(block), _standardised(block.flip(1))
        y = _standardised(torch.as_tensor(second[j : j + size], device=device))
        plain, mirrored = _product(x, y), _product(x_flipped, y)
        here = np.s_[i : i + size, j : j + size]
        values[here] = np.maximum(plain, mirrored).clip(-1, 1)
        # A symmetric volume is its own mirror image; rounding must not decide that it is mirrored.
        flipped[here] = mirrored > plain + 1e-5
    return values, flipped


def _standardised(volumes: torch.Tensor) -> torch.Tensor:
    """(B, *spatial) -> (B, voxels) float32 with mean 0 and norm 1, so that a product is a correlation."""
    x = volumes.flatten(1).float()
    x = x - x.mean(1, keepdim=True)
    norm = x.square().sum(1, keepdim=True).sqrt()  # `norm` loses four digits in volumes of 128^3 voxels
    # The mean of equal float32 numbers is not always exactly that number; what is left is no signal.
    return torch.where(norm > 1e-5 * x.shape[1] ** 0.5, x / norm.clamp_min(1e-30), 0)


def _product(x: torch.Tensor, y: torch.Tensor, length: int = 2**12) -> np.ndarray:
    """x @ y.T, summed in float64 every `length` voxels: float32 sums over 128^3 voxels lose the fourth digit."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32, if the program around it chose so, would lose the third
    try:
        total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
        for start in range(0, x.shape[1], length):
            total += x[:, start : start + length] @ y[:, start : start + length].T
    finally:
        torch.set_float32_matmul_precision(previous)
    return total.cpu().numpy()


def relative_distance(values: np.ndarray, neighbours: int) -> np.ndarray:
    """r of the module's docstring for each row of correlations.

    Args:
        values: (N, M); -inf where a pair is left out.
        neighbours: k, how many of the next nearest are averaged; fewer if there are not so many.

    Returns:
        (N) float64, 0 for a copy of one volume; nan where fewer than two correlations are finite.
    """
    ordered = -np.sort(-np.asarray(values, float), axis=1)[:, : neighbours + 1]
    distance = np.where(np.isfinite(ordered), 1 - ordered, np.nan)
    count = np.isfinite(distance[:, 1:]).sum(1)
    others = np.nansum(distance[:, 1:], axis=1) / np.maximum(count, 1)
    return np.where((count > 0) & (others > 0), distance[:, 0] / np.where(others > 0, others, 1), np.nan)


def excess_over_chance(fraction: np.ndarray | float, num_training: float, num_held_out: float) -> np.ndarray | float:
    """(fraction - p) / (1 - p) with p = num_training / (num_training + num_held_out): 0 by chance, 1 at most."""
    chance = num_training / (num_training + num_held_out)
    return (fraction - chance) / (1 - chance)


def label_permutation_p(nearest: np.ndarray, num_training: int, num_held_out: int, resamples: int, seed: int) -> float:
    """How often shuffled labels put at least as many volumes nearer to "training" as the true ones: a p-value.

    Args:
        nearest: (N) number of the nearest real volume, training ones first: 0 ... num_training + num_held_out - 1.
        resamples: shuffles.
        seed: of the shuffles.
    """
    weights = np.bincount(nearest, minlength=num_training + num_held_out)
    shuffled = np.random.default_rng(seed).permuted(np.tile(weights, (resamples, 1)), axis=1)
    as_many = (shuffled[:, :num_training].sum(1) >= weights[:num_training].sum()).sum()
    return float((1 + as_many) / (1 + resamples))


@dataclass
class Comparison:
    """One cohort against one real one, the reference.

    Attributes:
        correlation: (N, M); -inf for pairs that do not count (a volume with itself, the same scan twice).
        flipped: (N, M), whether the mirror image correlates more.
        index: (N) the nearest by correlation.
        ms_ssim: (N) the largest second similarity among the candidates; None without one.
        exact: (N) whether one of the candidates has the same voxels, mirrored or not.
        duplicates: (D, 2) pairs of real volumes that are the same scan; each pair once.
    """

    correlation: np.ndarray
    flipped: np.ndarray
    index: np.ndarray
    ms_ssim: np.ndarray | None
    exact: np.ndarray
    duplicates: np.ndarray

    @property
    def nearest(self) -> np.ndarray:
        """(N) the largest correlation; nan where no pair counts."""
        largest = self.correlation.max(1).astype(float)
        return np.where(np.isfinite(largest), largest, np.nan)

    def similarity(self, kind: str) -> np.ndarray:
        """(N), "correlation" or "ms_ssim"."""
        return self.nearest if kind == "correlation" else self.ms_ssim

    def data(self) -> dict:
        """What the figures need, JSON-able."""
        number = np.arange(len(self.index))
        return {
            "index": self.index.tolist(),
            "flipped": self.flipped[number, self.index].tolist(),
            **{kind: _plain(self.similarity(kind)) for kind in ("correlation", "ms_ssim") if self.has(kind)},
        }

    def has(self, kind: str) -> bool:
        """Whether there are values of that kind."""
        return kind == "correlation" or self.ms_ssim is not None


def _plain(values: np.ndarray) -> list[float | None]:
    """(N) -> JSON-able; what is not finite becomes None."""
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]
