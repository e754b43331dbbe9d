"""The loss curve and its table."""

from __future__ import annotations

import numpy as np
from monai.utils import optional_import

from scripts.running.pictures import write_figure
from scripts.training.records import TrainingRecords

Axes, _ = optional_import("matplotlib.axes", name="Axes")  # as in scripts.running.pictures
Figure, _ = optional_import("matplotlib.figure", name="Figure")
STATISTICS = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")


def loss_statistics(losses: np.ndarray) -> dict[str, float]:
    """Count, mean, sample standard deviation, minimum, quartiles and maximum (Table 1 of MRIDiff)."""
    quartiles = np.percentile(losses, [25, 50, 75])
    std = losses.std(ddof=1) if len(losses) > 1 else 0.0
    values = (len(losses), losses.mean(), std, losses.min(), *quartiles, losses.max())
    return dict(zip(STATISTICS, map(float, values)))


def draw_losses(axes: Axes, records: TrainingRecords) -> np.ndarray:
    """Draw training and held-out losses against the iteration, and what a `scripts.training.surge.SurgeGuard` gave up.

    Returns:
        the training losses, one an iteration; nothing is drawn where there are none.
    """
    rows = records.losses.rows()
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
        held_out = [row for row in records.validation.rows() if row["weights"] == weights]
        points = [(int(row["iteration"]), float(row["loss"])) for row in held_out]
        if points:
            axes.plot(*zip(*points), marker=".", color=colour, label=f"held out, {weights} weights")
    stretches: dict[str, list[tuple[int, float]]] = {}
    for row in records.surges.rows():
        stretches.setdefault(row["surge"], []).append((int(row["iteration"]), float(row["loss"])))
    labels = {"label": "given up after a surge"}, {"label": "gone back to, with a lower learning rate"}
    for points in stretches.values():
        axes.plot(*zip(*points), color="tab:red", linewidth=0.8, **labels[0])
        axes.axvline(points[0][0] - 1, color="tab:red", linestyle=":", **labels[1])
        labels = {}, {}  # once in the legend
    axes.set(xlabel="iteration", ylabel="loss", yscale="log")
    axes.legend()
    return losses


def plot_losses(records: TrainingRecords, path: str) -> None:
    """Write the picture of `draw_losses`, with the table of `loss_statistics` beside it."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes, side = figure.subplots(1, 2, width_ratios=(4, 1))
    losses = draw_losses(axes, records)
    if not len(losses):
        return
    side.axis("off")
    table = side.table([[f"{v:.5g}"] for v in loss_statistics(losses).values()], rowLabels=STATISTICS, loc="center")
    table.scale(1, 1.4)
    side.set_title("training loss")
    write_figure(figure, path)
