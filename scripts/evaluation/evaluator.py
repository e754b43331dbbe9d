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

import ignite.distributed as idist
from ignite.engine import Engine, Events, State

from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.running.errors import BundleError
from scripts.running.files import write_atomically, write_text
from scripts.running.processes import gathered, share
from scripts.running.signals import ending_at_once

logger = logging.getLogger(__name__)


class Measure(Protocol):
    """What the list `measures` of `configs/evaluate.json` holds.

    Attributes:
        name: stem of its files.
        title: its heading in the report.
        settings: every knob that changes the result, as JSON; a result of other settings is measured again.
        together: true where several processes share the work of one cohort and all of them must be called; such a
            measure may leave it out otherwise, and each process then takes some of the cohorts.
    """

    name: str
    title: str
    settings: dict[str, Any]
    together: bool

    def check(self, cohorts: Cohorts) -> None:
        """Raise BundleError for what cannot work, before any long work."""

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict[str, Any]:
        """{"rows": [{"metric", "value", "low", "high", "better", "unit", "note"}], "notes": [...], "data": {...}}.

        `low` and `high` are the 95 % bootstrap interval over volumes; `better` is "higher", "lower", "real" (the closer
        to the real cohort's value the better) or None; `data` is what `draw` needs, as JSON.
        """

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict[str, Any]]:
        """Figures {"file", "title", "caption"}, written into `folder`, and tables {"table", "title", "caption"}."""


def metric_row(
    metric: str,
    value: float,
    low: float = math.nan,
    high: float = math.nan,
    better: str | None = None,
    note: str = "",
    unit: str = "",
) -> dict[str, Any]:
    """A row of what a `Measure` returns; what is not finite becomes None."""
    numbers = {"value": value, "low": low, "high": high}
    numbers = {key: float(number) if math.isfinite(number) else None for key, number in numbers.items()}
    return {"metric": metric, **numbers, "better": better, "unit": unit, "note": note}


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
    write_text(path, text + "\n")


