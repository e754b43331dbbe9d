"""Volumes of brain regions, from label maps or a tissue classification, compared with those of the real brains."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import false_discovery_control
from tqdm import tqdm

from scripts.evaluation.anatomy_figures import (
    PANELS_UP_TO,
    by_difference,
    draw_classes,
    draw_distributions,
    draw_effects,
    table,
)
from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.effects import FALSE_DISCOVERY, cohen_d, permutation_p, wasserstein_with_chance, weighted_d
from scripts.evaluation.evaluator import metric_row
from scripts.evaluation.regions import FREESURFER, label_volumes
from scripts.evaluation.tissue import TISSUES, classify, inner_dark
from scripts.running.checks import as_bool, check_knob, check_knobs
from scripts.running.errors import BundleError
from scripts.running.knobs import whole
from scripts.running.pictures import save_figure

ROWS_UP_TO = 8  # regions with rows of their own; more stand in the table only
EFFECT = "standardised difference from the real mean; 0.2 is small, 0.5 medium, 0.8 large (Cohen 1988)"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _no_rows(kinds: str) -> list[dict]:
    """What a cohort that cannot be compared has."""
    metrics = (f"max_abs_cohen_d_{kinds}", f"{kinds}_different", f"wasserstein_{kinds}")
    return [metric_row(metric, np.nan, better="lower") for metric in metrics]


def _with_maps(cohorts: Cohorts) -> dict[str, int]:
    """{cohort name: number of its label maps}."""
    return {cohort.name: sum(map(bool, cohort.label_maps or [])) for cohort in cohorts}


def _needs_tissues(cohorts: Cohorts) -> bool:
    """Whether a cohort has fewer than two label maps; one makes no distribution."""
    return min(_with_maps(cohorts).values()) < 2


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


class Anatomy:
    """Measure: are the regions of the brain as large, and as different from one brain to the next, as in real volumes?

    Regions come from label maps where the real cohort and the cohort in question have them. Where any cohort has none,
    the tissues of `scripts.evaluation.tissue` are given for all cohorts, so that no cohort's label maps are ever
    compared with another's tissues. Tissues are compared as percent of the brain: each brain was scaled to fill its
    grid, and a generator gives every volume the same voxel size, so that its mL say nothing of the brain's size.

    Args:
        label_names: {label: name}, or "freesurfer" for the labels of SynthSeg and FreeSurfer; others are "label 17".
        relative: regions as percent of all labelled voxels instead of mL: the size of the head then does not count.
        num_permutations: of the test of the difference of means. With K regions, none can be found different unless
            2 K / (num_permutations + 1) is below the false-discovery rate, 0.05.
        num_resamples: bootstrap resamples, and relabellings for the Wasserstein distance.
        max_volumes: larger cohorts enter the Wasserstein distance as random subsets (see `wasserstein_with_chance`).
        seed: of all of these.

    Raises:
        BundleError: a knob that cannot be used.
    """

    name = "anatomy"
    title = "Anatomy"

    def __init__(
        self,
        label_names: Mapping[str, str] | str | None = None,
        relative: bool = False,
        num_permutations: int = 9999,
        num_resamples: int = 1000,
        max_volumes: int = 300,
        seed: int = 0,
    ) -> None:
        names = FREESURFER if label_names == "freesurfer" else label_names or {}
        if not isinstance(names, Mapping) or not all(re.fullmatch(r"-?\d+", str(label)) for label in names):
            raise BundleError(
                f"label_names: {label_names!r} was given; expected labels and names such as "
                f"{{'17': 'left hippocampus'}}, or 'freesurfer'"
            )
        check_knobs(num_permutations=num_permutations, num_resamples=num_resamples, seed=seed)
        check_knob("max_volumes", max_volumes, whole(2))
        self.label_names = {int(label): str(name) for label, name in names.items()}
        self.relative = as_bool(relative=relative)
        self.num_permutations, self.num_resamples = num_permutations, num_resamples
        self.max_volumes, self.seed = max_volumes, seed
        self.with_tissues: bool | None = None
        self.tissues: dict[str, tuple[Cohort, dict]] = {}
        self.inner: dict[str, tuple[Cohort, np.ndarray]] = {}
        self.labels: dict[str, tuple[Cohort, list[dict[int, float] | None]]] = {}

    @property
    def settings(self) -> dict:
        """The knobs that change the result, and whether `check` saw a cohort without maps: then all have tissues."""
        return {
            "label_names": {str(label): name for label, name in self.label_names.items()},
            "relative": self.relative,
            "num_permutations": self.num_permutations,
            "num_resamples": self.num_resamples,
            "max_volumes": self.max_volumes,
            "seed": self.seed,
            "with_tissues": self.with_tissues,
        }

    def check(self, cohorts: Cohorts) -> None:
        """Every cohort has two volumes; every label map is there, and the first of each cohort is a label map."""
        for cohort in cohorts:
            if len(cohort) < 2:
                raise BundleError(f"{cohort.name}: {len(cohort)} volume was found; a distribution needs two or more")
            maps = [path for path in cohort.label_maps or [] if path]
            for path in maps:
                if not os.path.isfile(path):
                    raise BundleError(f"label map {path!r} of {cohort.name}: there is no such file")
            if maps:
                label_volumes(maps[0])
        self.with_tissues = _needs_tissues(cohorts)

    # What is measured of one cohort; each once, since every comparison needs the real one again.

    def _of_tissues(self, cohort: Cohort) -> dict:
        """{"percent": (N, 3), "ml": (N, 3), "size": (N)}, nan where a volume could not be classified."""
        known = self.tissues.get(cohort.name)
        if known is None or known[0] is not cohort:
            percent = np.full((len(cohort), 3), np.nan)
            voxels = np.zeros(len(cohort))
            for i, volume in enumerate(tqdm(cohort.volumes, f"tissues of {cohort.name}")):
                if (found := classify(volume, self.seed)) is not None:
                    percent[i], voxels[i] = 100 * found.fractions, found.num_voxels
            brain = voxels * np.asarray(cohort.voxel_size, float).prod(1) / 1000
            size = 100 * voxels / cohort.volumes[0].size
            known = cohort, {"percent": percent, "ml": percent / 100 * brain[:, None], "size": size}
            self.tissues[cohort.name] = known
        return known[1]

    def _of_labels(self, cohort: Cohort) -> list[dict[int, float] | None]:
        """{label: mL} of each volume, None without a label map."""
        known = self.labels.get(cohort.name)
        if known is None or known[0] is not cohort:
            paths = tqdm(cohort.label_maps or [], f"label maps of {cohort.name}")
            known = cohort, [label_volumes(path) if path else None for path in paths]
            self.labels[cohort.name] = known
        return known[1]

    def quantities(self, cohort: Cohort) -> dict[str, np.ndarray]:
        """{name with its unit: (N) values} of what is measured in each volume; nan where that was not possible.

        The tissues and what is dark within (see `inner_dark`), in percent of the brain, and the brain in percent of
        the picture; where all volumes have label maps also the mL of each label.
        """
        tissues = self._of_tissues(cohort)
        known = self.inner.get(cohort.name)
        if known is None or known[0] is not cohort:
            known = self.inner[cohort.name] = cohort, 100 * np.array([inner_dark(v) for v in cohort.volumes])
        found = {f"{name} (% of the brain)": tissues["percent"][:, k] for k, name in enumerate(TISSUES)}
        found |= {"inner dark (% of the brain)": known[1], "brain (% of the picture)": tissues["size"]}
        maps = [volumes for volumes in self._of_labels(cohort) if volumes]
        if len(maps) == len(cohort):
            labels = self._labels(cohort)
            for label, name in zip(labels, self._names(labels)):
                found[f"{name} (mL)"] = np.array([volumes.get(label, 0.0) for volumes in maps])
        return found

    def _names(self, labels: Sequence[int]) -> list[str]:
        """Of the labels; where two have the same name, with their numbers."""
        names = [self.label_names.get(label, f"label {label}") for label in labels]
        return [n if names.count(n) == 1 else f"{n} ({label})" for n, label in zip(names, labels)]

    def _labels(self, cohort: Cohort) -> list[int]:
        """The labels that occur in any label map of a cohort."""
        return sorted({label for volumes in self._of_labels(cohort) for label in volumes or {}})

    def _regions(self, cohort: Cohort, labels: Sequence[int]) -> np.ndarray:
        """(volumes with a label map, labels), in mL or percent. A label that a map lacks has the volume 0."""
        found = [volumes for volumes in self._of_labels(cohort) if volumes]
        table = np.array([[volumes.get(label, 0.0) for label in labels] for volumes in found]).reshape(-1, len(labels))
        if self.relative:
            table *= 100 / np.array([sum(volumes.values()) for volumes in found])[:, None]
        return table

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict:
        """Rows of regions where both cohorts have label maps, rows of tissues where not all have them."""
        rows, notes, data = [], [], {}
        with_maps = _with_maps(cohorts)
        mapped = {name for name, number in with_maps.items() if number >= 2}
        in_question = with_maps[cohort.name]
        if cohorts.real.name in mapped:
            labels = self._labels(cohorts.real)
            if cohort.name in mapped and labels:
                real, own = (self._regions(c, labels) for c in (cohorts.real, cohort))
                if in_question < len(cohort):
                    notes.append(
                        f"{cohort.name}: {len(cohort) - in_question} of {len(cohort)} volumes have no label map and "
                        "are left out of the regions."
                    )
                empty = in_question - len(own)
                if empty:
                    notes.append(f"{cohort.name}: {empty} label maps hold nothing but background and are left out.")
                new = {label for v in self._of_labels(cohort) for label in v or {}} - set(labels)
                if new:
                    notes.append(
                        f"{cohort.name}: the labels {', '.join(map(str, sorted(new)))} do not occur in the real label "
                        "maps and are left out."
                    )
                if min(len(real), len(own)) < 2:
                    rows += _no_rows("regions")
                else:
                    names = self._names(labels)
                    unit = "% of all labels" if self.relative else "mL"
                    found, data["regions"] = self._compare("region", names, unit, real, own, cohort is cohorts.real)
                    rows += found
                    if not self.relative:
                        notes.append(
                            "Regions in mL follow the voxel size that the files of the label maps state; generators "
                            "often write the same one into every file. The switch `relative` compares percent of all "
                            "labelled voxels instead."
                        )
            else:
                reason = f"only {in_question} label map" if in_question else "no label maps"
                notes.append(
                    f"{cohort.name} has {reason}, so it has no rows of regions; its tissues are compared with those "
                    "of the real volumes, got in the same way."
                )
                rows += _no_rows("regions")
        elif in_question:
            notes.append(
                f"The label maps of {cohort.name} are not used: label maps are only compared with label maps, and of "
                f"the real volumes {with_maps[cohorts.real.name]} have one."
            )
        if _needs_tissues(cohorts):
            found, more, data["tissues"] = self._tissue_part(cohort, cohorts)
            rows += found
            notes += more
        return {"rows": rows, "notes": notes, "data": data}

    def _tissue_part(self, cohort: Cohort, cohorts: Cohorts) -> tuple[list[dict], list[str], dict | None]:
        """Rows, notes and data of the tissues of one cohort."""
        notes = [
            "CSF, grey and white matter are a Gaussian mixture's three classes of intensity (scikit-learn), without "
            "any knowledge of anatomy: no replacement for a segmentation such as SynthSeg. A voxel between two tissues "
            "or at the brain's surface falls into the class that is as bright, so CSF comes out too large. Compare "
            "cohorts by it; do not take a single figure for the anatomy of one brain."
        ]
        real, own = (self._of_tissues(c)["percent"] for c in (cohorts.real, cohort))
        usable = np.isfinite(own).all(1)
        if not usable.all():
            notes.append(
                f"{cohort.name}: {int((~usable).sum())} of {len(cohort)} volumes could not be classified (too few "
                "voxels or no contrast) and are left out of the tissues."
            )
        real, own = real[np.isfinite(real).all(1)], own[usable]
        if min(len(real), len(own)) < 2:
            return _no_rows("tissues"), notes, None
        unit = "% of the brain"
        rows, data = self._compare("tissue", list(TISSUES), unit, real, own, cohort is cohorts.real)
        ml = self._of_tissues(cohort)["ml"][usable]
        data["ml"] = {name: [float(c.mean()), float(c.std(ddof=1))] for name, c in zip(TISSUES, ml.T)}
        data["ml"]["brain"] = [float(ml.sum(1).mean()), float(ml.sum(1).std(ddof=1))]
        return rows, notes, data

    def _compare(
        self, kind: str, names: list[str], unit: str, real: np.ndarray, own: np.ndarray, itself: bool
    ) -> tuple[list[dict], dict]:
        """Rows and data of one cohort: `own` (N, K) against `real` (M, K); only its own means if it is the real one."""
        counts = bootstrap_counts(len(own), self.num_resamples, self.seed)
        means = counts @ own / len(own)
        data = {
            "names": names,
            "unit": unit,
            "values": np.round(own, 5).tolist(),
            "mean": own.mean(0).tolist(),
            "std": own.std(0, ddof=1).tolist(),
        }
        many = len(names) > ROWS_UP_TO
        rows = []
        for k, name in enumerate([] if many else names):
            low, high = interval(means[:, k])
            rows.append(metric_row(f"{kind}_{_slug(name)}", own[:, k].mean(), low, high, "real", "mean", unit))
        if itself:
            for name in [] if many else names:
                rows.append(metric_row(f"cohen_d_{_slug(name)}", 0.0, np.nan, np.nan, "real", EFFECT))
            return rows, data
        d = cohen_d(real, own)
        of_real = bootstrap_counts(len(real), self.num_resamples, self.seed + 1)
        resampled = weighted_d(real, own, of_real, counts)
        intervals = [interval(column) for column in resampled.T]
        p = permutation_p(real, own, self.num_permutations, self.seed)
        p_fdr = false_discovery_control(p)
        data |= {
            "cohen_d": [_finite(value) for value in d],
            "cohen_d_low": [_finite(low) for low, _ in intervals],
            "cohen_d_high": [_finite(high) for _, high in intervals],
            "p": p.tolist(),
            "p_fdr": p_fdr.tolist(),
        }
        for k, name in enumerate([] if many else names):
            rows.append(metric_row(f"cohen_d_{_slug(name)}", d[k], *intervals[k], "real", EFFECT))
        note = f"permutation test of the mean, {self.num_permutations} permutations, Benjamini-Hochberg corrected"
        for k, name in enumerate([] if many else names):
            rows.append(metric_row(f"p_fdr_{_slug(name)}", p_fdr[k], np.nan, np.nan, None, note))
        largest = np.nanmax(np.abs(d)) if np.isfinite(d).any() else np.nan
        note = f"largest of {len(names)} {kind}s"
        rows.append(metric_row(f"max_abs_cohen_d_{kind}s", largest, np.nan, np.nan, "lower", note))
        note = f"of {len(names)} {kind}s: means that differ, at a false-discovery rate of {FALSE_DISCOVERY:g}"
        different = int((p_fdr < FALSE_DISCOVERY).sum())
        rows.append(metric_row(f"{kind}s_different", different, np.nan, np.nan, "lower", note))
        spread = real.std(0, ddof=1)
        varied = spread > 1e-9 * np.abs(real.mean(0))
        if varied.any():
            x, y = ((v[:, varied] - real.mean(0)[varied]) / spread[varied] for v in (real, own))
            w = wasserstein_with_chance(x, y, self.max_volumes, self.num_resamples, self.seed)
            data["wasserstein"] = w
            note = f"distance of the joint distributions of {int(varied.sum())} {kind}s, in real SD a {kind}"
            rows.append(metric_row(f"wasserstein_{kind}s", w["value"], w["low"], w["high"], "lower", note, "real SD"))
            note = "what as many volumes of one population give: mean and 95 % of relabellings; copies are nearer"
            chance = (w["chance"], w["chance_low"], w["chance_high"])
            rows.append(metric_row(f"wasserstein_{kind}s_chance", *chance, None, note, "real SD"))
        return rows, data

    # Pictures and tables.

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict]:
        """For regions and tissues, where there are any: distributions, effect sizes, a table; and the classes."""
        os.makedirs(folder, exist_ok=True)
        colours = cohorts.colours
        shown = []
        for kind in ("regions", "tissues"):
            parts = {c.name: results.get(c.name, {}).get("data", {}).get(kind) for c in cohorts}
            parts = {name: part for name, part in parts.items() if part}
            if cohorts.real.name not in parts:
                continue
            if kind == "tissues":
                caption = (
                    "The first volume of each cohort, its middle slices and their classes: CSF blue, grey matter grey, "
                    "white matter white. Judge here whether the classification can be trusted."
                )
                figure = draw_classes(cohorts, self.seed)
                shown.append(save_figure(figure, folder, "anatomy_tissue_maps.png", "Tissue classes", caption))
            of_real = parts[cohorts.real.name]
            order = by_difference(parts, len(of_real["names"]))[:PANELS_UP_TO]
            left_out = len(of_real["names"]) - len(order)
            note = f" The {left_out} regions that differ least are not drawn." if left_out else ""
            caption = f"A dot is a volume; boxes show quartiles, diamonds the mean. In {of_real['unit']}.{note}"
            figure = draw_distributions(parts, colours, order)
            shown.append(save_figure(figure, folder, f"anatomy_{kind}.png", f"Distributions of {kind}", caption))
            if len(parts) > 1:
                caption = (
                    "Cohen's d of each mean against the real one, with 95 % bootstrap intervals over volumes; filled "
                    f"where the false-discovery rate is below {FALSE_DISCOVERY:g}. Right: larger than in real volumes. "
                    f"Shaded: less than 0.2, a small effect.{note}"
                )
                figure, file = draw_effects(parts, colours, order), f"anatomy_{kind}_cohen_d.png"
                shown.append(save_figure(figure, folder, file, f"Effect sizes of {kind}", caption))
            shown.append(table(kind, parts, cohorts.real.name))
        return shown
