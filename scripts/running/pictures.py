"""Volumes as pictures: tri-planar strips, mosaics, and the handlers that write them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import optional_import
from torch.utils.tensorboard import SummaryWriter

from scripts.running.files import write_atomically
from scripts.running.processes import gathered, shared_out
from scripts.training.intervals import IntervalHandler
from scripts.training.records import CsvRecord, draw_losses

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


def save_figure(figure: Figure, folder: str, file: str, title: str, caption: str) -> dict[str, str]:
    """Write a figure as PNG and return its entry in an evaluation's report."""
    write_atomically(os.path.join(folder, file), lambda path: figure.savefig(path, dpi=110, format="png"))
    return {"file": file, "title": title, "caption": caption}


@idist.one_rank_only()
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
    cube = noise.ndim == 5 and len(set(noise.shape[2:])) == 1  # three planes of one size
    columns = [np.concatenate(np.split(s, 3, 1), 0) if cube else s for s in strips]
    factor = max(1, -(-96 // noise.shape[-1]))
    save_png(np.concatenate(columns, 1).repeat(factor, 0).repeat(factor, 1), path, -1, 1)
    logger.info(f"from noise to volume: {path}")


class PreviewHandler(IntervalHandler):
    """Trainer handler: every `interval` iterations and at the end, sample volumes and write them as a PNG.

    Args:
        sampler: module, noise (B, C, *spatial), and class labels (B,) where there are `class_names`, -> volumes in
            [-1, 1]; its network should be the EMA one.
        spatial_shape: of the volumes.
        interval: in iterations.
        folder: receives preview_00002500.png and so on.
        num_samples: volumes a preview; sampled one by one, always from the same noise.
        seed: of that noise.
        summary_writer: TensorBoard writer that also gets the picture.
        class_names: the volumes take these classes in turn, a row each; None where the network has no classes.
    """

    def __init__(
        self,
        sampler: Callable[..., torch.Tensor],
        spatial_shape: list[int],
        interval: int,
        folder: str,
        num_samples: int = 4,
        seed: int = 0,
        summary_writer: SummaryWriter | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(interval)
        self.sampler, self.folder, self.summary_writer = sampler, folder, summary_writer
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(num_samples, 1, 1, *spatial_shape, generator=generator)
        self.labels = [i % len(class_names) for i in range(num_samples)] if class_names else None

    def strips(self, engine: Engine) -> list[np.ndarray]:
        """The samples of the network as it is now, each as `triplanar` gives it; the processes share them out."""
        inputs = [self.noise] if self.labels is None else [self.noise, torch.tensor(self.labels)[:, None]]

        def strip(each: tuple[torch.Tensor, ...]) -> np.ndarray:
            return triplanar(self.sampler(*(x.to(engine.state.device) for x in each))[0, 0].cpu().numpy())

        return shared_out(strip, list(zip(*inputs)))

    def __call__(self, engine: Engine) -> None:
        picture = mosaic(self.strips(engine), labels=self.labels)
        if idist.get_rank() > 0:
            return
        os.makedirs(self.folder, exist_ok=True)
        save_png(picture, os.path.join(self.folder, f"preview_{engine.state.iteration:08d}.png"), -1, 1)
        if self.summary_writer is not None:
            self.summary_writer.add_image(
                "preview", np.clip((picture + 1) / 2, 0, 1), engine.state.iteration, dataformats="HW"
            )


class EpochsHandler:
    """Trainer handler: samples at chosen epochs side by side, with the loss beneath (Figures 10 to 12 of MRIDiff).

    The column of an epoch is kept in the folder of the previews (epoch_00120.png), so that a resumed run has them all.

    Args:
        previews: samples, always from the same noise; attached as well.
        epochs: whole numbers; 0 is before the first iteration, 120 after the last one of the 120th epoch.
        path: of the picture, which is drawn anew at each of them and at the end.
        losses, validation, surges: records for `scripts.training.records.draw_losses`.
    """

    def __init__(
        self,
        previews: PreviewHandler,
        epochs: Sequence[int],
        path: str,
        losses: CsvRecord,
        validation: CsvRecord,
        surges: CsvRecord | None = None,
    ) -> None:
        self.previews, self.epochs, self.path = previews, sorted(epochs), path
        self.records = (losses, validation, surges)

    def attach(self, engine: Engine) -> None:
        self.previews.attach(engine)
        if self.epochs:
            engine.add_event_handler(Events.STARTED, self)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)
            engine.add_event_handler(Events.COMPLETED, self.draw)

    def column(self, epoch: int) -> str:
        return os.path.join(self.previews.folder, f"epoch_{epoch:05d}.png")

    def __call__(self, engine: Engine) -> None:
        epoch, within = divmod(engine.state.iteration, engine.state.epoch_length)
        if within == 0 and epoch in self.epochs:
            strips = self.previews.strips(engine)
            if idist.get_rank() == 0:
                os.makedirs(self.previews.folder, exist_ok=True)
                save_png(np.concatenate(strips, 0), self.column(epoch), -1, 1)
            self.draw(engine)

    @idist.one_rank_only()
    def draw(self, engine: Engine) -> None:
        iterations = {epoch: epoch * engine.state.epoch_length for epoch in self.epochs}
        reached = [e for e, i in iterations.items() if i <= engine.state.iteration and os.path.exists(self.column(e))]
        if not reached:
            return
        columns = [png.imread(self.column(epoch)) for epoch in reached]
        width = max(8, 1.6 * len(columns))
        rows, across = columns[0].shape[:2]
        height = min(8, width / len(columns) * rows / across)
        figure = Figure(figsize=(width, height + 3.4), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(height + 0.4, 3))
        axes = below.subplots()
        if not len(draw_losses(axes, *self.records)):
            return
        for place, epoch, column in zip(above.subplots(1, len(columns), squeeze=False)[0], reached, columns):
            place.imshow(column, interpolation="nearest")
            place.set_title(f"epoch {epoch}")
            place.axis("off")
            axes.axvline(iterations[epoch], color="0.5", linestyle="--", linewidth=0.8)
            above_the_axes = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": "center"}
            axes.text(iterations[epoch], 1, f"epoch {epoch}", **above_the_axes)
        write_atomically(self.path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


class MosaicHandler:
    """Evaluator handler: collect the middle slices of every volume of a run and write one mosaic at its end.

    Volumes of several classes stand in a row a class. Expects `engine.state.output` as a list of {"pred": (1, *spatial)
    in [0, 255]} and `engine.state.batch` as a list of {"image": noise with meta "volume", "class_label": index}.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.strips: dict[int, tuple[np.ndarray, int]] = {}  # by volume, with its class

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def add(self, volume: int, voxels: np.ndarray, class_label: int) -> None:
        """One volume (*spatial); one that was there before the run, too."""
        self.strips[volume] = triplanar(voxels), class_label

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            voxels = torch.as_tensor(output["pred"])[0].cpu().numpy()
            self.add(int(item["image"].meta["volume"]), voxels, int(item["class_label"]))

    def write(self, engine: Engine) -> None:
        """Of several processes rank 0 writes the strips of all."""
        everything = {volume: strip for part in gathered(self.strips) for volume, strip in part.items()}
        self.strips = {}
        if everything and idist.get_rank() == 0:
            strips, labels = zip(*(everything[volume] for volume in sorted(everything)))
            save_png(mosaic(list(strips), labels=labels), self.path, 0, 255)
            logger.info(f"{len(strips)} volumes as one picture: {self.path}")
