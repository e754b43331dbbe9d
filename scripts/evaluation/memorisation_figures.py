"""The pictures of `scripts.evaluation.memorisation`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.evaluator import slug
from scripts.running.pictures import save_figure, triplanar


def draw_histograms(
    results: dict, cohorts: Cohorts, synthetic: list[Cohort], folder: str, kinds: Sequence[str]
) -> dict:
    """A row of panels a synthetic cohort, a column a similarity."""
    kinds = kinds
    figure = Figure(figsize=(9.1, 0.7 + 2.3 * len(synthetic)), dpi=110, layout="constrained")
    panels = figure.subplots(len(synthetic), len(kinds), squeeze=False, sharex="col")
    colours = cohorts.colours
    for column, kind in enumerate(kinds):
        everything = [_floats(results[c.name]["data"]["training"][kind]) for c in cohorts if c.name in results]
        everything += [
            _floats(results[c.name]["data"]["held_out"][kind]) for c in synthetic if results[c.name]["data"]["held_out"]
        ]
        finite = np.concatenate(everything)
        finite = finite[np.isfinite(finite)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0, 1)
        edges = np.linspace(low - 1e-3, high + 1e-3, 41)
        for row, cohort in enumerate(synthetic):
            panel, data = panels[row, column], results[cohort.name]["data"]
            lines = [("training to other training", "black", ":", cohorts.real.name)]
            if cohorts.held_out is not None:
                lines.append(("held-out to training", "0.5", "-", cohorts.held_out.name))
            colour = colours[cohort.name]
            handles = [_stairs(panel, data["training"][kind], edges, color=colour, alpha=0.45, fill=True)]
            labels = ["synthetic (in colour) to training"]
            if data["held_out"]:
                handles.append(_stairs(panel, data["held_out"][kind], edges, color=colour, linewidth=1.3))
                labels.append("synthetic to held-out")
            for label, colour, style, name in lines:
                if name in results:
                    values = results[name]["data"]["training"][kind]
                    handles.append(_stairs(panel, values, edges, color=colour, linestyle=style, linewidth=1.2))
                    labels.append(label)
            largest = data["largest"].get(kind)
            if largest is not None:
                handles.append(panel.axvline(largest, color="black", linewidth=0.9, linestyle="--"))
                labels.append("largest of real volumes")
            panel.set_title(cohort.name, fontsize=9, loc="left")
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_ylabel("fraction of volumes" if column == 0 else "", fontsize=8)
            panel.tick_params(labelsize=8)
            panel.tick_params(labelbottom=True)
        panels[-1, column].set_xlabel(
            {"correlation": "correlation with the nearest", "ms_ssim": "MS-SSIM with the nearest"}[kind], fontsize=9
        )
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), fontsize=8)
    legend.set_frame_on(False)
    caption = (
        "Mirror images are compared too. Without memorisation the filled histogram (synthetic to training) lies "
        "where that of held-out to training lies, and little is right of the dashed line, the most alike two "
        "different real volumes are. The nearest of few held-out volumes is less similar than the nearest of many "
        "training volumes by chance."
    )
    title = "Similarity to the nearest real volume"
    return save_figure(figure, folder, "memorisation_nearest.png", title, caption)


def draw_pairs(data: dict, cohort: Cohort, real: Cohort, folder: str, number: int, num_worst: int) -> list[dict]:
    """Picture and table of the pairs that are most alike."""
    nearest = data["training"]
    worst = most_similar(_floats(nearest["correlation"]), num_worst)
    images, table = [], []
    for i in worst:
        j, flipped = nearest["index"][i], nearest["flipped"][i]
        first, second = cohort.volumes[i].astype(np.float32), real.volumes[j].astype(np.float32)
        second = np.flip(second, 0) if flipped else second
        label = f"correlation {nearest['correlation'][i]:.4f}"
        ms_ssim = nearest.get("ms_ssim", [None] * len(cohort))[i]
        if ms_ssim is not None:
            label += f"\nMS-SSIM {ms_ssim:.4f}"
        label += "\nmirrored" if flipped else ""
        images.append((label, triplanar(first), triplanar(second), triplanar(first - second)))
        row = [len(table) + 1, os.path.basename(cohort.files[i]), os.path.basename(real.files[j])]
        row += ["yes" if flipped else "no", round(nearest["correlation"][i], 4)]
        table.append(row + ([None if ms_ssim is None else round(ms_ssim, 4)] if "ms_ssim" in nearest else []))
    if not images:
        return []
    aspect = images[0][1].shape[0] / images[0][1].shape[1]
    width = 2.6 if images[0][1].shape[1] > 1.5 * images[0][1].shape[0] else 1.7
    figure = Figure((3 * width + 1.3, (width * aspect + 0.06) * len(images) + 0.35), dpi=110, layout="constrained")
    panels = figure.subplots(len(images), 3, squeeze=False)
    for row, (label, first, second, difference) in enumerate(images):
        for panel, image in zip(panels[row], (first, second)):
            panel.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        shown = panels[row, 2].imshow(difference, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        panels[row, 0].set_ylabel(f"{row + 1}\n{label}", fontsize=7, rotation=0, ha="right", va="center")
        for panel in panels[row]:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("0.8")
    for panel, title in zip(panels[0], (cohort.name, "nearest training volume", "difference")):
        panel.set_title(title, fontsize=9)
    bar = figure.colorbar(shown, ax=panels[:, 2].tolist(), fraction=0.04, pad=0.02, shrink=min(1, 2 / len(images)))
    bar.ax.tick_params(labelsize=7)
    file = f"memorisation_pairs_{number}_{slug(cohort.name)}.png"
    title = f"{cohort.name}: the volumes most like a training volume"
    caption = (
        f"The {len(images)} of {len(cohort)} volumes that correlate most with a training volume, the training "
        "volume (as a mirror image where the pair is more alike so), and the difference of both; intensities from "
        "-1 to 1. MS-SSIM is the largest among the candidates."
    )
    columns = ["pair", "synthetic file", "training file", "mirrored", "correlation"]
    columns += ["MS-SSIM"] if "ms_ssim" in nearest else []
    return [
        save_figure(figure, folder, file, title, caption),
        {
            "table": {"columns": columns, "rows": table},
            "title": f"{title}: files",
            "caption": "The pairs of the picture, in its order.",
        },
    ]


def most_similar(values: np.ndarray, count: int) -> list[int]:
    """Numbers of the `count` largest values, largest first; values that are not finite are left out."""
    values = np.asarray(values, float)
    order = np.argsort(-np.where(np.isfinite(values), values, -np.inf), kind="stable")
    return [int(i) for i in order if np.isfinite(values[i])][:count]


def _stairs(panel: Axes, values: list, edges: np.ndarray, **style) -> StepPatch:
    """A histogram as fractions of the values that are finite."""
    numbers = _floats(values)
    numbers = numbers[np.isfinite(numbers)]
    return panel.stairs(np.histogram(numbers, edges)[0] / max(1, len(numbers)), edges, **style)


def _floats(values: list) -> np.ndarray:
    """The inverse of `_plain`: None becomes nan."""
    return np.array([np.nan if value is None else value for value in values], float)
