"""The pictures and the table of `scripts.evaluation.conditions`."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PANELS_ACROSS = 6


def strongest(parts: dict[str, dict], covariate: str, real: str) -> list[str]:
    """The quantities that a covariate explains best in the real volumes, at most PANELS_ACROSS, in their own order."""
    found = parts[real][covariate]["quantities"]
    best = sorted(found, key=lambda quantity: -found[quantity]["explained"])[:PANELS_ACROSS]
    return [quantity for quantity in found if quantity in best]


def draw_relations(parts: dict[str, dict], colours: dict[str, str], real: str) -> Figure:
    """A row a covariate, a panel a quantity: dots and lines of a number, dots and means of words."""
    covariates = list(parts[real])
    chosen = {covariate: strongest(parts, covariate, real) for covariate in covariates}
    across = max(map(len, chosen.values()))
    figure = Figure(figsize=(1.9 * across + 0.4, 0.5 + 1.9 * len(covariates)), dpi=110, layout="constrained")
    panels = figure.subplots(len(covariates), across, squeeze=False)
    for line, covariate in zip(panels, covariates):
        for panel, quantity in zip(line, chosen[covariate]):
            for place, (name, part) in enumerate(parts.items()):
                if quantity in part[covariate]["quantities"]:
                    found = part[covariate]["quantities"][quantity]
                    draw_pairs(panel, found, part[covariate]["words"], place, len(parts), colours[name])
            share = parts[real][covariate]["quantities"][quantity]["explained"]
            panel.set_title(f"{fill(quantity, 26)}\n{share:.0%} explained", fontsize=7)
            panel.set_xlabel(covariate, fontsize=7)
            panel.tick_params(labelsize=6)
        for panel in line[len(chosen[covariate]) :]:
            panel.axis("off")
    handles = [Line2D([], [], color=colours[name], marker="o", markersize=4, label=name) for name in parts]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    return figure


def draw_pairs(panel: Any, found: dict, words: list[str] | None, place: int, cohorts: int, colour: str) -> None:
    """The volumes of one cohort in one panel."""
    x, y = np.array(found["x"]), np.array(found["y"])
    if words is None:
        panel.plot(x, y, ".", color=colour, markersize=3, alpha=0.4)
        if len(x) > 2 and np.ptp(x) > 0:
            ends = np.array([x.min(), x.max()])
            panel.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=colour, linewidth=1.5)
        return
    beside = (place - (cohorts - 1) / 2) * 0.8 / max(cohorts, 2)
    panel.plot(x + beside, y, ".", color=colour, markersize=3, alpha=0.4)
    for k in range(len(words)):
        if (x == k).any():
            panel.plot(k + beside, y[x == k].mean(), "D", color=colour, markersize=4, markeredgecolor="white")
    panel.set_xticks(range(len(words)), words, rotation=0 if len(words) < 4 else 60)


def said(value: tuple[float, float, float] | None) -> str | None:
    """A slope with its interval, as a cell shows it."""
    if value is None or value[0] is None:
        return None
    low, high = value[1:]
    return f"{value[0]:.3g}" + ("" if low is None else f" [{low:.3g}, {high:.3g}]")


def table(parts: dict[str, dict]) -> dict[str, Any]:
    """A line a covariate (or a word after the first) and quantity; of each cohort the slope, and what it explains."""
    lines = []
    first = next(iter(parts.values()))
    for covariate, of_first in first.items():
        for quantity in of_first["quantities"]:
            found = {name: part[covariate]["quantities"].get(quantity, {}) for name, part in parts.items()}
            for word in of_first["words"][1:] if of_first["words"] else [None]:
                what = covariate if word is None else f"{covariate}: {word} less {of_first['words'][0]}"
                line = [what, quantity]
                for part in found.values():
                    value = part.get("slope") if word is None else part.get("differences", {}).get(word)
                    share = part.get("explained")
                    line += [said(value), None if share is None or not part["x"] else f"{share:.0%}"]
                lines.append(line)
    columns = ["covariate", "quantity"]
    for name in parts:
        columns += [f"{name}: slope or difference [95 %]", f"{name}: explained"]
    caption = (
        "Slopes are in units of the quantity for each 1 of the covariate. Their 95 % bootstrap intervals take volumes "
        "for independent: those of one noise (a sweep) are not. Explained: r^2 of a number, eta^2 of words. "
        "Real subjects differ in all covariates at once, so ask for combinations as they occur, or for one alone."
    )
    return {"table": {"columns": columns, "rows": lines}, "title": "All relations", "caption": caption}
