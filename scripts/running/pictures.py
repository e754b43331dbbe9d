"""Volumes as pictures, and figures: how they are drawn and written."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np
from monai.utils import optional_import

from scripts.running.files import write_atomically

# optional: other programs build the handlers of a config to look at it, and few of them have matplotlib
png, _ = optional_import("matplotlib.image")
Axes, _ = optional_import("matplotlib.axes", name="Axes")
Figure, _ = optional_import("matplotlib.figure", name="Figure")
logger = logging.getLogger(__name__)


def triplanar(volume: np.ndarray, at: Sequence[int] | None = None) -> np.ndarray:
    """The sagittal, coronal and axial slice of a RAS volume through its middle, or `at`, side by side: (rows, columns).

    Superior (sagittal, coronal) or anterior (axial) is up, and left is left. A 2D image is turned the same way. Slices
    of different height are padded with the volume's minimum.
    """
    if volume.ndim == 2:
        return np.rot90(volume)
    x, y, z = at or (side // 2 for side in volume.shape)
    slices = [np.rot90(s) for s in (volume[x, :, :], volume[:, y, :], volume[:, :, z])]
    rows = max(s.shape[0] for s in slices)
    padded = [
        np.pad(s, (((rows - s.shape[0]) // 2, -(-(rows - s.shape[0]) // 2)), (0, 0)), constant_values=volume.min())
        for s in slices
    ]
    return np.concatenate(padded, 1)


def mosaic(
    strips: list[np.ndarray], gap: int = 2, smallest: int = 96, labels: Sequence[int] | None = None
) -> np.ndarray:
    """Strips of the same shape on a near-square grid, enlarged (whole factors) until a slice has `smallest` rows.

    Where `labels`, one a strip, are not all the same, the grid has a row a class instead, in the order of the labels.
    """
    rows, columns = strips[0].shape
    across = max(1, round(np.sqrt(len(strips) * rows / columns)))
    if labels is not None and len(set(labels)) > 1:
        classes = [[s for s, of in zip(strips, labels, strict=True) if of == label] for label in sorted(set(labels))]
        across = max(map(len, classes))
        empty = np.full_like(strips[0], strips[0].min())
        strips = [strip for line in classes for strip in line + [empty] * (across - len(line))]
    blank = np.full((rows + gap, columns + gap), strips[0].min())
    cells = []
    for i in range(-(-len(strips) // across) * across):
        cell = blank.copy()
        if i < len(strips):
            cell[:rows, :columns] = strips[i]
        cells.append(cell)
    grid = np.concatenate([np.concatenate(cells[i : i + across], 1) for i in range(0, len(cells), across)])
    factor = max(1, -(-smallest // rows))
    return grid.repeat(factor, 0).repeat(factor, 1)


def save_png(picture: np.ndarray, path: str, low: float, high: float) -> None:
    """Write a grey picture (rows, columns); `low` is black and `high` white. The file appears whole or not at all."""
    write_atomically(
        path, lambda temporary: png.imsave(temporary, picture, cmap="gray", vmin=low, vmax=high, format="png")
    )


def draw_box(axes: Axes, place: float, values: np.ndarray, colour: str, mean_size: float) -> None:
    """A box of quartiles with whiskers at `place` on the x axis, without outliers; the mean is a white diamond."""
    line = {"color": colour}
    axes.boxplot(
        values,
        positions=[place],
        widths=0.6,
        showfliers=False,
        showmeans=True,
        medianprops=line,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": colour, "markersize": mean_size},
        zorder=2,
    )


def write_figure(figure: Figure, path: str) -> None:
    """Write a figure as PNG; the file appears whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def save_figure(figure: Figure, folder: str, file: str, title: str, caption: str) -> dict[str, str]:
    """Write a figure as PNG and return its entry in an evaluation's report."""
    write_figure(figure, os.path.join(folder, file))
    return {"file": file, "title": title, "caption": caption}
