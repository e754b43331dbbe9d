"""The pictures and tables of `scripts.evaluation.anatomy`."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scripts.evaluation.cohorts import Cohorts
from scripts.evaluation.effects import FALSE_DISCOVERY
from scripts.evaluation.tissue import classify, tissue_map
from scripts.running.pictures import draw_box, triplanar

PANELS_UP_TO = 40


def by_difference(parts: dict[str, dict], number: int) -> list[int]:
    """The regions that differ most, in their own order, cut by the caller; all in order where few."""
    if number <= PANELS_UP_TO:
        return list(range(number))
    effects = [[abs(d or 0) for d in part["cohen_d"]] for part in parts.values() if "cohen_d" in part]
    largest = np.max(effects, 0) if effects else np.zeros(number)
    return sorted(np.argsort(-largest, kind="stable")[:PANELS_UP_TO].tolist())


def draw_distributions(parts: dict[str, dict], colours: dict[str, str], order: Sequence[int]) -> Figure:
    """A panel a region, a box a cohort."""
    names = next(iter(parts.values()))["names"]
    across = min(len(order), 3 if len(order) <= 6 else 5)
    down = -(-len(order) // across)
    figure = Figure(figsize=(9.1, 0.6 + (3.0 if across <= 3 else 1.7) * down), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    rng = np.random.default_rng(0)
    for panel, k in zip(panels, order):
        for place, (name, part) in enumerate(parts.items()):
            values = np.array(part["values"])[:, k]
            jitter = place + rng.uniform(-0.25, 0.25, len(values))
            panel.plot(jitter, values, ".", color=colours[name], markersize=3, alpha=0.4, zorder=1)
            draw_box(panel, place, values, colours[name], 4)
        panel.set_title(names[k] if across <= 3 else fill(names[k], 18), fontsize=10 if across <= 3 else 8)
        panel.set_xticks([])
        panel.set_xlim(-0.6, len(parts) - 0.4)
        panel.tick_params(labelsize=8 if across <= 3 else 7)
    for panel in panels[len(order) :]:
        panel.axis("off")
    figure.supylabel(next(iter(parts.values()))["unit"], fontsize=9)
    _legend(figure, parts, colours)
    return figure


def draw_effects(parts: dict[str, dict], colours: dict[str, str], order: Sequence[int]) -> Figure:
    """Cohen's d with its interval: a line a region, a mark a cohort."""
    compared = {name: part for name, part in parts.items() if "cohen_d" in part}
    names = next(iter(parts.values()))["names"]
    height = 1.2 + 0.1 * len(order) * (len(compared) + 1)
    figure = Figure(figsize=(9.1, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-0.2, 0.2, color="0.93", zorder=0)
    axes.axvline(0, color="black", linewidth=0.8, zorder=1)
    for line in range(1, len(order)):
        axes.axhline(line - 0.5, color="0.85", linewidth=0.6, zorder=0)
    for place, (name, part) in enumerate(compared.items()):
        for line, k in enumerate(order):
            d, low, high = (part[key][k] for key in ("cohen_d", "cohen_d_low", "cohen_d_high"))
            if d is None:
                continue
            y = line + (place - (len(compared) - 1) / 2) * 0.8 / max(len(compared), 2)
            if low is not None:
                axes.plot([low, high], [y, y], color=colours[name], linewidth=1.5, zorder=2)
            face = colours[name] if part["p_fdr"][k] < FALSE_DISCOVERY else "white"
            axes.plot(d, y, "o", markersize=5, markeredgecolor=colours[name], markerfacecolor=face, zorder=3)
    axes.set_yticks(range(len(order)), [names[k] for k in order], fontsize=8 if len(order) > 12 else 9)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel("Cohen's d against the real volumes")
    _legend(figure, compared, colours)
    return figure


def draw_classes(cohorts: Cohorts, seed: int) -> Figure:
    """A row a cohort: the slices of its first volume, and beside them their classes."""
    shown = list(cohorts)
    figure = Figure(figsize=(9.1, 0.2 + 1.75 * len(shown)), dpi=110, layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    colours = ListedColormap(["black", "tab:blue", "0.55", "white"])
    for (left, right), cohort in zip(panels, shown):
        volume = cohort.volumes[0].astype(np.float32)
        tissues = classify(volume, seed)
        classes = np.zeros(volume.shape, np.uint8) if tissues is None else tissue_map(volume, tissues)
        left.set_title(cohort.name, fontsize=9, loc="left")
        left.imshow(triplanar(volume), cmap="gray", vmin=-1, vmax=1)
        right.imshow(triplanar(classes), cmap=colours, vmin=-0.5, vmax=3.5, interpolation="nearest")
    for panel in panels.ravel():
        panel.axis("off")
    return figure


def table(kind: str, parts: dict[str, dict], real: str) -> dict:
    """One line a region: means and standard deviations; d with its interval and the corrected p of each cohort."""
    of_real = parts[real]
    others = {name: part for name, part in parts.items() if name != real}
    columns = [kind[:-1], f"{real}: mean (SD)"]
    for name in others:
        columns += [f"{name}: mean (SD)", f"{name}: d [95 %]", f"{name}: p (FDR)"]
    lines = []
    for k, region in enumerate(of_real["names"]):
        line = [f"{region}, {of_real['unit']}", _spread(of_real["mean"][k], of_real["std"][k])]
        for part in others.values():
            d, low, high = (part[key][k] for key in ("cohen_d", "cohen_d_low", "cohen_d_high"))
            bracket = "" if low is None else f" [{low:.2f}, {high:.2f}]"
            line.append(_spread(part["mean"][k], part["std"][k]))
            line += [None if d is None else f"{d:.2f}{bracket}", f"{part['p_fdr'][k]:.2g}"]
        lines.append(line)
    for region in of_real.get("ml", {}):
        line = [f"{region}, mL", _spread(*of_real["ml"][region])]
        for part in others.values():
            line += [_spread(*part["ml"][region]), "", ""]
        lines.append(line)
    line = ["Wasserstein distance of all", ""]
    for part in others.values():
        w = part.get("wasserstein")
        line += [f"{w['value']:.3f}", f"chance {w['chance']:.3f}", f"{w['p']:.2g}"] if w else ["", "", ""]
    if others:
        lines.append(line)
    caption = (
        "SD over volumes. p: two-sided permutation test of the difference of means, Benjamini-Hochberg corrected over "
        "the lines of one cohort; it takes the volumes for independent, so repeated volumes make it too small. The "
        "Wasserstein distance is in real standard deviations; chance is its mean when all volumes are relabelled at "
        "random, p the fraction of relabellings that reach it."
    )
    if "ml" in of_real:
        caption += (
            " mL follow the voxel size of each file, which generators give to all volumes alike: they are not tested."
        )
    return {"table": {"columns": columns, "rows": lines}, "title": f"All {kind}", "caption": caption}


def _spread(mean: float, std: float) -> str:
    digits = 0 if abs(mean) >= 1000 else 1 if abs(mean) >= 10 else 2
    return f"{mean:.{digits}f} ({std:.{digits}f})"


def _legend(figure: Figure, parts: dict[str, dict], colours: dict[str, str]) -> None:
    handles = [Line2D([], [], color=colours[name], marker="o", linewidth=1.5, label=name) for name in parts]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), fontsize=9, frameon=False)
