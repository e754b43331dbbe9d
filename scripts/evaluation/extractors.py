"""What a volume is described by when cohorts are compared: features of networks, and features that need no weights.

An extractor has a `name` (ends the metrics' names), a `title`, `distances` (what its Frechet distance and its MMD are
called), and is called with volumes: (N, *spatial) in [-1, 1], background -1 -> features (N, planes, images, d) float32,
`images` pictures a volume of each plane in `planes` (one plane and one picture where the volume is taken as a whole).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from tqdm import tqdm

from scripts.running.checks import check_knobs, resolved_device
from scripts.running.processes import gathered, in_turn, share


class MissingWeights(Exception):
    """An extractor has no weights; the message says why and which knob gives them."""


def batches(volumes: np.ndarray, size: int, progress: str, device: torch.device) -> Iterator[torch.Tensor]:
    """(N, *spatial) -> float32 batches (B, 1, *spatial) on the device, under a progress bar.

    Of several processes each gets its share of the batches; `all_batches` brings together what they made of them.
    """
    for start in tqdm(share(range(0, len(volumes), size)), progress, disable=not progress):
        yield torch.from_numpy(volumes[start : start + size].astype(np.float32))[:, None].to(device)


def all_batches(found: list[np.ndarray]) -> np.ndarray:
    """What all processes have found for their `batches`, (B, ...) each, in order: (N, ...). Collective."""
    return np.concatenate(in_turn(gathered(found)))


class PCAFeatures:
    """A description that needs no weights: PCA of the volume at low resolution, and how much detail it has.

    A volume is split by the orthonormal Haar wavelet, octave by octave, until its longest side is at most `resolution`
    (at least one octave). What remains is the volume at low resolution (block averages): its PCA scores, whitened, are
    the first features. Averaging hides blur and noise, so the rest are the logarithms of the mean energy of what was
    split off, standardised on the real cohort: for each octave one figure for the coefficients that are high-pass along
    one axis, along two, and along three. Blur lowers them; noise raises the last, where brains have almost nothing.

    PCA is fitted on the real volumes that it later describes, so with K components near N the real cohort would look
    far more spread out than any other one, held-out volumes too. So K is what explains `explained` of the variance, but
    no more than a fifth of the volumes or `max_components`, and no direction at all is fitted to the detail.

    Args:
        resolution: longest side of the low-resolution volume, in voxels.
        explained: fraction of the variance at low resolution.
        max_components: upper limit of the components.
        device: where the wavelet transform runs; None for the GPU where there is one.
        batch_size: in volumes.
    """

    name, title, distances = "pca", "PCA and detail energy (needs no weights; not FID)", ("frechet", "mmd")

    def __init__(
        self,
        resolution: int = 16,
        explained: float = 0.95,
        max_components: int = 16,
        device: str | torch.device | None = None,
        batch_size: int = 8,
    ) -> None:
        check_knobs(resolution=resolution, explained=explained, max_components=max_components, batch_size=batch_size)
        self.resolution, self.explained, self.max_components = resolution, min(float(explained), 1.0), max_components
        self.device, self.batch_size = resolved_device(device), batch_size

    def check(self, spatial_dims: int) -> None:
        """Nothing can be wrong."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"resolution": self.resolution, "explained": self.explained, "max_components": self.max_components}

    def planes(self, spatial_dims: int) -> tuple[str, ...]:
        return ("",)

    @torch.inference_mode()
    def split(self, volumes: np.ndarray, progress: str = "") -> tuple[np.ndarray, np.ndarray]:
        """(N, *spatial) -> low resolution (N, voxels), log10 energies of the detail (N, octaves * dims)."""
        octaves = max(1, math.ceil(math.log2(max(volumes.shape[1:]) / self.resolution)))
        low, detail = [], []
        for x in batches(volumes, self.batch_size, progress, self.device):
            x, energies = x + 1, []  # the background is 0, so that padding adds nothing
            for _ in range(octaves):
                x, energy = haar_octave(x)
                energies.append(energy)
            low.append(x.flatten(1).cpu().numpy())
            detail.append(torch.cat(energies, 1).clamp(min=1e-8).log10().cpu().numpy())
        return all_batches(low), all_batches(detail)

    def fit(self, real: np.ndarray) -> None:
        """Fit the PCA and the standardisation on the real volumes (N, *spatial), N of 2 or more."""
        low, detail = self.split(real, "PCA of the real volumes")
        most = max(1, min(len(low) // 5, self.max_components, low.shape[1]))
        pca = PCA(most, svd_solver="full", whiten=True).fit(low)
        enough = int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), self.explained - 1e-9)) + 1
        self.num_components = min(most, enough)
        self.pca, self.mean, self.std = pca, detail.mean(0), detail.std(0, ddof=1).clip(1e-3)

    def __call__(self, volumes: np.ndarray, progress: str = "") -> np.ndarray:
        """(N, *spatial) -> (N, 1, 1, K + octaves * dims); the unit is the real cohort's standard deviation."""
        low, detail = self.split(volumes, progress)
        scores = self.pca.transform(low)[:, : self.num_components]
        return np.concatenate([scores, (detail - self.mean) / self.std], 1).astype(np.float32)[:, None, None]


def haar_octave(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One octave of the orthonormal Haar wavelet (Haar 1910), with block averages instead of scaled sums.

    Args:
        x: (B, 1, *spatial); odd sides are padded with 0.

    Returns:
        block averages (B, 1, *spatial / 2), and the mean squared coefficient of the bands that are high-pass along one
        axis, along two, ... (B, spatial dims).
    """
    dims = x.ndim - 2
    bands = {0: [F.pad(x, [p for side in x.shape[:1:-1] for p in (0, side % 2)])]}
    for axis in range(2, 2 + dims):
        halved: dict[int, list[torch.Tensor]] = {}
        for order, arrays in bands.items():
            for array in arrays:
                even, odd = array.unfold(axis, 2, 2).unbind(-1)
                halved.setdefault(order, []).append((even + odd) / math.sqrt(2))
                halved.setdefault(order + 1, []).append((even - odd) / math.sqrt(2))
        bands = halved
    energy = [torch.stack([b.square().flatten(1).mean(1) for b in bands[k]]).mean(0) for k in range(1, dims + 1)]
    return bands[0][0] / 2 ** (dims / 2), torch.stack(energy, 1)
