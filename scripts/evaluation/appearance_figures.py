"""The pictures of `scripts.evaluation.appearance`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from scripts.evaluation.cohorts import Cohort
from scripts.evaluation.evaluator import slug
from scripts.evaluation.spectrum import NYQUIST
from scripts.running.pictures import save_figure, triplanar

PLANES = ("sagittal", "coronal", "axial")


def draw_first(shown: list[Cohort], folder: str) -> dict:
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
                -0.04, 0.5, PLANES[row % 3], transform=panels[row, 0].transAxes, rotation=90, va="center", ha="right"
            )
    return save_figure(
        figure,
        folder,
        "appearance_first.png",
        "Side by side",
        "Centre slices of the first volume of each cohort, in the layout of figure 2 of Dorjsembe et al. 2022. The "
        "first ones are shown, not chosen ones.",
    )


def draw_samples(shown: list[Cohort], folder: str, num_shown: int) -> dict:
    """For each cohort a row a plane and a column a volume."""
    planes = len(slices(shown[0].volumes[0]))
    across = min(num_shown, max(len(cohort) for cohort in shown))
    # One picture a cohort: hundreds of panels would take minutes to lay out.
    grids = [
        _tiled([slices(volume.astype(np.float32)) for volume in cohort.volumes[:across]], across) for cohort in shown
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


def draw_moments(shown: list[Cohort], folder: str) -> dict:
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


def draw_histograms(results: dict, shown: list[Cohort], colours: dict[str, str], folder: str, num_bins: int) -> dict:
    """All cohorts in one plot."""
    figure = Figure((9.1, 4.2), 110, layout="constrained")
    panel = figure.subplots()
    edges = np.linspace(-1, 1, num_bins + 1)
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


def draw_spectra(results: dict, shown: list[Cohort], real: Cohort, colours: dict[str, str], folder: str) -> dict:
    """Power against frequency, and its ratio to the real cohort's."""
    figure = Figure((9.1, 4.4), 110, layout="constrained")
    power, ratio = figure.subplots(1, 2)
    base = np.array(results[real.name]["data"]["spectrum"]["mean"]) if real.name in results else None
    for cohort in shown:
        curves = {key: np.array(values) for key, values in results[cohort.name]["data"]["spectrum"].items()}
        x, style = curves["frequency"], {"color": colours[cohort.name], "linewidth": 1.5}
        power.plot(x, 10 ** curves["mean"], label=cohort.name, **style)
        power.fill_between(x, 10 ** curves["low"], 10 ** curves["high"], color=colours[cohort.name], alpha=0.12, lw=0)
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


def draw_extremes(data: dict, cohort: Cohort, real: Cohort, folder: str, number: int, num_extremes: int) -> dict:
    """Best on the left, worst on the right, each beside the real volume that is nearest to it."""
    order = np.argsort(data["distance"], kind="stable")
    count = min(num_extremes, len(order))
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
