"""Measures class by class: the images of a class against the real images of the same class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scripts.evaluation.cohorts import HELD_OUT, Cohort, Cohorts
from scripts.evaluation.evaluator import Measure, slug
from scripts.evaluation.report import HEADLINES
from scripts.running.errors import BundleError
from scripts.scans.classes import classes_of


class ByClass:
    """Measure: what other measures find within each class; a row is called as theirs, with the class at its end.

    The class of a file is found as in training, see `scripts.scans.classes.classes_of`. A held-out or synthetic
    cohort of which no file has a class (an unconditional generator) is compared as a whole with each class.

    Args:
        class_names: names of folders, or of classes in the table.
        measures: measures of the evaluation, which stand before this one.
        metrics: their rows that are kept; their figures are all drawn, class by class.
        class_table: of the real cohorts, see `scripts.scans.classes.read_table`; synthetic files lie in folders of
            classes.
    """

    name = "by_class"
    title = "Class by class"
    together = True

    def __init__(
        self,
        class_names: Sequence[str],
        measures: Sequence[Measure],
        metrics: Sequence[str] = HEADLINES,
        class_table: str | None = None,
    ) -> None:
        self.class_names, self.measures, self.metrics = list(class_names), list(measures), list(metrics)
        self.class_table = class_table
        self.classes: dict[str, list[str | None]] = {}  # of the files of each cohort
        self._cohorts: Cohorts | None = None
        self._parts: dict[str, Cohorts] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The knobs that change the result, how many images `check` saw of each class, and a hash of which."""
        measures = {measure.name: measure.settings for measure in self.measures}
        counts = {cohort: [of.count(name) for name in self.class_names] for cohort, of in self.classes.items()}
        which = hashlib.blake2b(repr(self.classes).encode(), digest_size=8).hexdigest()
        known = {"class_names": self.class_names, "counts": counts, "which": which}
        return known | {"metrics": self.metrics, "measures": measures}

    def check(self, cohorts: Cohorts) -> None:
        """The real cohort has two images of each class or more, and with a table every real file a line in it."""
        real = (cohorts.real.name, HELD_OUT)
        for cohort in cohorts:
            table = self.class_table if cohort.name in real else None
            found = self.classes[cohort.name] = classes_of(cohort.files, cohort.folder, self.class_names, table)
            if table is not None and None in found:
                raise BundleError(
                    f"class_table: {found.count(None)} of {len(found)} {cohort.name} images have no line in {table!r}, "
                    f"for example {cohort.files[found.index(None)]!r}; expected a line for each"
                )
        for name in self.class_names:
            count = self.classes[cohorts.real.name].count(name)
            if count < 2:
                raise BundleError(
                    f"class_names: {count} real images are of the class {name!r}; expected two or more of each of "
                    f"{self.class_names}, each in a folder of its class or with a line in class_table"
                )

    def of_class(self, name: str, cohorts: Cohorts) -> Cohorts:
        """The cohorts with the images of one class alone; synthetic ones of fewer than two images are left out."""
        if self._cohorts is not cohorts:
            self._cohorts, self._parts = cohorts, {}
        if name not in self._parts:
            real, *others = (self.part(name, cohort) for cohort in cohorts)
            others = [cohort for cohort in others if len(cohort) >= 2]
            unseen = next((cohort for cohort in others if cohort.name == HELD_OUT), None)
            self._parts[name] = Cohorts(real, unseen, [cohort for cohort in others if cohort is not unseen])
        return self._parts[name]

    def part(self, name: str, cohort: Cohort) -> Cohort:
        """The images of one class; all where the cohort has no classes."""
        classes = self.classes[cohort.name]
        chosen = [i for i, found in enumerate(classes) if found == name or not any(classes)]
        maps = cohort.label_maps and [cohort.label_maps[i] for i in chosen]
        files = [cohort.files[i] for i in chosen]
        arrays = {key: getattr(cohort, key)[chosen] for key in ("volumes", "voxel_size")}
        return replace(cohort, files=files, label_maps=maps, **arrays)

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict[str, Any]:
        """The chosen rows of every class, metric by metric."""
        rows, notes, data = [], [], {}
        for name in self.class_names:
            parts = self.of_class(name, cohorts)
            own = next((part for part in parts if part.name == cohort.name), None)
            if own is None:
                notes.append(f"{cohort.name}: fewer than two images of the class {name}, so it has no rows.")
                continue
            data[name] = {measure.name: measure(own, parts) for measure in self.measures}
            found = (row for result in data[name].values() for row in result["rows"])
            rows += [(row["metric"], row | {"metric": f"{row['metric']}_{name}"}) for row in found]
        if not any(self.classes[cohort.name]):
            notes.append(f"{cohort.name}: no folders of classes, so all of it is compared with each class.")
        ordered = [row for metric in self.metrics for key, row in rows if key == metric]
        return {"rows": ordered, "notes": notes, "data": data}

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict[str, Any]]:
        """The figures of every measure for every class, in a folder a class."""
        figures = []
        for number, name in enumerate(self.class_names, 1):
            place = f"class_{number}_{slug(name)}"
            os.makedirs(os.path.join(folder, place), exist_ok=True)
            parts = self.of_class(name, cohorts)
            for measure in self.measures:
                found = {part.name: results[part.name]["data"][name][measure.name] for part in parts}
                for figure in measure.draw(found, parts, os.path.join(folder, place)):
                    file = {"file": f"{place}/{figure['file']}"} if figure.get("file") else {}
                    figures.append(figure | file | {"title": f"{name}: {figure['title']}"})
        return figures
