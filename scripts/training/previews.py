"""Samples of the network as it is now, while it is trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import optional_import

from scripts.running.condition_images import CONDITION_IMAGE
from scripts.running.covariates import Covariate, one_word, unknown_of
from scripts.running.pictures import mosaic, save_png, triplanar, write_figure
from scripts.running.processes import shared_out
from scripts.training.curves import draw_losses
from scripts.training.intervals import IntervalHandler
from scripts.training.records import TrainingRecords

png, _ = optional_import("matplotlib.image")
Figure, _ = optional_import("matplotlib.figure", name="Figure")


class PreviewHandler(IntervalHandler):
    """Trainer handler: every `interval` iterations and at the end, sample volumes and write them as a PNG.

    At chosen epochs the samples also become a column of epochs.png, where they stand side by side with the loss beneath
    (Figures 10 to 12 of MRIDiff). A column is kept beside the previews, so that a resumed run has them all.

    Args:
        sampler: module, noise (B, C, *spatial), and conditions (B, ...) where there are covariates, -> volumes in
            [-1, 1]; its network should be the EMA one. Condition images are further channels of the noise.
        spatial_shape: of the volumes.
        interval: in iterations.
        records: of the run. Its folder receives previews/preview_00002500.png and so on, previews/epoch_00120.png and
            epochs.png; TensorBoard gets the previews, too.
        num_samples: volumes a preview; sampled one by one, always from the same noise.
        seed: of that noise.
        covariates: of the network, see `scripts.running.covariates`. The volumes take the words of one word in turn, a
            row each, or else the conditions of `subjects`.
        subjects: items of a dataset with a "condition"; without any, nothing is known of the volumes.
        volumes: the dataset of `subjects`, whose condition images, if any, the volumes are made from.
        epochs: whole numbers; 0 is before the first iteration, 120 after the last one of the 120th epoch.
    """

    def __init__(
        self,
        sampler: Callable[..., torch.Tensor],
        spatial_shape: Sequence[int],
        interval: int,
        records: TrainingRecords,
        num_samples: int = 4,
        seed: int = 0,
        covariates: Sequence[Covariate] = (),
        subjects: Sequence[Mapping[str, Any]] = (),
        volumes: Sequence[Mapping[str, Any]] = (),
        epochs: Sequence[int] = (),
    ) -> None:
        super().__init__(interval)
        self.sampler, self.records, self.epochs = sampler, records, sorted(epochs)
        self.folder = records.path("previews")
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(num_samples, 1, 1, *spatial_shape, generator=generator)
        self.volumes = volumes
        self.conditions: list[torch.Tensor] | None = None
        self.rows: list[int] | None = None
        if one_word(covariates):
            self.rows = [i % len(covariates[0]["words"]) for i in range(num_samples)]
            self.conditions = [torch.tensor(row) for row in self.rows]
        elif covariates:
            every = [item["condition"] for item in subjects] or [unknown_of(covariates)]
            self.conditions = [torch.tensor(every[i], dtype=torch.float32) for i in self.chosen(len(every))]

    def chosen(self, count: int) -> list[int]:
        """Evenly chosen places of `count`, one a volume."""
        return np.linspace(0, count - 1, len(self.noise)).round().astype(int).tolist()

    def with_images(self) -> torch.Tensor:
        """The noise, with the condition images of subjects as further channels where there are any."""
        if not len(self.volumes) or CONDITION_IMAGE not in self.volumes[0]:
            return self.noise
        images = torch.stack([self.volumes[i][CONDITION_IMAGE] for i in self.chosen(len(self.volumes))])
        return torch.cat([self.noise, images[:, None]], 2)

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        if self.epochs:
            engine.add_event_handler(Events.STARTED, self.at_epoch)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.at_epoch)
            engine.add_event_handler(Events.COMPLETED, self.draw_epochs)

    def strips(self, engine: Engine) -> list[np.ndarray]:
        """The samples of the network as it is now, each as `triplanar` gives it; the processes share them out."""
        noise = self.with_images()
        inputs = [noise] if self.conditions is None else [noise, torch.stack(self.conditions)[:, None]]

        def strip(each: tuple[torch.Tensor, ...]) -> np.ndarray:
            return triplanar(self.sampler(*(x.to(engine.state.device) for x in each))[0, 0].cpu().numpy())

        return shared_out(strip, list(zip(*inputs)))

    def __call__(self, engine: Engine) -> None:
        picture = mosaic(self.strips(engine), labels=self.rows)
        if idist.get_rank() > 0:
            return
        os.makedirs(self.folder, exist_ok=True)
        save_png(picture, os.path.join(self.folder, f"preview_{engine.state.iteration:08d}.png"), -1, 1)
        self.records.summary_writer.add_image(
            "preview", np.clip((picture + 1) / 2, 0, 1), engine.state.iteration, dataformats="HW"
        )

    def column(self, epoch: int) -> str:
        """Path of the samples of one epoch."""
        return os.path.join(self.folder, f"epoch_{epoch:05d}.png")

    def at_epoch(self, engine: Engine) -> None:
        epoch, within = divmod(engine.state.iteration, engine.state.epoch_length)
        if within == 0 and epoch in self.epochs:
            strips = self.strips(engine)
            if idist.get_rank() == 0:
                os.makedirs(self.folder, exist_ok=True)
                save_png(np.concatenate(strips, 0), self.column(epoch), -1, 1)
            self.draw_epochs(engine)

    @idist.one_rank_only()
    def draw_epochs(self, engine: Engine) -> None:
        """Write epochs.png with the columns that there are."""
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
        if not len(draw_losses(axes, self.records)):
            return
        for place, epoch, column in zip(above.subplots(1, len(columns), squeeze=False)[0], reached, columns):
            place.imshow(column, interpolation="nearest")
            place.set_title(f"epoch {epoch}")
            place.axis("off")
            axes.axvline(iterations[epoch], color="0.5", linestyle="--", linewidth=0.8)
            above_the_axes = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": "center"}
            axes.text(iterations[epoch], 1, f"epoch {epoch}", **above_the_axes)
        write_figure(figure, self.records.path("epochs.png"))
