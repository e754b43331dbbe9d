"""What volumes look like: slices, mean and spread, intensities, power spectra, and the rows that go with them.

A blurred generator lacks power at high spatial frequencies, a noisy one has too much; the signed row says which.
"""

from __future__ import annotations

import os

import numpy as np
from matplotlib.figure import Figure
from scipy import fft
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import euclidean_distances
from tqdm import tqdm

from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.evaluator import metric_row, slug
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError
from scripts.running.pictures import save_figure, triplanar

NYQUIST = 0.5  # cycles a voxel
LEAST_POWER = 1e-12  # an empty volume has a logarithm too
PLANES = ("sagittal", "coronal", "axial")


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
        for cohort in cohorts:
            if cohort.volumes.shape[1:] != shape:
                raise BundleError(
                    f"{cohort.name}: volumes of {cohort.volumes.shape[1:]} voxels were found; {shape}, as the real "
                    "ones have, would be right"
                )

    def describe(self, cohort: Cohort) -> dict[str, np.ndarray]:
        """Arrays of one entry a volume.

        Returns:
            {"frequency": (F) cycles a voxel, "log_power": (N, F) log10, "histogram": (N, bins) fractions of the voxels
            above -1 that sum to 1 (or to 0 for an empty volume), "foreground", "background", "symmetry": (N)}.
        """
        shell = outermost_shell(cohort.volumes.shape[1:])
        edges = np.linspace(-1, 1, self.num_bins + 1)
        parts: dict[str, list] = {}
        for volume in tqdm(cohort.volumes, f"spectra and intensities {cohort.name}", unit="volume"):
            x = volume.astype(np.float32)
            # Plus 1, so that the background is 0; frequency 0 is left out, it is the mean.
            frequency, power, _ = radial_power(x + 1)
            kept = (frequency > 0) & (frequency <= NYQUIST)
            bright = x[x > -1]
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
            note = "1D Wasserstein distance of the histograms of voxels above -1, each volume weighing the same"
            rows.append(
                metric_row("intensity_wasserstein", distance, *_distance_interval(distance, resampled), "lower", note)
            )
        rows.append(self._mean_row("foreground_fraction", own["foreground"], "voxels above -1, of all"))
        rows.append(self._mean_row("background_level", own["background"], "mean of the voxels at the volume's faces"))
        rows.append(self._mean_row("left_right_symmetry", own["symmetry"], "correlation with the own mirror image"))
        return rows

    def _notes(self, own: dict, cohort: Cohort) -> list[str]:
        empty = int((own["foreground"] == 0).sum())
        return [f"{cohort.name}: {empty} volumes are empty (every voxel is -1)."] if empty else []

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict]:
        """First volumes, samples, mean and deviation, intensities, spectra, each synthetic cohort's best and worst."""
        os.makedirs(folder, exist_ok=True)
        shown = [cohort for cohort in cohorts if cohort.name in results]
        if not shown:
            return []
        colours = cohorts.colours
        entries = [self._draw_first(shown, folder), self._draw_samples(shown, folder)]
        entries += [self._draw_moments(shown, folder)]
        entries += [self._draw_histograms(results, shown, colours, folder)]
        entries += [self._draw_spectra(results, shown, cohorts.real, colours, folder)]
        for number, cohort in enumerate(cohorts.synthetic, 1):
            if cohort.name in results:
                entries.append(self._draw_extremes(results[cohort.name]["data"], cohort, cohorts.real, folder, number))
        return entries

    def _draw_first(self, shown: list[Cohort], folder: str) -> dict:
        """A column a cohort, a row a plane: the first volume of each."""
        across = min(6, len(shown))
        planes = len(slices(shown[0].volumes[0]))
        bands = -(-len(shown) // across)
        figure = Figure((9.1, (9.1 / max(across, 3) + 0.05) * planes * bands + 0.3 * bands), 110, layout="constrained")
        panels = _grid(figure, planes * bands, across)
        for number, cohort in enumerate(shown):
            band, column = divmod(number, across)
            column_panels = panels[band * planes : (band + 1) * planes, column]
            for panel, image in zip(column_panels, slices(cohort.volumes[0].astype(np.float32))):
                panel.imshow(image, cmap="gray", vmin=-1, vmax=1)
            column_panels[0].set_title(cohort.name, fontsize=9)
        for row in range(planes * bands):
            if planes == 3:
                panels[row, 0].text(
                    -0.04,
                    0.5,
                    PLANES[row % 3],
                    transform=panels[row, 0].transAxes,
                    rotation=90,
                    va="center",
                    ha="right",
                )
        return save_figure(
            figure,
            folder,
            "appearance_first.png",
            "Side by side",
            "Centre slices of the first volume of each cohort, in the layout of figure 2 of Dorjsembe et al. 2022. The "
            "first ones are shown, not chosen ones.",
        )

    def _draw_samples(self, shown: list[Cohort], folder: str) -> dict:
        """For each cohort a row a plane and a column a volume."""
        planes = len(slices(shown[0].volumes[0]))
        across = min(self.num_shown, max(len(cohort) for cohort in shown))
        # One picture a cohort: hundreds of panels would take minutes to lay out.
        grids = [
            _tiled([slices(volume.astype(np.float32)) for volume in cohort.volumes[:across]], across)
            for cohort in shown
        ]
        width = 9.0 * min(1, across / 4)
        height = width * grids[0].shape[0] / grids[0].shape[1] + 0.28
        figure = Figure((width + 0.1, height * len(shown)), 110, layout="constrained")
        for panel, cohort, grid in zip(_grid(figure, len(shown), 1)[:, 0], shown, grids):
            panel.imshow(grid, cmap="gray", vmin=-1, vmax=1)
            panel.set_title(cohort.name, fontsize=9, loc="left")
        return save_figure(
            figure,
            folder,
            "appearance_samples.png",
            "Samples",
            f"Centre slices ({', '.join(PLANES) if planes == 3 else 'the images'}) of the first {across} volumes of "
            "each cohort, in the layout of figure 3 of Dorjsembe et al. 2022.",
        )

    def _draw_moments(self, shown: list[Cohort], folder: str) -> dict:
        """A row a cohort: mean and standard deviation, each kind with one colour scale."""
        moments = []
        for cohort in shown:
            # The middle slices commute with the mean over volumes, so only they are read.
            strips = np.stack([triplanar(volume.astype(np.float32)) for volume in cohort.volumes])
            moments.append((strips.mean(0), strips.std(0)))
        rows, columns = moments[0][0].shape
        width = 4.1 if columns > 1.5 * rows else 2.4
        height = (width * rows / columns + 0.1) * len(shown) + 0.4
        figure = Figure((2 * width + 0.9, height), 110, layout="constrained")
        panels = _grid(figure, len(shown), 2)
        largest = max(std.max() for _, std in moments) or 1
        for row, (cohort, (mean, std)) in enumerate(zip(shown, moments)):
            of_mean = panels[row, 0].imshow(mean, cmap="gray", vmin=-1, vmax=1)
            of_std = panels[row, 1].imshow(std, cmap="viridis", vmin=0, vmax=largest)
            panels[row, 0].text(
                -0.02,
                0.5,
                cohort.name,
                transform=panels[row, 0].transAxes,
                rotation=90,
                va="center",
                ha="right",
                fontsize=9,
            )
        panels[0, 0].set_title("mean", fontsize=9)
        panels[0, 1].set_title("standard deviation", fontsize=9)
        for column, (image, ticks) in enumerate(((of_mean, (-1, -0.5, 0, 0.5, 1)), (of_std, None))):
            bar = figure.colorbar(
                image, ax=panels[:, column].tolist(), ticks=ticks, location="bottom", pad=0.01, shrink=0.85
            )
            bar.ax.tick_params(labelsize=8)
        return save_figure(
            figure,
            folder,
            "appearance_moments.png",
            "Mean and standard deviation",
            "Centre slices of the voxel-wise mean and standard deviation over all volumes of a cohort; one scale for "
            "all. A standard deviation that is too dark means volumes that repeat.",
        )

    def _draw_histograms(self, results: dict, shown: list[Cohort], colours: dict[str, str], folder: str) -> dict:
        """All cohorts in one plot."""
        figure = Figure((9.1, 4.2), 110, layout="constrained")
        panel = figure.subplots()
        edges = np.linspace(-1, 1, self.num_bins + 1)
        tallest = 0.0
        for cohort in shown:
            density = np.array(results[cohort.name]["data"]["histogram"]) / (edges[1] - edges[0])
            style = {"color": colours[cohort.name], "linewidth": 1.5, "label": cohort.name}
            panel.stairs(density, edges, baseline=None, **style)
            tallest = max(tallest, density[edges[1:] > -0.75].max())
        panel.set(xlabel="intensity", ylabel="density of foreground voxels", xlim=(-1, 1))
        if tallest > 0:
            panel.set_ylim(0, 1.3 * tallest)
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
        return save_figure(
            figure,
            folder,
            "appearance_intensities.png",
            "Intensities",
            "Histogram of the voxels above -1 (the background), averaged over the volumes of a cohort. Just "
            "above -1, where a noisy or blurred background piles up, lines may leave the plot.",
        )

    def _draw_spectra(
        self, results: dict, shown: list[Cohort], real: Cohort, colours: dict[str, str], folder: str
    ) -> dict:
        """Power against frequency, and its ratio to the real cohort's."""
        figure = Figure((9.1, 4.4), 110, layout="constrained")
        power, ratio = figure.subplots(1, 2)
        base = np.array(results[real.name]["data"]["spectrum"]["mean"]) if real.name in results else None
        for cohort in shown:
            curves = {key: np.array(values) for key, values in results[cohort.name]["data"]["spectrum"].items()}
            x, style = curves["frequency"], {"color": colours[cohort.name], "linewidth": 1.5}
            power.plot(x, 10 ** curves["mean"], label=cohort.name, **style)
            power.fill_between(
                x, 10 ** curves["low"], 10 ** curves["high"], color=colours[cohort.name], alpha=0.12, lw=0
            )
            if base is not None:
                ratio.plot(x, curves["mean"] - base, **style)
        power.set(yscale="log", xlabel="cycles a voxel", ylabel="power")
        power.set_title("mean and 5 to 95 % of volumes", fontsize=9)
        ratio.axvspan(NYQUIST * 2 / 3, NYQUIST, color="0.94", zorder=0)
        ratio.set(xlabel="cycles a voxel", ylabel="log10(power / real power)")
        ratio.set_title("relative to real: below 0 blurred, above 0 noisy", fontsize=9)
        for panel in (power, ratio):
            panel.set_xlim(0, NYQUIST)
            panel.spines[["top", "right"]].set_visible(False)
        power.legend(fontsize=8, frameon=False)
        return save_figure(
            figure,
            folder,
            "appearance_spectra.png",
            "Power spectra",
            "Power of the spatial frequencies, averaged over directions. Blur lowers the right end, noise lifts it; "
            "shaded on the right: the third that spectrum_high_frequency averages.",
        )

    def _draw_extremes(self, data: dict, cohort: Cohort, real: Cohort, folder: str, number: int) -> dict:
        """Best on the left, worst on the right, each beside the real volume that is nearest to it."""
        order = np.argsort(data["distance"], kind="stable")
        count = min(self.num_extremes, len(order))
        first = triplanar(cohort.volumes[0])
        aspect = first.shape[0] / first.shape[1]
        figure = Figure((9.1, (9.1 / 4 * min(aspect, 1) + 0.3) * count + 0.5), 110, layout="constrained")
        halves = figure.subfigures(1, 2, wspace=0.04)
        for half, numbers, title in zip(halves, (order[:count], order[::-1][:count]), ("nearest to", "farthest from")):
            panels = _grid(half, count, 2)
            for row, i in enumerate(numbers):
                for panel, volume in zip(panels[row], (cohort.volumes[i], real.volumes[data["nearest"][i]])):
                    panel.imshow(triplanar(volume.astype(np.float32)), cmap="gray", vmin=-1, vmax=1)
                panels[row, 0].set_title(f"volume {i + 1}, distance {data['distance'][i]:.3f}", fontsize=8)
                panels[row, 1].set_title(f"nearest: real volume {data['nearest'][i] + 1}", fontsize=8)
            half.suptitle(f"{title} a real volume", fontsize=10)
        return save_figure(
            figure,
            folder,
            f"appearance_extremes_{number}_{slug(cohort.name)}.png",
            f"{cohort.name}: best and worst",
            f"The {count} volumes of {cohort.name} with the smallest and the {count} with the largest root mean square "
            "difference to their nearest real volume, which is shown beside. A very small distance may be a copy: see "
            "the section on memorisation.",
        )


def slices(volume: np.ndarray) -> list[np.ndarray]:
    """The middle slices of a volume that `triplanar` joins, each padded to a square; of an image, the image alone."""
    strip = triplanar(volume)
    if volume.ndim == 2:
        return [strip]
    widths = np.cumsum([volume.shape[1], volume.shape[0]])
    images = np.split(strip, widths, 1)
    side = max(max(image.shape) for image in images)
    padded = []
    for image in images:
        missing = [side - n for n in image.shape]
        padded.append(np.pad(image, [(m // 2, m - m // 2) for m in missing], constant_values=volume.min()))
    return padded


def _grid(figure: Figure, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) panels without axes."""
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.0, "hspace": 0.0})
    for panel in panels.flat:
        panel.set_axis_off()
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.03, h_pad=0.04, wspace=0.01, hspace=0.01)
    return panels


def _tiled(columns: list[list[np.ndarray]], across: int, gap: int = 2) -> np.ndarray:
    """Images of one shape as a table, white (nan) between them and where there is none; a list is one column."""
    rows, width = columns[0][0].shape
    table = np.full((len(columns[0]) * (rows + gap) - gap, across * (width + gap) - gap), np.nan, np.float32)
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            table[y * (rows + gap) :, x * (width + gap) :][:rows, :width] = image
    return table


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
