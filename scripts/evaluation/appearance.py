"""What volumes look like: slices, mean and spread, intensities, power spectra, and the rows that go with them.

A blurred generator lacks power at high spatial frequencies, a noisy one has too much; the signed row says which.
"""

from __future__ import annotations

import os

import numpy as np
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import euclidean_distances
from tqdm import tqdm

from scripts.evaluation.appearance_figures import (
    draw_extremes,
    draw_first,
    draw_histograms,
    draw_moments,
    draw_samples,
    draw_spectra,
)
from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.evaluator import metric_row
from scripts.evaluation.spectrum import LEAST_POWER, NYQUIST, mirror_correlation, outermost_shell, radial_power
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError

FAINTEST = -1 + 1 / 255  # half a grey level of 8 bits: what is fainter comes from resampling, and nobody sees it


def nearest_distances(
    first: np.ndarray, second: np.ndarray | None, memory: float = 1.0, description: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square difference of every volume to the nearest of others.

    Args:
        first: (N, *spatial).
        second: (M, *spatial); None for the other volumes of `first`.
        memory: GiB of volumes held at once as float32.
        description: of the progress bar; None for no bar.

    Returns:
        (N) distances and (N) numbers of the nearest.
    """
    others = first if second is None else second
    size = max(1, int(memory * 2**30 / (2 * 4 * np.prod(first.shape[1:]))))
    distance, index = np.full(len(first), np.inf), np.zeros(len(first), int)
    starts = [(i, j) for i in range(0, len(first), size) for j in range(0, len(others), size)]
    for i, j in tqdm(starts, description, unit="block", disable=description is None):
        if j == 0:
            x = first[i : i + size].reshape(len(first[i : i + size]), -1).astype(np.float32)
        y = others[j : j + size].reshape(len(others[j : j + size]), -1).astype(np.float32)
        between = euclidean_distances(x, y) / np.sqrt(x.shape[1])
        if second is None and i == j:
            np.fill_diagonal(between, np.inf)
        nearest = between.argmin(1)
        least = between[np.arange(len(x)), nearest]
        better = least < distance[i : i + size]
        distance[i : i + size] = np.where(better, least, distance[i : i + size])
        index[i : i + size] = np.where(better, nearest + j, index[i : i + size])
    return distance, index


class Appearance:
    """Measure: slices, mean and standard deviation, intensity histograms, power spectra, best and worst volumes.

    The slices shown are those of the first volumes of each cohort, never of chosen ones.

    Args:
        num_shown: volumes of each cohort in the grid of slices.
        num_extremes: volumes of each kind, nearest to and farthest from a real volume, for each synthetic cohort.
        num_bins: of the intensity histograms, from -1 to 1.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
        memory: GiB of volumes held at once for the distances.
    """

    name = "appearance"
    title = "Appearance"

    def __init__(
        self,
        num_shown: int = 6,
        num_extremes: int = 3,
        num_bins: int = 100,
        num_resamples: int = 1000,
        seed: int = 0,
        memory: float = 1.0,
    ) -> None:
        check_knobs(num_shown=num_shown, num_extremes=num_extremes, num_bins=num_bins, num_resamples=num_resamples)
        check_knobs(seed=seed, memory=memory)
        self.num_shown, self.num_extremes, self.num_bins = num_shown, num_extremes, num_bins
        self.num_resamples, self.seed, self.memory = num_resamples, seed, memory
        self._cohorts: Cohorts | None = None
        self._real: dict[str, np.ndarray] = {}

    @property
    def settings(self) -> dict:
        """The knobs that change the numbers."""
        return {"num_bins": self.num_bins, "num_resamples": self.num_resamples, "seed": self.seed}

    def check(self, cohorts: Cohorts) -> None:
        """All volumes have one shape of two or three sides of 4 voxels or more."""
        shape = cohorts.real.volumes.shape[1:]
        if len(shape) not in (2, 3) or min(shape) < 4:
            raise BundleError(f"{cohorts.real.name}: volumes of {shape} voxels; 2 or 3 sides of 4 or more are right")
        cohorts.check_one_shape()

    def describe(self, cohort: Cohort) -> dict[str, np.ndarray]:
        """Arrays of one entry a volume.

        Returns:
            {"frequency": (F) cycles a voxel, "log_power": (N, F) log10, "histogram": (N, bins) fractions of the voxels
            above `FAINTEST` that sum to 1 (or to 0 for an empty volume), "foreground", "background", "symmetry": (N)}.
        """
        shell = outermost_shell(cohort.volumes.shape[1:])
        edges = np.linspace(-1, 1, self.num_bins + 1)
        parts: dict[str, list] = {}
        for volume in tqdm(cohort.volumes, f"spectra and intensities {cohort.name}", unit="volume"):
            x = volume.astype(np.float32)
            # Plus 1, so that the background is 0; frequency 0 is left out, it is the mean.
            frequency, power, _ = radial_power(x + 1)
            kept = (frequency > 0) & (frequency <= NYQUIST)
            bright = x[x > FAINTEST]
            entry = {
                "log_power": np.log10(np.maximum(power[kept], LEAST_POWER)),
                "histogram": np.histogram(bright.clip(-1, 1), edges)[0] / max(1, bright.size),
                "foreground": bright.size / x.size,
                "background": x[shell].mean(),
                "symmetry": mirror_correlation(x),
            }
            for key, value in entry.items():
                parts.setdefault(key, []).append(value)
        return {"frequency": frequency[kept]} | {key: np.array(values) for key, values in parts.items()}

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict:
        """Rows on spectrum, intensities, background, symmetry and nearest-real distance; curves for the figures."""
        if self._cohorts is not cohorts:
            self._cohorts, self._real = cohorts, self.describe(cohorts.real)
        real = self._real
        own = real if cohort is cohorts.real else self.describe(cohort)
        rows = self._spectrum_rows(own, real, cohort is cohorts.real) + self._intensity_rows(own, real, cohort, cohorts)
        others = None if cohort is cohorts.real else cohorts.real.volumes
        distance, index = nearest_distances(cohort.volumes, others, self.memory, f"nearest real {cohort.name}")
        note = "root mean square difference to the nearest real volume" + (" but itself" if others is None else "")
        rows.append(self._mean_row("nearest_real_rms", distance, note))
        low, high = np.percentile(own["log_power"], [5, 95], axis=0)
        curves = {"mean": own["log_power"].mean(0), "low": low, "high": high, "frequency": own["frequency"]}
        data = {
            "spectrum": {key: np.round(value, 5).tolist() for key, value in curves.items()},
            "histogram": np.round(own["histogram"].mean(0), 7).tolist(),
            "distance": np.round(distance, 6).tolist(),
            "nearest": index.tolist(),
        }
        return {"rows": rows, "notes": self._notes(own, cohort), "data": data}

    def _counts(self, n: int) -> np.ndarray:
        return bootstrap_counts(n, self.num_resamples, self.seed)

    def _mean_row(self, metric: str, values: np.ndarray, note: str) -> dict:
        """A row: the mean over volumes, which should be the real cohort's."""
        values = values[np.isfinite(values)]
        if not len(values):
            return metric_row(metric, np.nan, np.nan, np.nan, "real", note)
        return metric_row(
            metric, values.mean(), *interval(self._counts(len(values)) @ values / len(values)), "real", note
        )

    def _spectrum_rows(self, own: dict, real: dict, is_real: bool) -> list[dict]:
        """The log10 ratio of power to the real cohort's, unsigned over all frequencies and signed at the high third."""
        if is_real:
            return [metric_row("spectrum_high_frequency", 0, np.nan, np.nan, "real", "0 by definition")]
        ratio = own["log_power"].mean(0) - real["log_power"].mean(0)
        n = len(own["log_power"])
        resampled = self._counts(n) @ own["log_power"] / n - real["log_power"].mean(0)
        high = own["frequency"] > NYQUIST * 2 / 3
        note = (
            "mean of |log10(power / real power)| over frequencies up to 0.5 cycles a voxel; geometric mean of volumes"
        )
        signed = f"mean of log10(power / real power) above {NYQUIST * 2 / 3:.2f} cycles a voxel: "
        signed += "below 0 is blurred, above noisy"
        unsigned = np.abs(ratio).mean()
        return [
            metric_row(
                "spectrum_log_ratio", unsigned, *_distance_interval(unsigned, np.abs(resampled).mean(1)), "lower", note
            ),
            metric_row(
                "spectrum_high_frequency", ratio[high].mean(), *interval(resampled[:, high].mean(1)), "real", signed
            ),
        ]

    def _intensity_rows(self, own: dict, real: dict, cohort: Cohort, cohorts: Cohorts) -> list[dict]:
        """Foreground intensities against the real ones; foreground, background and symmetry by themselves."""
        rows = []
        if cohort is not cohorts.real:
            centres = np.linspace(-1, 1, 2 * self.num_bins + 1)[1::2]
            distance = _histogram_distance(centres, own["histogram"].mean(0), real["histogram"].mean(0))
            means = self._counts(len(cohort)) @ own["histogram"] / len(cohort)
            resampled = np.array([_histogram_distance(centres, mean, real["histogram"].mean(0)) for mean in means])
            note = "1D Wasserstein distance of the histograms of what is no background, each volume weighing the same"
            rows.append(
                metric_row("intensity_wasserstein", distance, *_distance_interval(distance, resampled), "lower", note)
            )
        rows.append(self._mean_row("foreground_fraction", own["foreground"], "voxels above -1 + 1/255, of all"))
        rows.append(self._mean_row("background_level", own["background"], "mean of the voxels at the volume's faces"))
        rows.append(self._mean_row("left_right_symmetry", own["symmetry"], "correlation with the own mirror image"))
        return rows

    def _notes(self, own: dict, cohort: Cohort) -> list[str]:
        empty = int((own["foreground"] == 0).sum())
        return [f"{cohort.name}: {empty} volumes are empty (every voxel is background)."] if empty else []

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict]:
        """First volumes, samples, mean and deviation, intensities, spectra, each synthetic cohort's best and worst."""
        os.makedirs(folder, exist_ok=True)
        shown = [cohort for cohort in cohorts if cohort.name in results]
        if not shown:
            return []
        colours = cohorts.colours
        entries = [draw_first(shown, folder), draw_samples(shown, folder, self.num_shown)]
        entries += [draw_moments(shown, folder)]
        entries += [draw_histograms(results, shown, colours, folder, self.num_bins)]
        entries += [draw_spectra(results, shown, cohorts.real, colours, folder)]
        for number, cohort in enumerate(cohorts.synthetic, 1):
            if cohort.name in results:
                entries.append(
                    draw_extremes(results[cohort.name]["data"], cohort, cohorts.real, folder, number, self.num_extremes)
                )
        return entries


def _histogram_distance(centres: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """1D Wasserstein distance of two histograms; nan if one is empty."""
    if not first.sum() or not second.sum():
        return float("nan")
    return float(wasserstein_distance(centres, centres, first, second))


def _distance_interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """The bootstrap interval of a distance, shifted by its bias.

    Resampling adds noise, which makes every distance larger: without the shift the interval may miss the value itself.
    """
    low, high = interval(resampled)
    finite = resampled[np.isfinite(resampled)]
    bias = finite.mean() - value if len(finite) else 0
    return max(0.0, low - bias), max(0.0, high - bias)
