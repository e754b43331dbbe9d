"""The record of a training run: progress bar, loss.csv, and the loss curve with its table."""

from __future__ import annotations

import csv
import gc
import os
from collections.abc import Sequence

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from monai.utils import CommonKeys, optional_import
from tqdm import tqdm

from scripts.running.errors import BundleError
from scripts.running.files import write_atomically

Axes, _ = optional_import("matplotlib.axes", name="Axes")  # as in scripts.running.pictures
Figure, _ = optional_import("matplotlib.figure", name="Figure")
STATISTICS = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")


class CsvRecord:
    """A CSV file that grows row by row and survives a kill: a resumed run drops the rows that it will write again.

    Of several processes, rank 0 writes.

    Args:
        path: of the file; its first column is "iteration".
        columns: names of the columns after the first.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self.path = path
        self.header = ["iteration", *columns]

    def start(self, iteration: int) -> None:
        """Keep the rows up to and including `iteration`; 0 begins the file anew."""
        if idist.get_rank() != 0:
            return
        kept = [row for row in self.rows() if int(row["iteration"]) <= iteration] if iteration else []
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        write_atomically(self.path, lambda temporary: self.write(temporary, kept))

    def write(self, path: str, rows: list[dict[str, str]]) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.header)
            writer.writeheader()
            writer.writerows(rows)

    def add(self, iteration: int, *values: float | str) -> None:
        if idist.get_rank() != 0:
            return
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([iteration, *values])
        except OSError as e:
            raise BundleError(
                f"{self.path!r} could not be written at iteration {iteration} ({e.strerror}); rows and checkpoints "
                "from before it are untouched: make room, then --resume true goes on"
            ) from e

    def flush(self) -> None:
        """Bring the rows so far to the disk, for the case of a power failure."""
        if idist.get_rank() == 0 and os.path.exists(self.path):
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())

    def rows(self) -> list[dict[str, str]]:
        """All complete rows; a last row that a kill has torn is left out."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        return [row for row in csv.DictReader(lines) if None not in row.values() and row["iteration"].isdigit()]


def loss_statistics(losses: np.ndarray) -> dict[str, float]:
    """Count, mean, sample standard deviation, minimum, quartiles and maximum (Table 1 of MRIDiff)."""
    quartiles = np.percentile(losses, [25, 50, 75])
    std = losses.std(ddof=1) if len(losses) > 1 else 0.0
    values = (len(losses), losses.mean(), std, losses.min(), *quartiles, losses.max())
    return dict(zip(STATISTICS, map(float, values)))


def draw_losses(axes: Axes, training: CsvRecord, validation: CsvRecord, surges: CsvRecord | None = None) -> np.ndarray:
    """Draw training and held-out losses against the iteration, and what a `scripts.training.surge.SurgeGuard` gave up.

    Returns:
        the training losses, one an iteration; nothing is drawn where there are none.
    """
    rows = training.rows()
    losses = np.array([float(row["loss"]) for row in rows])
    if not rows:
        return losses
    iterations = np.array([int(row["iteration"]) for row in rows])
    axes.plot(iterations, losses, color="0.8", linewidth=0.6, label="training, each batch")
    window = max(1, len(losses) // 50)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(iterations[window - 1 :], smooth, color="0.3", label=f"training, mean of {window}")
    for weights, colour in (("raw", "tab:orange"), ("ema", "tab:blue")):
        held_out = [row for row in validation.rows() if row["weights"] == weights]
        points = [(int(row["iteration"]), float(row["loss"])) for row in held_out]
        if points:
            axes.plot(*zip(*points), marker=".", color=colour, label=f"held out, {weights} weights")
    stretches: dict[str, list[tuple[int, float]]] = {}
    for row in surges.rows() if surges is not None else ():
        stretches.setdefault(row["surge"], []).append((int(row["iteration"]), float(row["loss"])))
    labels = {"label": "given up after a surge"}, {"label": "gone back to, with a lower learning rate"}
    for points in stretches.values():
        axes.plot(*zip(*points), color="tab:red", linewidth=0.8, **labels[0])
        axes.axvline(points[0][0] - 1, color="tab:red", linestyle=":", **labels[1])
        labels = {}, {}  # once in the legend
    axes.set(xlabel="iteration", ylabel="loss", yscale="log")
    axes.legend()
    return losses


def plot_losses(training: CsvRecord, validation: CsvRecord, path: str, surges: CsvRecord | None = None) -> None:
    """The picture of `draw_losses`, with the table of `loss_statistics` beside it."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes, side = figure.subplots(1, 2, width_ratios=(4, 1))
    losses = draw_losses(axes, training, validation, surges)
    if not len(losses):
        return
    side.axis("off")
    table = side.table([[f"{v:.5g}"] for v in loss_statistics(losses).values()], rowLabels=STATISTICS, loc="center")
    table.scale(1, 1.4)
    side.set_title("training loss")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


class TrainingRecord:
    """Trainer handler: a bar with loss, speed and time left; a row of loss.csv each iteration; the loss curve.

    It also ends the run after `max_iterations`. Expects `engine.state.output` as a list of {"loss": float}.

    Args:
        losses: record with the columns "epoch" and "loss", written here.
        validation: record of `scripts.training.validation.ValidationHandler`, for the curve.
        curve: path of the picture.
        max_iterations: of the whole run, those before a resume included.
        plot_interval: the curve is drawn every so many iterations, and at the end.
        surges: record of `scripts.training.surge.SurgeGuard`, for the curve.
    """

    def __init__(
        self,
        losses: CsvRecord,
        validation: CsvRecord,
        curve: str,
        max_iterations: int,
        plot_interval: int,
        surges: CsvRecord | None = None,
    ) -> None:
        self.losses, self.validation, self.curve, self.surges = losses, validation, curve, surges
        self.max_iterations, self.plot_interval = max_iterations, plot_interval
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.plot_interval), self.plot)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        self.losses.start(engine.state.iteration)
        self.validation.start(engine.state.iteration)
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
        self.losses.add(engine.state.iteration, engine.state.epoch, repr(loss))
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update()
        self.stop_if_done(engine)

    def plot(self, engine: Engine) -> None:
        if idist.get_rank() == 0:
            plot_losses(self.losses, self.validation, self.curve, self.surges)
            gc.collect()  # a figure is a cycle of 4 MB, which Python would leave for thousands of iterations

    def finish(self, engine: Engine) -> None:
        self.bar.close()
        self.plot(engine)
