"""Loss on held-out volumes with fixed noise and timesteps, as a whole and by quarter of the timesteps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.utils import CommonKeys
from torch.utils.tensorboard import SummaryWriter

from scripts.running.processes import gathered
from scripts.training.intervals import IntervalHandler

logger = logging.getLogger(__name__)

QUARTERS = 4


class TimestepLoss:
    """Evaluator handler: metrics "loss" and "loss_quarter_1" (least noise) to "loss_quarter_4" (most noise).

    Their full names, as loggers and experiment trackers show them, are "validation_<weights>/loss" and so on.

    A sample belongs to quarter (draw mod 4) + 1, which is how `SeededPrepareBatch(num_strata=4)` draws timesteps. All
    processes get the metrics of the samples of all of them, in the order of the draws; one that came twice counts once.

    Args:
        loss_function: (prediction, target) -> mean loss, the one of the training.
        weights: "raw" or "ema": whose loss it is.
    """

    def __init__(self, loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], weights: str) -> None:
        self.loss_function, self.weights = loss_function, weights
        self.losses: dict[int, torch.Tensor] = {}  # by draw

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        self.losses = {}

    def __call__(self, engine: Engine) -> None:
        output = engine.state.output
        for draw, prediction, wanted in zip(
            engine.state.batch["draw"], output[CommonKeys.PRED], output[CommonKeys.LABEL]
        ):
            self.losses[int(draw)] = self.loss_function(prediction[None], wanted[None])

    def finish(self, engine: Engine) -> None:
        name, metrics = f"validation_{self.weights}/loss", engine.state.metrics
        mine = dict(zip(self.losses, torch.stack([*self.losses.values()]).cpu()))
        found = sorted({draw: loss for losses in gathered(mine) for draw, loss in losses.items()}.items())
        quarters = [[loss for draw, loss in found if draw % QUARTERS == i] for i in range(QUARTERS)]
        metrics[name] = float(torch.stack([loss for losses in quarters for loss in losses]).mean())
        for i, losses in enumerate(quarters, 1):
            metrics[f"{name}_quarter_{i}"] = float(torch.stack(losses).mean())


class ValidationHandler(IntervalHandler):
    """Trainer handler like MONAI's `ValidationHandler`, by iterations, which also records what was measured.

    Args:
        interval: in iterations.
        validator: evaluator with a `TimestepLoss` handler.
        weights: "raw" or "ema": whose loss it is.
        record: a `CsvRecord` with the columns weights, loss, loss_quarter_1 ... loss_quarter_4.
        summary_writer: TensorBoard writer that also gets the losses.
    """

    def __init__(
        self, interval: int, validator: Evaluator, weights: str, record: Any, summary_writer: SummaryWriter
    ) -> None:
        super().__init__(interval)
        self.validator, self.weights, self.record, self.summary_writer = validator, weights, record, summary_writer

    def __call__(self, engine: Engine) -> None:
        iteration = engine.state.iteration
        self.validator.run(iteration)  # what MONAI calls the epoch is the step at which trackers put the metrics
        loss = f"validation_{self.weights}/loss"
        metrics = {n: self.validator.state.metrics[n] for n in (loss, *(f"{loss}_quarter_{i}" for i in (1, 2, 3, 4)))}
        self.record.add(iteration, self.weights, *(f"{value:.6f}" for value in metrics.values()))
        for name, value in metrics.items():
            self.summary_writer.add_scalar(name, value, iteration)
        logger.info(f"iteration {iteration}: held-out loss {metrics[loss]:.5f} with {self.weights} weights")
