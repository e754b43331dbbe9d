"""Volumes as pictures: tri-planar strips, mosaics, and the handlers that write them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import optional_import
from torch.utils.tensorboard import SummaryWriter

from scripts.files import write_atomically
from scripts.intervals import IntervalHandler

# optional: other programs build the handlers of a config to look at it, and few of them have matplotlib
png, _ = optional_import("matplotlib.image")
Axes, _ = optional_import("matplotlib.axes", name="Axes")
Figure, _ = optional_import("matplotlib.figure", name="Figure")
logger = logging.getLogger(__name__)


def triplanar(volume: np.ndarray) -> np.ndarray:
    """The middle sagittal, coronal and axial slice of a RAS volume, side by side: (rows, columns).

    Superior (sagittal, coronal) or anterior (axial) is up, and left is left. A 2D image is turned the same way. Slices
    of different height are padded with the volume's minimum.
    """
    if volume.ndim == 2:
        return np.rot90(volume)
    x, y, z = (side // 2 for side in volume.shape)
    slices = [np.rot90(s) for s in (volume[x, :, :], volume[:, y, :], volume[:, :, z])]
    rows = max(s.shape[0] for s in slices)
    padded = [
        np.pad(s, (((rows - s.shape[0]) // 2, -(-(rows - s.shape[0]) // 2)), (0, 0)), constant_values=volume.min())
        for s in slices
    ]
    return np.concatenate(padded, 1)


def mosaic(strips: list[np.ndarray], gap: int = 2, smallest: int = 96) -> np.ndarray:
    """Strips of the same shape on a near-square grid, enlarged (whole factors) until a slice has `smallest` rows."""
    rows, columns = strips[0].shape
    across = max(1, round(np.sqrt(len(strips) * rows / columns)))
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


def save_figure(figure: Figure, folder: str, file: str, title: str, caption: str) -> dict[str, str]:
    """Write a figure as PNG and return its entry in an evaluation's report."""
    write_atomically(os.path.join(folder, file), lambda path: figure.savefig(path, dpi=110, format="png"))
    return {"file": file, "title": title, "caption": caption}


def save_denoising(
    sampler: Callable[[torch.Tensor], torch.Tensor], noise: torch.Tensor, path: str, num_frames: int = 8
) -> None:
    """Write the way from noise to volume as a PNG: a column a moment, a row a plane (sagittal, coronal, axial).

    Args:
        sampler: a `DiffusionSampler`, for its `trajectory`.
        noise: standard normal noise of one volume, (1, C, *spatial), on the sampler's device.
        path: of the picture.
        num_frames: columns, evenly chosen among the steps; the first is the noise, the last the volume.
    """
    volumes = sampler.trajectory(torch.as_tensor(noise).as_subclass(torch.Tensor))
    chosen = np.unique(np.linspace(0, len(volumes) - 1, num_frames).round().astype(int))
    strips = [triplanar(volumes[i][0, 0].cpu().numpy()) for i in chosen]
    columns = [np.concatenate(np.split(s, 3, 1) if s.shape[1] == 3 * s.shape[0] else [s], 0) for s in strips]
    factor = max(1, -(-96 // noise.shape[-1]))
    save_png(np.concatenate(columns, 1).repeat(factor, 0).repeat(factor, 1), path, -1, 1)
    logger.info(f"from noise to volume: {path}")


class PreviewHandler(IntervalHandler):
    """Trainer handler: every `interval` iterations and at the end, sample volumes and write them as a PNG.

    Args:
        sampler: module, noise (B, C, *spatial) -> volumes in [-1, 1]; its network should be the EMA one.
        spatial_shape: of the volumes.
        interval: in iterations.
        folder: receives preview_00002500.png and so on.
        num_samples: volumes a preview; sampled one by one, always from the same noise.
        seed: of that noise.
        summary_writer: TensorBoard writer that also gets the picture.
    """

    def __init__(
        self,
        sampler: Callable[[torch.Tensor], torch.Tensor],
        spatial_shape: list[int],
        interval: int,
        folder: str,
        num_samples: int = 4,
        seed: int = 0,
        summary_writer: SummaryWriter | None = None,
    ) -> None:
        super().__init__(interval)
        self.sampler, self.folder, self.summary_writer = sampler, folder, summary_writer
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(num_samples, 1, 1, *spatial_shape, generator=generator)

    def __call__(self, engine: Engine) -> None:
        volumes = [self.sampler(noise.to(engine.state.device))[0, 0].cpu().numpy() for noise in self.noise]
        picture = mosaic([triplanar(volume) for volume in volumes])
        os.makedirs(self.folder, exist_ok=True)
        save_png(picture, os.path.join(self.folder, f"preview_{engine.state.iteration:08d}.png"), -1, 1)
        if self.summary_writer is not None:
            self.summary_writer.add_image(
                "preview", np.clip((picture + 1) / 2, 0, 1), engine.state.iteration, dataformats="HW"
            )


class MosaicHandler:
    """Evaluator handler: collect the middle slices of every volume of a run and write one mosaic at its end.

    Expects `engine.state.output` as a list of {"pred": (1, *spatial) in [0, 255]}.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.strips: list[np.ndarray] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.strips.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def __call__(self, engine: Engine) -> None:
        self.strips += [triplanar(torch.as_tensor(item["pred"])[0].cpu().numpy()) for item in engine.state.output]

    def write(self, engine: Engine) -> None:
        save_png(mosaic(self.strips), self.path, 0, 255)
        logger.info(f"{len(self.strips)} volumes as one picture: {self.path}")
