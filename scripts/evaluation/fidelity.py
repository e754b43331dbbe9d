"""Fidelity: how close the features of a cohort are to those of the real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from scipy.linalg import svd, svdvals
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel
from tqdm import tqdm

from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.evaluator import metric_row
from scripts.evaluation.extractors import MissingWeights
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError
from scripts.running.pictures import save_figure

PRDC = ("precision", "recall", "density", "coverage")
# what a value cannot be below or above; 0 and 1 for the rest
BOUNDS = {"frechet": (0, None), "mmd": (None, None), "density": (0, None)}


class Extractor(Protocol):
    """What the list `extractors` holds; see scripts/evaluation/extractors.py."""

    name: str
    title: str
    distances: tuple[str, str]
    settings: dict[str, Any]

    def check(self, spatial_dims: int) -> None:
        """Raise BundleError for a weights file that cannot be used."""

    def planes(self, spatial_dims: int) -> tuple[str, ...]:
        """Names of the planes whose slices are compared one by one; ("",) where whole images are."""

    def fit(self, real: np.ndarray) -> None:
        """Learn from the real volumes (N, *spatial) what it needs, if anything."""

    def __call__(self, volumes: np.ndarray, progress: str = "") -> np.ndarray:
        """Features of volumes (N, *spatial) in [-1, 1]."""


def frechet_distances(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None, progress: str = "") -> np.ndarray:
    """Squared Frechet distances between Gaussians fitted to two samples (Dowson & Landau 1982; as FID: Heusel 2017).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). The trace of the root is the nuclear norm of
    X Y^T / sqrt((n - 1)(m - 1)) with X, Y the centred samples, so no d x d matrix is needed and singular covariances
    (n < d) are exact.

    Args:
        x: (n, d); y: (m, d); two rows or more each.
        counts: (R, m) how often each row of y is in each resample; None for y itself.

    Returns:
        (R,) distances, or (1,) without counts.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    counts = np.ones((1, len(y))) if counts is None else counts
    centre = x.mean(0)
    x, y = (x - centre) / np.sqrt(len(x) - 1), y - centre
    _, s, axes = svd(x, full_matrices=False)
    kept = s > s[0] * 1e-12 if len(s) and s[0] > 0 else np.zeros(len(s), bool)
    cross = (s[kept, None] * axes[kept]) @ y.T  # (rank of x, m)
    squares, trace_x = (y**2).sum(1), (x**2).sum()
    distances = []
    for weights in tqdm(counts, progress, disable=not progress, leave=False):
        m = weights.sum()
        mean = weights @ y / m
        some = weights > 0
        middle = (cross[:, some] - (cross @ weights / m)[:, None]) * np.sqrt(weights[some] / (m - 1))
        trace_y = (weights @ squares - m * mean @ mean) / (m - 1)
        root = svdvals(middle).sum() if middle.size else 0.0
        distances.append(max(0.0, mean @ mean + trace_x + trace_y - 2 * root))
    return np.array(distances)


def volume_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean kernel (x . y / d + 1)^3 between the images of two volumes (KID: Binkowski et al. 2018, section 3.1).

    Args:
        x: (n, images, d); y: (m, images, d).

    Returns:
        (n, m)
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    pairs = [polynomial_kernel(x[:, i], y[:, j], degree=3) for i in range(x.shape[1]) for j in range(y.shape[1])]
    return np.mean(pairs, 0)