def kept(path: str, key: str) -> dict | None:
    """The result in `path` if it was made from the same voxels with the same settings, else None."""
    try:
        part = json.loads(Path(path).read_text(encoding="utf-8"))
        return part["result"] if part["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None


def slug(name: str) -> str:
    """The name as file names and experiment trackers take it."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", name)


def write_csv(rows: Sequence[dict[str, Any]], path: str) -> None:
    """One row a cohort; three columns a metric: its value and the ends of its 95 % interval."""
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


class CohortEvaluator(Engine):
    """Compare the synthetic cohorts, and the held-out one, with the real one by every measure.

    An Ignite engine: an iteration is one measure of one cohort. `run()` writes `metrics.json` (everything, with
    settings, files and notes), `metrics.csv` (a row a cohort), the figures in `figures/` and, as they come, single
    results in `parts/`: a run that was stopped goes on where it was. Handlers of EPOCH_COMPLETED find what metrics.json
    holds in `state.evaluation`, and {"<cohort>/<metric>": value} in `state.metrics`. Several processes share the work
    out, see `Measure`; rank 0 gathers, and the handlers of the others find nothing. SIGTERM and Ctrl-C end it at once.

    Args:
        settings: what the user chose, for the record.
        val_handlers: attached as MONAI's evaluators attach theirs.

    Raises:
        BundleError: two measures of one name, or what a measure's `check` finds.
    """

    def __init__(
        self,
        cohorts: Cohorts,
        measures: Sequence[Measure],
        output_dir: str,
        settings: dict[str, Any] | None = None,
        val_handlers: Sequence[Any] = (),
    ) -> None:
        names = [measure.name for measure in measures]
        if len(set(names)) < len(names):
            raise BundleError(f"measures: the names {names} are not different; expected each measure once")
        for measure in measures:
            measure.check(cohorts)
        super().__init__(self.part)
        self.cohorts, self.measures, self.output_dir, self.settings = cohorts, measures, output_dir, settings or {}
        self.add_event_handler(Events.EPOCH_COMPLETED, self.gather)  # before the handlers, which use what it gathers
        for handler in val_handlers:
            handler.attach(self)

    def run(self) -> State:
        for folder in ("parts", "figures"):
            os.makedirs(os.path.join(self.output_dir, folder), exist_ok=True)
        self.marks = {cohort.name: fingerprint(cohort) for cohort in self.cohorts}
        parts = [(measure, cohort) for measure in self.measures for cohort in self.cohorts]
        # what rank 0 finds, for all: each must know which parts the others will work on
        self.known = gathered([kept(*self.place(*part)) for part in parts])[0]
        alone = [i for i, (measure, _) in enumerate(parts) if not getattr(measure, "together", False)]
        others = set(alone) - set(share(alone))
        self.results: dict[tuple[str, str], dict] = {}
        own_parts = [(i, *part) for i, part in enumerate(parts) if i not in others]

        def advice() -> str:
            finished = sum(kept(*self.place(*part)) is not None for part in parts)
            folder = os.path.join(self.output_dir, "parts")
            return f"{finished} of {len(parts)} results are in {folder!r}; the same command goes on"

        with ending_at_once(self, advice):
            return super().run(own_parts, max_epochs=1)

    def place(self, measure: Measure, cohort: Cohort) -> tuple[str, str]:
        """Where the result of a part is kept, and what it depends on."""
        held_out = self.cohorts.held_out
        reference = [self.marks[self.cohorts.real.name], self.marks[held_out.name] if held_out is not None else None]
        mark = self.marks[cohort.name]
        path = os.path.join(self.output_dir, "parts", f"{measure.name}_{slug(cohort.name)[:80]}_{mark[:8]}.json")
        return path, json.dumps([measure.name, measure.settings, cohort.name, mark, reference], sort_keys=True)

    def part(self, engine: Engine, batch: tuple[int, Measure, Cohort]) -> None:
        """One measure of one cohort; what is in `parts/` already, of the same input, is taken from there."""
        number, measure, cohort = batch
        path, key = self.place(measure, cohort)
        if (result := self.known[number]) is None:
            logger.info(f"{measure.title}: {cohort.name} ({len(cohort)} volumes)")
            start = time.monotonic()
            result = measure(cohort, self.cohorts)
            if idist.get_rank() == 0 or not getattr(measure, "together", False):
                write_json({"key": key, "seconds": round(time.monotonic() - start, 1), "result": result}, path)
            result = json.loads(json.dumps(without_nan(result)))  # as a later run will see it
        else:
            logger.info(f"{measure.title}: {cohort.name}: taken from {path}")
        self.results[measure.name, cohort.name] = result

    def gather(self) -> None:
        """Draw the figures, write metrics.csv and metrics.json, fill `state.evaluation` and `state.metrics`."""
        found = {part: result for results in gathered(self.results) for part, result in results.items()}
        if idist.get_rank() > 0:
            return
        evaluation: dict[str, Any] = {
            "settings": self.settings,
            "shape": list(self.cohorts.real.volumes.shape[1:]),
            "cohorts": {cohort.name: {"files": cohort.files, "notes": cohort.notes} for cohort in self.cohorts},
            "measures": [],
        }
        table: dict[str, dict[str, Any]] = {c.name: {"model": c.name, "volumes": len(c)} for c in self.cohorts}
        for measure in self.measures:
            results = {cohort.name: found[measure.name, cohort.name] for cohort in self.cohorts}
            for name, result in results.items():
                for row in result["rows"]:
                    metric, value = row["metric"], row["value"]
                    table[name] |= {metric: value, f"{metric}_low": row["low"], f"{metric}_high": row["high"]}
                    if value is not None:
                        self.state.metrics[f"{slug(name)}/{slug(metric)}"] = value
            evaluation["measures"].append(
                {
                    "name": measure.name,
                    "title": measure.title,
                    "settings": measure.settings,
                    "rows": {name: result["rows"] for name, result in results.items()},
                    "notes": list(dict.fromkeys(note for result in results.values() for note in result["notes"])),
                    "figures": measure.draw(results, self.cohorts, os.path.join(self.output_dir, "figures")),
                }
            )
        write_csv(list(table.values()), os.path.join(self.output_dir, "metrics.csv"))
        write_json(evaluation, os.path.join(self.output_dir, "metrics.json"))
        self.state.evaluation = without_nan(evaluation)
