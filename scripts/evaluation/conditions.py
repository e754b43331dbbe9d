"""Does a generator make what it was asked for? What is measured in each volume, against each covariate."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.evaluation.anatomy import Anatomy
from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import HELD_OUT, Cohort, Cohorts
from scripts.evaluation.conditions_figures import draw_relations, table
from scripts.evaluation.evaluator import metric_row, slug
from scripts.running.covariates import REQUESTS
from scripts.running.errors import BundleError
from scripts.running.pictures import save_figure
from scripts.running.tables import MISSING
from scripts.scans.participants import Covariates

logger = logging.getLogger(__name__)
FEWEST = 3  # volumes of which something is known


def predicted(at: np.ndarray, x: np.ndarray, y: np.ndarray, words: Sequence[str] | None) -> np.ndarray:
    """What the relation of x to y says at other values: a straight line of a number, the mean of a word (nan: none)."""
    if words is None:
        return np.polyval(np.polyfit(x, y, 1), at)
    means = np.array([y[x == k].mean() if (x == k).any() else np.nan for k in range(len(words))])
    return means[at.astype(int)]


def explained(x: np.ndarray, y: np.ndarray, words: Sequence[str] | None) -> float:
    """The share of the variance of y that x explains: r^2 of a number, eta^2 of a word; 0 where nothing varies."""
    if len(y) < FEWEST or np.ptp(x) == 0 or np.ptp(y) < 1e-9 * np.abs(y).max(initial=0):
        return 0.0
    return float(1 - np.square(y - predicted(x, x, y, words)).sum() / np.square(y - y.mean()).sum())


def slope(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """The least-squares slope of y over x where volume i counts counts[r, i] times: (R), nan where x does not vary."""
    counts = np.ones((1, len(x))) if counts is None else counts
    total = counts.sum(1)
    x, y = x - x.mean(), y - y.mean()
    mean_x, mean_y = counts @ x / total, counts @ y / total
    spread = counts @ x**2 / total - mean_x**2
    spread[spread < 1e-12 * max(np.square(x).max(initial=0), 1e-300)] = np.nan
    return (counts @ (x * y) / total - mean_x * mean_y) / spread


def with_interval(x: np.ndarray, y: np.ndarray, num_resamples: int, seed: int) -> tuple[float, float, float]:
    """A slope and its 95 % bootstrap interval over volumes; nan without enough of them."""
    if len(x) < FEWEST:
        return np.nan, np.nan, np.nan
    return (float(slope(x, y)[0]), *interval(slope(x, y, bootstrap_counts(len(x), num_resamples, seed))))


class Conditions:
    """Measure: do volumes differ with what they were asked to be, as real ones differ with what is known of them?

    Real volumes have the covariates of a table, synthetic ones those that were asked for (samples.csv beside them). Of
    each quantity that `Anatomy` measures and each covariate there is a slope (for a word, a difference of means from
    the first word). `adherence_<covariate>` is one figure of all that: of the quantity to which the covariate is most
    strongly related in the real volumes, the slope of the synthetic values over those that the real relation predicts
    for them. 1 is as in real volumes, 0 is a generator that does not care, above 1 one that exaggerates.

    Args:
        covariates: names of columns.
        covariate_table: of the real and held-out volumes, see `scripts.scans.participants.Covariates`; None for
            participants.tsv in the folder of the real ones.
        anatomy: which measures the quantities.
        num_resamples, seed: of the bootstrap.
    """

    name = "conditions"
    title = "Conditions"

    def __init__(
        self,
        covariates: Sequence[str],
        covariate_table: str | None,
        anatomy: Anatomy,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.covariates, self.covariate_table, self.anatomy = list(covariates), covariate_table, anatomy
        self.num_resamples, self.seed = num_resamples, seed
        self.known: dict[str, list[dict[str, Any]]] = {}  # cohort name: the covariates of each volume
        self.words: dict[str, list[str] | None] = {}  # of each covariate; None for a number

    @property
    def settings(self) -> dict[str, Any]:
        """The knobs that change the result, and what `check` found to be known of the volumes."""
        return {
            "covariates": self.covariates,
            "known": self.known,
            "label_names": self.anatomy.settings["label_names"],
            "num_resamples": self.num_resamples,
            "seed": self.seed,
        }

    def check(self, cohorts: Cohorts) -> None:
        """Every covariate is known of three real volumes or more; of other cohorts it need not be."""
        real = cohorts.real
        table = Covariates(self.covariates, self.covariate_table, dataset_dir=real.folder)
        self.words = {c["name"]: c.get("words") for c in table.known}
        for cohort in cohorts:
            own = table
            if cohort.name not in (real.name, HELD_OUT):
                own = self.asked_of(cohort, table)
            images = [{"image": path} for path in cohort.files]
            try:
                found = own.attached(images) if own else images
            except BundleError as e:
                if cohort is real:
                    raise
                logger.warning(f"{cohort.name}: {e}")
                found = images
            self.known[cohort.name] = [item.get("covariates", {}) for item in found]
        for name in self.covariates:
            count = sum(values.get(name) is not None for values in self.known[real.name])
            if count < FEWEST:
                raise BundleError(
                    f"covariates: {name} is known of {count} real volumes ({table.path!r}); expected {FEWEST} or more"
                )

    def asked_of(self, cohort: Cohort, real: Covariates) -> Covariates | None:
        """What synthetic volumes were asked to be, as far as any was asked; None where nothing says it."""
        path = os.path.join(cohort.folder, REQUESTS)
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            asked = [c for c in real.known if any((row.get(c["name"]) or "").lower() not in MISSING for row in rows)]
            if not asked:
                return None
            names = [covariate["name"] for covariate in asked]
            return Covariates(names, path, dataset_dir=cohort.folder, description={"covariates": asked})
        except (OSError, BundleError) as e:
            logger.warning(f"{cohort.name}: {e}")
            return None

    def pairs(self, cohort: Cohort, covariate: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(covariate, quantity) of the volumes of which both are known; a word is its place among those of the real."""
        words = self.words[covariate]
        known = [values_of.get(covariate) for values_of in self.known[cohort.name]]
        if words is not None:
            known = [words.index(word) if word in words else None for word in known]
        x = np.array([np.nan if value is None else value for value in known], float)
        both = np.isfinite(x) & np.isfinite(values)
        return x[both], np.asarray(values, float)[both]

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict[str, Any]:
        """Rows of `adherence` and slopes; the data has every pair of a covariate and a quantity."""
        rows, slopes, data, notes = [], [], {}, []
        of_real, own = self.anatomy.quantities(cohorts.real), self.anatomy.quantities(cohort)
        shared = [quantity for quantity in of_real if quantity in own]
        for covariate in self.covariates:
            words = self.words[covariate]
            data[covariate] = {"words": words, "quantities": {}}
            strength = {}
            for quantity in shared:
                real_x, real_y = self.pairs(cohorts.real, covariate, of_real[quantity])
                strength[quantity] = explained(real_x, real_y, words)
                x, y = self.pairs(cohort, covariate, own[quantity])
                found = {"x": x.tolist(), "y": np.round(y, 5).tolist(), "explained": explained(x, y, words)}
                if words is None:
                    found["slope"] = with_interval(x, y, self.num_resamples, self.seed)
                    slopes.append(self.row("slope", quantity, covariate, found["slope"], f"for each 1 of {covariate}"))
                else:
                    found["differences"] = {}
                    for k, word in enumerate(words[1:], 1):
                        chosen = (x == 0) | (x == k)
                        difference = with_interval(x[chosen] / k, y[chosen], self.num_resamples, self.seed)
                        found["differences"][word] = difference
                        if len(words) == 2:
                            note = f"mean of {word} less mean of {words[0]}"
                            slopes.append(self.row("difference", quantity, covariate, difference, note))
                data[covariate]["quantities"][quantity] = found
            best = max(strength, key=strength.get)
            data[covariate]["best"] = best
            real_x, real_y = self.pairs(cohorts.real, covariate, of_real[best])
            x, y = self.pairs(cohort, covariate, own[best])
            if not len(x):
                notes.append(f"{cohort.name}: {covariate} is known of no volume ({REQUESTS}), so it has no figures.")
            expected = predicted(x, real_x, real_y, words)
            usable = np.isfinite(expected)
            value = with_interval(expected[usable], y[usable], self.num_resamples, self.seed)
            note = (
                f"{best} against {covariate}: 1 if it follows as in the real volumes, 0 if not at all; there "
                f"{covariate} explains {strength[best]:.0%} of it"
            )
            rows.append(metric_row(f"adherence_{slug(covariate)}", *value, "real", note))
        return {"rows": rows + slopes, "notes": notes, "data": data}

    def row(self, kind: str, quantity: str, covariate: str, value: Sequence[float], note: str) -> dict[str, Any]:
        name, _, unit = quantity.partition(" (")
        metric = f"{kind}_{slug(name).lower()}_{slug(covariate)}"
        return metric_row(metric, *value, "real", note, unit.rstrip(")"))

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict[str, Any]]:
        """A panel a covariate and quantity, with all cohorts in it; a table of all relations."""
        parts = {name: result["data"] for name, result in results.items()}
        caption = (
            "What was measured against what is known (real) or was asked for (synthetic). Lines are least squares; of "
            "words, a dot is a volume and a diamond the mean. Above each panel: the share that the covariate explains "
            "in the real volumes."
        )
        os.makedirs(folder, exist_ok=True)
        figure = draw_relations(parts, cohorts.colours, cohorts.real.name)
        shown = [save_figure(figure, folder, "conditions.png", "Measured against asked", caption)]
        return [*shown, table(parts)]
