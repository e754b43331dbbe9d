"""Loss on held-out volumes with fixed noise and timesteps, as a whole and by quarter of the timesteps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.utils import CommonKeys
from torch import nn

from scripts.running.processes import gathered
from scripts.training.intervals import IntervalHandler
from scripts.training.records import TrainingRecords

logger = logging.getLogger(__name__)

QUARTERS = 4
OTHER = "other_conditions"


class TimestepLoss:
    """Evaluator handler: metrics "loss" and "loss_quarter_1" (least noise) to "loss_quarter_4" (most noise).

    Their full names, as loggers and experiment trackers show them, are "validation_raw/loss" and "validation_ema/loss"
    and so on, by whose weights the evaluator has for its network.

    A sample belongs to quarter (draw mod 4) + 1, which is how `SeededPrepareBatch(num_strata=4)` draws timesteps. All
    processes get the metrics of the samples of all of them, in the order of the draws; one that came twice counts once.

    Args:
        loss_function: (prediction, target) -> mean loss, the one of the training.
        ema_network: the average; any other network has the raw weights.
    """

    def __init__(
        self, loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ema_network: nn.Module
    ) -> None:
        self.loss_function, self.ema_network = loss_function, ema_network
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
        weights = "ema" if engine.network is self.ema_network else "raw"
        name, metrics = f"validation_{weights}/loss", engine.state.metrics
        by_draw = dict(zip(self.losses, torch.stack([*self.losses.values()]).cpu()))
        found = sorted({draw: loss for losses in gathered(by_draw) for draw, loss in losses.items()}.items())
        quarters = [[loss for draw, loss in found if draw % QUARTERS == i] for i in range(QUARTERS)]
        metrics[name] = float(torch.stack([loss for losses in quarters for loss in losses]).mean())
        for i, losses in enumerate(quarters, 1):
            metrics[f"{name}_quarter_{i}"] = float(torch.stack(losses).mean())


class ValidationHandler(IntervalHandler):
    """Trainer handler like MONAI's `ValidationHandler`, by iterations, for several networks, whose losses it records.

    Args:
        interval: in iterations.
        validator: evaluator with a `TimestepLoss` handler.
        networks: {"raw": the one that is trained, "ema": its average}; the evaluator runs with each of them in turn.
            One that is told covariates runs once more with the last, told those of other subjects
            ("ema_other_conditions"): a network that uses them is worse then.
        records: of the run; validation.csv is written here.
    """

    def __init__(
        self, interval: int, validator: Evaluator, networks: Mapping[str, nn.Module], records: TrainingRecords
    ) -> None:
        super().__init__(interval)
        self.validator, self.networks, self.records = validator, networks, records

    def __call__(self, engine: Engine) -> None:
        iteration, prepare = engine.state.iteration, self.validator.prepare_batch
        passes = [(weights, weights, network) for weights, network in self.networks.items()]
        told = getattr(prepare, "condition_key", None)
        if told:  # before the one whose losses the evaluator is left with
            passes.insert(-1, (f"{passes[-1][0]}_{OTHER}", *passes[-1][1:]))
        for name, weights, network in passes:
            self.validator.network = network
            if told:
                prepare.condition_key = "other_condition" if name.endswith(OTHER) else told
            self.validator.run(iteration)  # what MONAI calls the epoch is the step at which trackers put the metrics
            parts = ("", *(f"_quarter_{i}" for i in (1, 2, 3, 4)))
            losses = [self.validator.state.metrics[f"validation_{weights}/loss{part}"] for part in parts]
            self.records.validation.add(iteration, name, *(f"{value:.6f}" for value in losses))
            for part, value in zip(parts, losses, strict=True):
                self.records.summary_writer.add_scalar(f"validation_{name}/loss{part}", value, iteration)
            with_what = f"{weights} weights" + (", told of other subjects" if name != weights else "")
            logger.info(f"iteration {iteration}: held-out loss {losses[0]:.5f} with {with_what}")
