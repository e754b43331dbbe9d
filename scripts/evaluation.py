"""Run every measure on every cohort, keep each result as it comes, and gather them in metrics.json and metrics.csv."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from scripts.cohorts import Cohort, Cohorts
from scripts.errors import BundleError
from scripts.files import write_atomically

logger = logging.getLogger(__name__)


class Measure(Protocol):
    """What the list `measures` of `configs/evaluate.json` holds.

    Attributes:
        name: stem of its files.
        title: its heading in the report.
        settings: every knob that changes the result, as JSON; a result of other settings is measured again.
    """

    name: str
    title: str
    settings: dict[str, Any]

    def check(self, cohorts: Cohorts) -> None:
        """Raise BundleError for what cannot work, before any long work."""

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict[str, Any]:
        """{"rows": [{"metric", "value", "low", "high", "better", "unit", "note"}], "notes": [...], "data": {...}}.

        `low` and `high` are the 95 % bootstrap interval over volumes; `better` is "higher", "lower", "real" (the closer
        to the real cohort's value the better) or None; `data` is what `draw` needs, as JSON.
        """

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict[str, Any]]:
        """Figures {"file", "title", "caption"}, written into `folder`, and tables {"table", "title", "caption"}."""


def fingerprint(cohort: Cohort) -> str:
    """A short hash of a cohort's voxels, voxel sizes and label maps (their sizes and times)."""
    hashed = hashlib.blake2b(cohort.volumes.tobytes(), digest_size=12)
    hashed.update(cohort.voxel_size.tobytes() + str(cohort.volumes.shape).encode())
    for path in cohort.label_maps or []:
        stamp = os.stat(path) if path else None
        hashed.update(f"{path} {stamp and (stamp.st_size, stamp.st_mtime_ns)}".encode())
    return hashed.hexdigest()


def without_nan(value: Any) -> Any:
    """The same structure with None for numbers that are NaN or infinite, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return value


def write_json(content: Any, path: str) -> None:
    """Write a structure as JSON; the file is whole or absent."""
    text = json.dumps(without_nan(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text + "\n"))


def kept(path: str, key: str) -> dict | None:
    """The result in `path` if it was made from the same voxels with the same settings, else None."""
    try:
        part = json.loads(Path(path).read_text())
        return part["result"] if part["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None


def measured(measure: Measure, cohorts: Cohorts, marks: dict[str, str], folder: str) -> dict[str, dict]:
    """{cohort name: result}; results that are in `folder` already, of the same input, are taken from there.

    Args:
        marks: {cohort name: its fingerprint}.
    """
    reference = [marks[cohorts.real.name], marks.get(cohorts.held_out.name) if cohorts.held_out is not None else None]
    results = {}
    for cohort in cohorts:
        slug = re.sub(r"[^A-Za-z0-9-]+", "_", cohort.name)
        mark = marks[cohort.name]
        path = os.path.join(folder, f"{measure.name}_{slug}_{mark[:8]}.json")
        key = json.dumps([measure.name, measure.settings, cohort.name, mark, reference], sort_keys=True)
        if (result := kept(path, key)) is None:
            logger.info(f"{measure.title}: {cohort.name} ({len(cohort)} volumes)")
            start = time.monotonic()
            result = measure(cohort, cohorts)
            write_json({"key": key, "seconds": round(time.monotonic() - start, 1), "result": result}, path)
            result = kept(path, key)  # as a later run will see it
        else:
            logger.info(f"{measure.title}: {cohort.name}: taken from {path}")
        results[cohort.name] = result
    return results


def write_csv(rows: Sequence[dict[str, Any]], path: str) -> None:
    """One row a cohort; three columns a metric: its value and the ends of its 95 % interval."""
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def evaluate(
    cohorts: Cohorts, measures: Sequence[Measure], output_dir: str, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compare the synthetic cohorts, and the held-out one, with the real one by every measure.

    Writes `metrics.json` (everything, with settings, files and notes), `metrics.csv` (a row a cohort), the figures in
    `figures/` and, as they come, single results in `parts/`: a run that was stopped goes on where it was.

    Args:
        settings: what the user chose, for the record.

    Returns:
        what metrics.json holds; the report is made from it.

    Raises:
        BundleError: two measures of one name, or what a measure's `check` finds.
    """
    names = [measure.name for measure in measures]
    if len(set(names)) < len(names):
        raise BundleError(f"measures: the names {names} are not different; each measure once would be right")
    for measure in measures:
        measure.check(cohorts)
    parts, figures = (os.path.join(output_dir, folder) for folder in ("parts", "figures"))
    for folder in (parts, figures):
        os.makedirs(folder, exist_ok=True)
    evaluation: dict[str, Any] = {
        "settings": settings or {},
        "shape": list(cohorts.real.volumes.shape[1:]),
        "cohorts": {cohort.name: {"files": cohort.files, "notes": cohort.notes} for cohort in cohorts},
        "measures": [],
    }
    table: dict[str, dict[str, Any]] = {c.name: {"model": c.name, "volumes": len(c)} for c in cohorts}
    marks = {cohort.name: fingerprint(cohort) for cohort in cohorts}
    for measure in measures:
        results = measured(measure, cohorts, marks, parts)
        for name, result in results.items():
            for row in result["rows"]:
                metric = row["metric"]
                table[name] |= {metric: row["value"], f"{metric}_low": row["low"], f"{metric}_high": row["high"]}
        evaluation["measures"].append(
            {
                "name": measure.name,
                "title": measure.title,
                "settings": measure.settings,
                "rows": {name: result["rows"] for name, result in results.items()},
                "notes": list(dict.fromkeys(note for result in results.values() for note in result["notes"])),
                "figures": measure.draw(results, cohorts, figures),
            }
        )
    write_csv(list(table.values()), os.path.join(output_dir, "metrics.csv"))
    write_json(evaluation, os.path.join(output_dir, "metrics.json"))
    return without_nan(evaluation)
