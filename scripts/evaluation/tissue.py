"""CSF, grey and white matter of a brain-extracted T1 volume by a Gaussian mixture of its intensities."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_fill_holes, distance_transform_edt
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

TISSUES = ("CSF", "grey matter", "white matter")  # dark to bright in a T1 image
# Resampling smears the edge of the brain into the background: on real brains at 64^3 nine of ten voxels below -0.9, a
# tenth of the foreground, lie in its outermost layer. Left in, that rim takes a component of its own.
BRAIN_ABOVE = -0.9
SMALLEST = 100  # voxels of a brain
QUANTILES = 4096


@dataclass
class Tissues:
    """Three normal distributions of one variance, fitted to the intensities of one volume.

    Attributes:
        mixture: of scikit-learn, in its own order of components.
        order: its components from dark to bright, as TISSUES.
        fractions: (3), sum 1, of the brain's voxels: the mean posterior, so that a voxel between two means counts
            partly for each.
        num_voxels: of the brain.
    """

    mixture: GaussianMixture
    order: np.ndarray
    fractions: np.ndarray
    num_voxels: int

    def posterior(self, intensities: np.ndarray) -> np.ndarray:
        """(N) intensities -> (N, 3) probabilities of TISSUES."""
        return self.mixture.predict_proba(np.asarray(intensities, float).reshape(-1, 1))[:, self.order]


def classify(volume: np.ndarray, seed: int = 0) -> Tissues | None:
    """Fit the mixture by expectation-maximisation from k-means centres.

    The variance is shared, since what spreads the intensities of a tissue is mostly the image's noise; with a variance
    each, the grey matter swallows the others on volumes of low resolution. The fit and the fractions use quantiles of
    the brain's intensities, which stand for all voxels without the scatter of a random sample.

    Args:
        volume: (*spatial) in [-1, 1], background -1; the brain is what is above BRAIN_ABOVE.
        seed: of k-means.

    Returns:
        None where there is nothing to classify: hardly a voxel, not finite, fewer than three intensities, no
        convergence, or a component that vanished.
    """
    brain = np.asarray(volume)[np.asarray(volume) > BRAIN_ABOVE].astype(float)
    if len(brain) < SMALLEST or not np.isfinite(brain).all():
        return None
    if len(brain) > QUANTILES:
        intensities = np.quantile(brain, (np.arange(QUANTILES) + 0.5) / QUANTILES)
    else:
        intensities = np.sort(brain)
    if len(np.unique(intensities)) < 3:
        return None
    # The default tolerance of 1e-3 stops after some five steps, where the result is still the starting point.
    mixture = GaussianMixture(3, covariance_type="tied", tol=1e-6, max_iter=1000, random_state=seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(intensities[:, None])
    except ValueError:  # a component without width
        return None
    fractions = mixture.predict_proba(intensities[:, None]).mean(0)
    if not mixture.converged_ or not np.isfinite(fractions).all() or fractions.min() < 1e-3:
        return None
    order = np.argsort(mixture.means_[:, 0])
    return Tissues(mixture, order, fractions[order], len(brain))


def tissue_map(volume: np.ndarray, tissues: Tissues) -> np.ndarray:
    """The most probable tissue of each voxel: (*spatial) uint8, 0 outside the brain, 1 to 3 as TISSUES."""
    volume = np.asarray(volume)
    brain = volume > BRAIN_ABOVE
    classes = np.zeros(volume.shape, np.uint8)
    classes[brain] = tissues.posterior(volume[brain]).argmax(1) + 1
    return classes


def inner_dark(volume: np.ndarray) -> float:
    """How much of a brain is dark and within, mostly ventricles: a share of the brain with its holes filled.

    Within is at least half as deep below the surface as the deepest voxel, so that no sulcus counts; dark is below 0.6
    of the median intensity there, counted from the background. It needs no classes of intensity, so it also measures
    phantoms. On 158 real T1 brains at 64^3 it explains 91 % of the variance of the lateral ventricles' share of the
    supratentorial volume.

    Args:
        volume: (*spatial) in [-1, 1], background -1.

    Returns:
        a share from 0 to 1; nan where nothing is above the background.
    """
    volume = np.asarray(volume, np.float32)
    whole = binary_fill_holes(volume > BRAIN_ABOVE)
    if not whole.any():
        return float("nan")
    depth = distance_transform_edt(whole)
    within = volume[depth >= depth.max() / 2] + 1
    return float((within < 0.6 * np.median(within)).sum() / whole.sum())