def unbiased_mmd(k_xx: np.ndarray, k_xy: np.ndarray, k_yy: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3); it may be below zero.

    A pair of the same volume is left out, in resamples too, and with several images a volume all pairs of its images.
    With one image a volume it is the KID of Binkowski et al. MONAI's MMDMetric is another figure: its kernel is linear
    (means only), and it wants cohorts of equal size.

    Args:
        k_xx: (n, n); k_xy: (n, m); k_yy: (m, m) kernels; counts: (R, m) of y, see `frechet_distances`.

    Returns:
        (R,) or (1,); NaN for a resample of one volume only.
    """
    counts = np.ones((1, len(k_yy))) if counts is None else counts.astype(np.float64)
    n, off = len(k_xx), k_yy - np.diag(np.diag(k_yy))
    within = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
    total = counts.sum(1)
    pairs = total**2 - (counts**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return within + ((counts @ off) * counts).sum(1) / pairs - 2 * counts @ k_xy.mean(0) / total


def prdc(x: np.ndarray, y: np.ndarray, nearest_k: int, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), density and coverage (Naeem et al. 2020).

    A ball reaches from each sample to its `nearest_k`-th neighbour in its own cohort, its surface included. Precision:
    fraction of y within a ball of x. Recall: fraction of x within a ball of y. Density: balls of x that a y is within,
    over `nearest_k`. Coverage: fraction of balls of x with a y within.

    Args:
        x: (n, d) real; y: (m, d) synthetic; n and m above `nearest_k`.
        counts: (R, m) of y, see `frechet_distances`; the balls stay those of the whole cohort.

    Returns:
        four arrays (R,) or (1,).
    """
    counts = np.ones((1, len(y))) if counts is None else counts
    present, total = (counts > 0).astype(float), counts.sum(1)
    radius_x = np.partition(cdist(x, x), nearest_k, 1)[:, nearest_k]  # entry 0 is the sample itself
    radius_y = np.partition(cdist(y, y), nearest_k, 1)[:, nearest_k]
    between = cdist(x, y)
    in_x, in_y = between <= radius_x[:, None], between <= radius_y
    return {
        "precision": counts @ in_x.any(0) / total,
        "recall": (present @ in_y.T > 0).mean(1),
        "density": counts @ in_x.sum(0) / (nearest_k * total),
        "coverage": (present @ in_x.T > 0).mean(1),
    }


def resampled_row(
    metric: str, values: np.ndarray | None, better: str, bounds: tuple[float | None, float | None], note: str = ""
) -> dict[str, Any]:
    """One row of a result: values[0] is the estimate, the rest are its resamples; None for a row without a value.

    A resample holds fewer different volumes than the cohort, which alone changes Frechet distance, recall and coverage.
    So the interval is the 95 % percentile interval of the resamples, moved so that their median is the estimate.
    """
    value = low = high = np.nan
    if values is not None and np.isfinite(values[0]):
        value, resamples = float(values[0]), values[1:]
        low, high = interval(resamples)
        shift = value - float(np.nanmedian(resamples)) if np.isfinite(resamples).any() else 0.0
        low, high = (np.clip(v + shift, *bounds) for v in (low, high))
    return metric_row(metric, value, low, high, better, note)


