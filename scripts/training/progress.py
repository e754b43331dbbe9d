"""What one sees of a training while it runs: the bar, a row a loss, the curve."""

from __future__ import annotations

import gc

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from tqdm import tqdm

from scripts.training.curves import plot_losses
from scripts.training.records import TrainingRecords


class TrainingProgress:
    """Trainer handler: a bar with loss, speed and time left; a row of loss.csv each iteration; the loss curve.

    It also ends the run after `max_iterations`. Expects `engine.state.output` as a list of {"loss": float}.

    Args:
        records: of the run; the losses are written here.
        max_iterations: of the whole run, those before a resume included.
        plot_interval: loss_curve.png is drawn every so many iterations, and at the end.
    """

    def __init__(self, records: TrainingRecords, max_iterations: int, plot_interval: int) -> None:
        self.records, self.max_iterations, self.plot_interval = records, max_iterations, plot_interval
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.plot_interval), self.plot)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        self.records.losses.start(engine.state.iteration)
        self.records.validation.start(engine.state.iteration)
        if self.bar is not None:  # the run goes on after a surge
            self.bar.close()
        total = min(self.max_iterations, engine.state.max_epochs * engine.state.epoch_length)
        quiet = idist.get_rank() != 0
        self.bar = tqdm(desc="training", initial=engine.state.iteration, total=total, disable=quiet)
        self.stop_if_done(engine)

    def stop_if_done(self, engine: Engine) -> None:
        if engine.state.iteration >= self.max_iterations:
            engine.terminate()

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output[0][CommonKeys.LOSS]  # the batch's, beside each of its volumes
        self.records.losses.add(engine.state.iteration, engine.state.epoch, repr(loss))
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update()
        self.stop_if_done(engine)

    def plot(self, engine: Engine) -> None:
        if idist.get_rank() == 0:
            plot_losses(self.records, self.records.path("loss_curve.png"))
            gc.collect()  # a figure is a cycle of 4 MB, which Python would leave for thousands of iterations

    def finish(self, engine: Engine) -> None:
        self.bar.close()
        self.plot(engine)
