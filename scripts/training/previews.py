"""Samples of the network as it is now, while it is trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import optional_import
from torch.utils.tensorboard import SummaryWriter

from scripts.running.files import write_atomically
from scripts.running.pictures import mosaic, save_png, triplanar
from scripts.running.processes import shared_out
from scripts.training.curves import draw_losses
from scripts.training.intervals import IntervalHandler
from scripts.training.records import CsvRecord

png, _ = optional_import("matplotlib.image")
Figure, _ = optional_import("matplotlib.figure", name="Figure")


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
        losses, validation, surges: records for `scripts.training.curves.draw_losses`.
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