class Fidelity:
    """Frechet distance, MMD, precision, recall, density and coverage on the features of every extractor.

    Distances take each image of a plane as one sample, plane by plane, and their mean over the planes. Precision,
    recall, density and coverage take a volume as one sample, described by the mean of its images, planes side by side.
    Frechet distance grows as cohorts shrink, so a held-out cohort of the same size is the yardstick, not zero.

    Args:
        extractors: such as those of scripts/evaluation/extractors.py, of different names.
        nearest_k: neighbours that define a ball; Naeem et al. 2020 use 5.
        num_resamples: of the bootstrap over the cohort's volumes; the real cohort stays as it is.
        seed: of the bootstrap.
    """

    name = "fidelity"
    title = "Fidelity"
    together = True

    def __init__(
        self, extractors: Sequence[Extractor], nearest_k: int = 5, num_resamples: int = 200, seed: int = 0
    ) -> None:
        check_knobs(nearest_k=nearest_k, num_resamples=num_resamples, seed=seed)
        names = [extractor.name for extractor in extractors]
        if not names or len(set(names)) < len(names):
            raise BundleError(f"extractors: the names {names} were given; expected one or more different ones")
        self.extractors, self.nearest_k = list(extractors), nearest_k
        self.num_resamples, self.seed = num_resamples, seed
        self.kept: dict[tuple[str, str], tuple[np.ndarray, np.ndarray | str]] = {}

    def check(self, cohorts: Cohorts) -> None:
        """Load the weights. Raises BundleError for a weights file that cannot be used."""
        for extractor in self.extractors:
            extractor.check(cohorts.real.volumes.ndim - 1)

    @property
    def settings(self) -> dict[str, Any]:
        extractors = {extractor.name: extractor.settings for extractor in self.extractors}
        knobs = {"nearest_k": self.nearest_k, "num_resamples": self.num_resamples, "seed": self.seed}
        return {"extractors": extractors, **knobs}

    def features(self, extractor: Extractor, cohort: Cohort) -> np.ndarray | str:
        """(N, planes, images, d), or why there are none; kept in memory: the real ones are needed for each cohort."""
        key = (extractor.name, cohort.name)
        volumes, features = self.kept.get(key, (None, ""))
        if volumes is not cohort.volumes:
            try:
                features = extractor(cohort.volumes, f"{extractor.title}: {cohort.name}")
            except MissingWeights as e:
                features = str(e)
            self.kept[key] = (cohort.volumes, features)
        return features

    def of_real(self, extractor: Extractor, real: Cohort) -> np.ndarray | str:
        """The real cohort's features; what an extractor fits is fitted on it first."""
        if self.kept.get((extractor.name, real.name), (None,))[0] is not real.volumes:
            self.kept = {key: value for key, value in self.kept.items() if key[0] != extractor.name}
            extractor.fit(real.volumes)
        return self.features(extractor, real)

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        scatter: dict[str, list] = {}
        for extractor in self.extractors:
            real = self.of_real(extractor, cohorts.real)
            own = real if isinstance(real, str) or cohort is cohorts.real else self.features(extractor, cohort)
            reason = real if isinstance(real, str) else own if isinstance(own, str) else ""
            if reason:
                notes.append(f"{extractor.title}: {reason}.")
            elif len(real) >= 2:
                scatter[extractor.name] = principal_plane(described(real), described(own))
            if cohort is not cohorts.real:
                rows += self.rows(extractor, real, own, reason, cohort)
        if cohort is cohorts.real:
            notes.append(
                f"Each row compares a cohort with the {len(cohort)} real volumes. A Frechet distance (FID) grows as "
                "cohorts shrink: compare cohorts of one size, the held-out one first of all."
            )
        return {"rows": rows, "notes": notes, "data": {"scatter": scatter}}

    def rows(
        self, extractor: Extractor, real: np.ndarray | str, own: np.ndarray | str, reason: str, cohort: Cohort
    ) -> list[dict[str, Any]]:
        """The rows of one extractor and cohort; without features or with too few volumes their values are None."""
        planes = extractor.planes(cohort.volumes.ndim - 1)
        frechet, mmd = (f"{distance}_{extractor.name}" for distance in extractor.distances)
        values: dict[str, np.ndarray | None] = {}
        note = prdc_note = reason
        if not reason and min(len(real), len(own)) < 3:
            note = prdc_note = f"needs 3 volumes or more, found {len(real)} real and {len(own)} in {cohort.name}"
        elif not reason and min(len(real), len(own)) <= self.nearest_k:
            prdc_note = (
                f"needs more volumes than nearest_k = {self.nearest_k}, "
                f"found {len(real)} real and {len(own)} in {cohort.name}"
            )
        if not note:
            counts = bootstrap_counts(len(own), self.num_resamples, self.seed)
            counts = np.concatenate([np.ones((1, len(own)), counts.dtype), counts])
            distances, discrepancies = [], []
            for p, plane in enumerate(planes):
                x, y = real[:, p], own[:, p]
                bar = f"{frechet} of {cohort.name}" + (f", {plane}" if plane else "")
                of_images = np.repeat(counts, y.shape[1], 1)
                distances.append(
                    frechet_distances(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), of_images, bar)
                )
                discrepancies.append(
                    unbiased_mmd(volume_kernel(x, x), volume_kernel(x, y), volume_kernel(y, y), counts)
                )
            if len(planes) > 1:
                values |= {f"{frechet}_{plane}": d for plane, d in zip(planes, distances)}
            values |= {frechet: np.mean(distances, 0), mmd: np.mean(discrepancies, 0)}
            if not prdc_note:
                found = prdc(described(real), described(own), self.nearest_k, counts)
                values |= {f"{name}_{extractor.name}": v for name, v in found.items()}
        per_plane = [(f"{frechet}_{plane}", "frechet") for plane in planes] if len(planes) > 1 else []
        wanted = [
            (frechet, "frechet"),
            *per_plane,
            (mmd, "mmd"),
            *((f"{name}_{extractor.name}", name) for name in PRDC),
        ]
        return [
            resampled_row(
                metric,
                values.get(metric),
                "higher" if kind in PRDC else "lower",
                BOUNDS.get(kind, (0, 1)),
                (prdc_note if kind in PRDC else note) or (extractor.title if metric == frechet else ""),
            )
            for metric, kind in wanted
        ]

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict[str, Any]]:
        """Frechet distances with their intervals, and all volumes in two principal components of the real features."""
        names = [cohort.name for cohort in cohorts]
        colours = cohorts.colours
        figures = []
        shown = [e for e in self.extractors if e.name in results[cohorts.real.name]["data"]["scatter"]]
        distances = {
            e.name: {
                name: found
                for name in names
                for found in results[name]["rows"]
                if found["metric"] == f"{e.distances[0]}_{e.name}" and found["value"] is not None
            }
            for e in shown
        }
        with_distances = [e for e in shown if distances[e.name]]
        if with_distances:
            figure = Figure(figsize=(9, (0.9 + 0.32 * len(names)) * len(with_distances)), layout="constrained")
            for extractor, axes in zip(with_distances, figure.subplots(len(with_distances), squeeze=False)[:, 0]):
                draw_distances(axes, distances[extractor.name], colours)
                axes.set_title(extractor.title, fontsize=10)
                axes.set_xlabel(f"{'FID' if extractor.distances[0] == 'fid' else 'Frechet distance'}, lower is better")
            caption = (
                "Frechet distance of each cohort's features to the real cohort's, with 95 % bootstrap intervals over "
                "volumes. The axis is linear up to the smallest distance above zero and logarithmic beyond."
            )
            figures.append(save_figure(figure, folder, "fidelity_frechet.png", "Distance to the real volumes", caption))
        if shown:
            figure = Figure(figsize=(9, 4.2 * -(-len(shown) // 2)), layout="constrained")
            grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).ravel()
            for extractor, axes in zip(shown, grid):
                for name in [*names[1:], names[0]]:  # the real one on top, hollow, as copies of it hide it else
                    points = np.array(results[name]["data"]["scatter"].get(extractor.name, [])).reshape(-1, 2)
                    real = name == cohorts.real.name
                    filling = {"facecolors": "none" if real else colours[name], "edgecolors": colours[name]}
                    axes.scatter(*points.T, s=30 if real else 18, alpha=0.7, linewidths=real, label=name, **filling)
                if max(np.abs(axes.get_xlim()).max(), np.abs(axes.get_ylim()).max()) > 10:  # far-off cohorts
                    axes.set_xscale("symlog", linthresh=3)
                    axes.set_yscale("symlog", linthresh=3)
                axes.set_title(extractor.title, fontsize=10)
                axes.set_xlabel("component 1 (standard deviations)")
                axes.set_ylabel("component 2 (standard deviations)")
            for axes in grid[len(shown) :]:
                axes.axis("off")
            (
                grid[0].legend(fontsize=8)
                if len(shown) == len(grid)
                else grid[-1].legend(*grid[0].get_legend_handles_labels(), loc="upper left", fontsize=9, frameon=False)
            )
            caption = (
                "Each dot is a volume, in the first two principal components of the real cohort's features. Where some "
                "volumes are far off, axes are linear up to 3 standard deviations of the real ones, logarithmic beyond."
            )
            figures.append(save_figure(figure, folder, "fidelity_scatter.png", "Volumes by their features", caption))
        return figures


def described(features: np.ndarray) -> np.ndarray:
    """(N, planes, images, d) -> (N, planes * d): the mean of a volume's images, planes side by side."""
    return features.mean(2).reshape(len(features), -1).astype(np.float64)


def principal_plane(real: np.ndarray, own: np.ndarray) -> list[list[float]]:
    """(n, d), (m, d) -> (m, 2): scores on the first two principal components of `real`, in its standard deviations."""
    mean = real.mean(0)
    _, s, axes = svd(real - mean, full_matrices=False)
    scores = (own - mean) @ axes[:2].T / np.maximum(s[:2] / np.sqrt(len(real) - 1), 1e-9)
    padded = np.zeros((len(own), 2))
    padded[:, : scores.shape[1]] = scores
    return padded.round(4).tolist()


def draw_distances(axes: Any, rows: dict[str, dict[str, Any]], colours: dict[str, str]) -> None:
    """One dot with its interval a cohort, the first on top."""
    for i, (name, found) in enumerate(rows.items()):
        ends = [found["value"] if found[end] is None else found[end] for end in ("low", "high")]
        axes.plot(ends, [i, i], color=colours[name], linewidth=2)
        axes.plot(found["value"], i, "o", color=colours[name])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    smallest = min((r["value"] for r in rows.values() if r["value"] > 1e-9), default=1.0)
    axes.set_xscale("symlog", linthresh=smallest)
    axes.set_xlim(left=-0.1 * smallest)
    axes.grid(axis="x", color="0.9")
