"""One HTML file with every table and figure of an evaluation; it needs no network and no other file."""

from __future__ import annotations

import base64
import logging
import os
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import jinja2
from ignite.engine import Engine, Events

from scripts.running.files import write_text

logger = logging.getLogger(__name__)
TEMPLATE = Path(__file__).with_name("report.html")
HEADLINES = (  # what the table at the top of the report shows, as far as it was measured
    "ms_ssim_kwon2019",
    "fid_medicalnet",
    "fid_slices",
    "frechet_pca",
    "recall_pca",
    "spectrum_high_frequency",
    "wasserstein_regions",
    "wasserstein_tissues",
    "flagged",
)
HEADLINE_STEM = "adherence_"  # and each of these: one a covariate


def number(value: float | None) -> str:
    """A number as a reader wants it: four digits, no exponent where it can be avoided; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4f}" if 0.01 <= abs(value) < 10 else f"{value:.4g}"


def distance(row: dict[str, Any], real: float | None) -> float | None:
    """How far a row is from the ideal, the smaller the better; None where nothing says what is better."""
    if row["value"] is None or row.get("better") not in ("higher", "lower", "real"):
        return None
    if row["better"] == "real":
        return None if real is None else abs(row["value"] - real)
    return -row["value"] if row["better"] == "higher" else row["value"]


def summary(measure: dict[str, Any], synthetic: list[str]) -> list[dict[str, Any]]:
    """The rows of a measure's table: one a metric, a cell a cohort; the best synthetic cohort of several is marked.

    Returns:
        [{"metric", "better", "unit", "notes", "cells": {cohort: {"value", "low", "high", "best"}}}]
    """
    metrics = list(dict.fromkeys(row["metric"] for rows in measure["rows"].values() for row in rows))
    lines = []
    for metric in metrics:
        found = {name: row for name, rows in measure["rows"].items() for row in rows if row["metric"] == metric}
        real = found["real"]["value"] if "real" in found else None
        ranks = {name: distance(found[name], real) for name in synthetic if name in found}
        ranks = {name: rank for name, rank in ranks.items() if rank is not None}
        best = min(ranks.values()) if len(ranks) > 1 else None
        first = next(iter(found.values()))
        lines.append(
            {
                "metric": metric,
                "better": first.get("better"),
                "unit": first.get("unit") or "",
                "notes": list(dict.fromkeys(row["note"] for row in found.values() if row.get("note"))),
                "cells": {
                    name: {key: row.get(key) for key in ("value", "low", "high")}
                    | {"best": best is not None and ranks.get(name) == best}
                    for name, row in found.items()
                },
            }
        )
    return lines


def write_report(evaluation: dict[str, Any], output_dir: str) -> str:
    """Write `report.html` from what a `CohortEvaluator` gathered and the figures that it drew.

    Returns:
        its path.
    """
    names = list(evaluation["cohorts"])
    synthetic = [name for name in names if name not in ("real", "held-out")]
    sections = []
    for measure in evaluation["measures"]:
        figures = []
        for figure in measure["figures"]:
            picture = None
            if figure.get("file"):
                content = Path(output_dir, "figures", figure["file"]).read_bytes()
                picture = "data:image/png;base64," + base64.b64encode(content).decode()
            figures.append(figure | {"picture": picture})
        lines = summary(measure, synthetic)
        known = [line for line in lines if any(cell["value"] is not None for cell in line["cells"].values())]
        unknown: dict[str, list[str]] = {}
        for line in lines:
            if line not in known:
                unknown.setdefault("; ".join(line["notes"]), []).append(line["metric"])
        sections.append(measure | {"lines": known, "unknown": unknown, "figures": figures})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    headlines = {line["metric"]: line for section in sections for line in section["lines"]}
    page = environment.from_string(TEMPLATE.read_text()).render(
        evaluation=evaluation,
        names=names,
        sections=sections,
        synthetic=synthetic,
        warnings=[note for name in names for note in evaluation["cohorts"][name]["notes"]],
        headlines=[
            *(headlines[metric] for metric in HEADLINES if metric in headlines),
            *(line for metric, line in headlines.items() if metric.startswith(HEADLINE_STEM)),
        ],
    )
    path = os.path.join(output_dir, "report.html")
    write_text(path, page)
    logger.info(f"report: {path}")
    return path


class ReportHandler:
    """Handler of a `scripts.evaluation.evaluator.CohortEvaluator` that ends it with `write_report`, on rank 0.

    Args:
        output_dir: of the evaluator.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    @idist.one_rank_only()
    def __call__(self, engine: Engine) -> None:
        write_report(engine.state.evaluation, self.output_dir)
