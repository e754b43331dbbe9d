"""Memorisation and privacy: whether a synthetic volume is a copy of one that the generator was trained on.

Each synthetic volume is compared with every training volume (the real cohort) and every held-out one, as it is and
mirrored left to right; the larger similarity counts. All correlations are computed; a second similarity (MS-SSIM) only
for the few training volumes that correlate most.

The nearest of many is nearer than the nearest of few, by chance alone. With n training and m held-out volumes and no
memorisation, both are exchangeable, so the nearest of all n + m is a training volume with probability
p = n / (n + m). `nearer_to_training_excess` is (fraction - p) / (1 - p): 0 by chance, 1 if all are nearer to training.
(Taking a random m of the n training volumes would also be fair, but a copy of one volume would then be seen with
probability m / n only.) Its p-value is that of a permutation test, which shuffles who is training and who is held out.

A smooth volume correlates well with everything, so that a large similarity alone is no proof. As in [1], the distance
to the nearest training volume is therefore also given relative to the mean distance to the next ones,

    r = (1 - c_1) / mean(1 - c_2, ..., 1 - c_{k+1}),

which is near 0 for a copy and near 1 for a volume that is equally far from all.

    [1] N. Carlini et al., "Extracting training data from diffusion models", USENIX Security 2023, section 4.2.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable

import numpy as np
import torch

from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.evaluator import metric_row
from scripts.evaluation.memorisation_figures import draw_histograms, draw_pairs
from scripts.evaluation.nearness import (
    Comparison,
    correlations,
    excess_over_chance,
    label_permutation_p,
    relative_distance,
)
from scripts.running.checks import check_knobs, resolved_device
from scripts.running.errors import BundleError


class Memorisation:
    """Measure: nearest training volume against nearest held-out volume, and how many volumes look like copies.

    The real cohort is compared with itself, each volume with all others; the held-out one with it: both say what is
    usual without memorisation. Real pairs that correlate by `duplicate` or more are the same scan twice; they are named
    and do not count. A volume is `flagged` as a copy if it correlates more with a training volume than any real volume
    does with another training volume, and if its relative distance r is also less than that of any real volume: the
    first alone would flag every blurred volume.

    Args:
        similarity: (first (N, *spatial), second (M, *spatial), pairs (P, 2)) -> (P), larger is more alike, such as
            `scripts.evaluation.ms_ssim.ms_ssim_pairs`; None for correlation alone.
        candidates: of each volume, so many volumes that correlate most are compared by `similarity` too.
        duplicate: correlation from which two real volumes are the same scan.
        neighbours: k of the relative distance.
        num_worst: pairs in the picture of each synthetic cohort.
        num_resamples: of the bootstrap and of the permutation test.
        seed: of both.
        device: where to compute, "cpu" or "cuda" and the like; None takes a GPU if there is one.
        memory: GiB of volumes held at once for the correlations.
    """

    name = "memorisation"
    title = "Memorisation and privacy"
    together = True

    def __init__(
        self,
        similarity: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None,
        candidates: int = 5,
        duplicate: float = 0.999,
        neighbours: int = 50,
        num_worst: int = 5,
        num_resamples: int = 1000,
        seed: int = 0,
        device: str | torch.device | None = None,
        memory: float = 1.0,
    ) -> None:
        if similarity is not None and not callable(similarity):
            raise BundleError(
                f"similarity: {similarity!r} was given; expected a function of two arrays of volumes and pairs of "
                "them, such as scripts.evaluation.ms_ssim.ms_ssim_pairs, or null"
            )
        check_knobs(candidates=candidates, neighbours=neighbours, num_worst=num_worst, num_resamples=num_resamples)
        check_knobs(seed=seed, duplicate=duplicate, memory=memory)
        self.measure, self.candidates, self.duplicate = similarity, candidates, duplicate
        self.neighbours, self.num_worst, self.num_resamples, self.seed = neighbours, num_worst, num_resamples, seed
        self.device = resolved_device(device)
        self.memory = memory
        self.kinds = ("correlation",) if similarity is None else ("correlation", "ms_ssim")
        self._cohorts: Cohorts | None = None
        self._known: dict[tuple[str, str], Comparison] = {}

    @property
    def settings(self) -> dict:
        """The knobs that change the result."""
        return {
            "similarity": _described(self.measure),
            "candidates": self.candidates,
            "duplicate": self.duplicate,
            "neighbours": self.neighbours,
            "num_worst": self.num_worst,
            "num_resamples": self.num_resamples,
            "seed": self.seed,
        }

    def check(self, cohorts: Cohorts) -> None:
        """All volumes have one shape, and the second similarity can be computed for it."""
        cohorts.check_one_shape()
        if self.measure is not None:
            found = np.shape(self.measure(cohorts.real.volumes[:1], cohorts.real.volumes[:1], np.array([[0, 0]])))
            if found != (1,):
                raise BundleError(f"similarity: it returned the shape {found} for one pair; expected (1,)")

    def compare(self, first: Cohort, second: Cohort, cohorts: Cohorts) -> Comparison:
        """`first` against the real or held-out cohort `second`; computed once for these cohorts."""
        if self._cohorts is not cohorts:
            self._cohorts, self._known = cohorts, {}
        key = (first.name, second.name)
        if key not in self._known:
            self._known[key] = self._compared(first, second, cohorts)
        return self._known[key]

    def _compared(self, first: Cohort, second: Cohort, cohorts: Cohorts) -> Comparison:
        what = f"{first.name} to {second.name}"
        values, flipped = correlations(first.volumes, second.volumes, self.device, self.memory, f"correlation {what}")
        if first is second:
            np.fill_diagonal(values, -np.inf)
        duplicates = np.zeros((0, 2), int)
        if first is cohorts.real or first is cohorts.held_out:
            duplicates = np.argwhere(values >= self.duplicate)
            values[tuple(duplicates.T)] = -np.inf
            if first is second:
                duplicates = duplicates[duplicates[:, 0] < duplicates[:, 1]]
        nearest = np.argsort(-values, axis=1, kind="stable")[:, : self.candidates]
        rows = np.repeat(np.arange(len(first)), nearest.shape[1])
        pairs = np.stack([rows, nearest.ravel()], 1)
        counts = np.isfinite(values[tuple(pairs.T)])
        mirrored = flipped[tuple(pairs.T)]
        exact = np.zeros(len(pairs), bool)
        for p in np.flatnonzero(counts & (values[tuple(pairs.T)] > 0.99)):
            volume = first.volumes[pairs[p, 0]]
            exact[p] = np.array_equal(np.flip(volume, 0) if mirrored[p] else volume, second.volumes[pairs[p, 1]])
        ms_ssim = None
        if self.measure is not None:
            alike = np.full(len(pairs), np.nan)
            chosen = counts & ~mirrored
            if chosen.any():
                alike[chosen] = self.measure(first.volumes, second.volumes, pairs[chosen])
            chosen = counts & mirrored
            if chosen.any():
                volumes, places = np.unique(pairs[chosen, 0], return_inverse=True)
                images = np.ascontiguousarray(np.flip(first.volumes[volumes], 1))
                alike[chosen] = self.measure(images, second.volumes, np.stack([places, pairs[chosen, 1]], 1))
            ms_ssim = np.nan_to_num(alike.reshape(nearest.shape), nan=-np.inf).max(1)
            ms_ssim[~np.isfinite(ms_ssim)] = np.nan
        return Comparison(values, flipped, nearest[:, 0], ms_ssim, exact.reshape(nearest.shape).any(1), duplicates)

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict:
        """Similarities to training and held-out volumes, the fraction nearer to training, and the flagged fractions."""
        real, held_out = cohorts.real, cohorts.held_out
        synthetic = cohort is not real and cohort is not held_out
        training = self.compare(cohort, real, cohorts)
        unseen = None if held_out is None else self.compare(cohort, held_out, cohorts)
        rows = []
        for kind in self.kinds:
            rows += self._nearest_rows(kind, cohort, training, unseen, cohorts)
        rows += self._chance_rows(cohort, training, unseen, cohorts)
        data = {"training": training.data(), "held_out": None if unseen is None else unseen.data(), "largest": {}}
        if cohort is not real:
            yardsticks = [self.compare(real, real, cohorts)]
            if synthetic and held_out is not None:
                yardsticks.append(self.compare(held_out, real, cohorts))
            flagged, data["largest"] = self._flagged_rows(cohort, training, yardsticks)
            rows += flagged
            rows.append(
                self._fraction("exact_copies", training.exact, "lower", f"{training.exact.sum()} with the same voxels")
            )
        return {"rows": rows, "notes": self._notes(cohort, training, cohorts), "data": data}

    def _fraction(self, metric: str, true: np.ndarray, better: str | None, note: str) -> dict:
        """A row: the mean of (N) values that are finite, with its bootstrap interval over volumes."""
        true = np.asarray(true, float)
        true = true[np.isfinite(true)]
        if not len(true):
            return metric_row(metric, np.nan, np.nan, np.nan, better, note)
        counts = bootstrap_counts(len(true), self.num_resamples, self.seed)
        return metric_row(metric, true.mean(), *interval(counts @ true / len(true)), better, note)

    def _nearest_rows(
        self, kind: str, cohort: Cohort, training: Comparison, unseen: Comparison | None, cohorts: Cohorts
    ) -> list[dict]:
        """Mean similarity to the nearest training and held-out volume."""
        others = "other " if cohort is cohorts.real else ""
        note = f"mean over {len(cohort)} volumes; nearest of {len(cohorts.real) - (cohort is cohorts.real)} {others}"
        rows = [
            self._fraction(f"nearest_training_{kind}", training.similarity(kind), "real", f"{note}training volumes")
        ]
        metric = f"nearest_held_out_{kind}"
        if unseen is None:
            return rows + [metric_row(metric, np.nan, np.nan, np.nan, None, "needs held-out volumes (held_out_dir)")]
        others = "other " if cohort is cohorts.held_out else ""
        size = len(cohorts.held_out) - (cohort is cohorts.held_out)
        note = f"nearest of {size} {others}held-out volumes, so not comparable with the nearest of {len(cohorts.real)}"
        return rows + [self._fraction(metric, unseen.similarity(kind), None, note)]

    def _chance_rows(
        self, cohort: Cohort, training: Comparison, unseen: Comparison | None, cohorts: Cohorts
    ) -> list[dict]:
        """What compares nearness to training with nearness to held-out volumes."""
        real, held_out = cohorts.real, cohorts.held_out
        synthetic = cohort is not real and cohort is not held_out
        if unseen is None:
            metrics = ["nearer_to_training"] + [f"nearer_to_training_excess_{kind}" for kind in self.kinds]
            metrics += [
                "nearer_to_training_p",
                "nearer_than_held_out_to_each_other",
                "nearer_than_held_out_to_training",
            ]
            note = "needs held-out volumes (held_out_dir)"
            return [metric_row(metric, np.nan, np.nan, np.nan, None, note) for metric in metrics]
        sizes = len(real) - (cohort is real), len(held_out) - (cohort is held_out)
        rows = []
        for kind in self.kinds:
            near, far = training.similarity(kind), unseen.similarity(kind)
            nearer = np.where(np.isnan(near + far), np.nan, (near > far) + 0.5 * (near == far))
            chance = sizes[0] / sum(sizes)
            if kind == "correlation":
                note = f"{chance:.3f} by chance, as there are {sizes[0]} training and {sizes[1]} held-out volumes"
                rows.append(self._fraction("nearer_to_training", nearer, None, note))
            excess = excess_over_chance(nearer, *sizes)
            note = f"(fraction - {chance:.3f}) / (1 - {chance:.3f}): 0 by chance, 1 if all are nearer to training"
            rows.append(self._fraction(f"nearer_to_training_excess_{kind}", excess, "lower", note))
        if synthetic:
            pooled = np.concatenate([training.correlation, unseen.correlation], 1).argmax(1)
            p = label_permutation_p(pooled, *sizes, self.num_resamples, self.seed)
            note = f"permutation test of the labels training and held-out; 1/{self.num_resamples + 1} at least"
            rows.append(metric_row("nearer_to_training_p", p, np.nan, np.nan, None, note))
        each_other = self.compare(held_out, held_out, cohorts).nearest
        note = "chance that a volume is nearer to training than a held-out volume is to the other held-out ones"
        rows.append(
            self._superiority(
                "nearer_than_held_out_to_each_other", training.nearest, each_other, cohort, held_out, note
            )
        )
        if cohort is not held_out:
            to_training = self.compare(held_out, real, cohorts).nearest
            note = "chance that a volume is nearer to training than a held-out volume is; 0.5 without memorisation"
            metric = "nearer_than_held_out_to_training"
            rows.append(self._superiority(metric, training.nearest, to_training, cohort, held_out, note))
        return rows

    def _superiority(
        self, metric: str, values: np.ndarray, others: np.ndarray, cohort: Cohort, held_out: Cohort, note: str
    ) -> dict:
        """A row: the probability that one of `values` exceeds one of `others`; both are resampled."""
        values, others = values[np.isfinite(values)], others[np.isfinite(others)]
        if not len(values) or not len(others):
            return metric_row(metric, np.nan, np.nan, np.nan, "real", note)
        above = (values[:, None] > others) + 0.5 * (values[:, None] == others)
        of_values = bootstrap_counts(len(values), self.num_resamples, self.seed)
        # Held-out volumes against held-out volumes: the same volumes are drawn on both sides.
        same = cohort is held_out and len(values) == len(others)
        of_others = of_values if same else bootstrap_counts(len(others), self.num_resamples, self.seed + 1)
        resampled = np.einsum("ri,ij,rj->r", of_values, above, of_others, optimize=True) / above.size
        return metric_row(metric, above.mean(), *interval(resampled), "real", note)

    def _flagged_rows(
        self, cohort: Cohort, training: Comparison, yardsticks: list[Comparison]
    ) -> tuple[list[dict], dict[str, float | None]]:
        """What exceeds the similarities of different real volumes, and the largest of these, by kind."""
        rows, largest = [], {}
        pool = "training volumes" + (" and held-out volumes" if len(yardsticks) > 1 else "")
        size = len(cohort)
        for kind in self.kinds:
            usual = np.concatenate([yardstick.similarity(kind) for yardstick in yardsticks])
            usual = usual[np.isfinite(usual)]
            values = training.similarity(kind)
            largest[kind] = float(usual.max()) if len(usual) else None
            for percentile in (100, 95) if kind == "correlation" else (100,):
                limit = np.percentile(usual, percentile) if len(usual) else np.nan
                above = values > limit if len(usual) else np.full(size, np.nan)
                what = "the largest" if percentile == 100 else "the 95th percentile"
                note = (
                    f"{np.nansum(above):.0f} of {size} above {limit:.4f}, {what} of the {len(usual)} nearest "
                    f"similarities of {pool} to other training volumes; smooth volumes come out high"
                )
                metric = f"flagged_{kind}" + ("" if percentile == 100 else f"_{percentile}")
                rows.append(self._fraction(metric, above, "lower", note))
                if metric == "flagged_correlation":
                    flagged = above
        usual = np.concatenate([relative_distance(each.correlation, self.neighbours) for each in yardsticks])
        usual = usual[np.isfinite(usual)]
        distance = relative_distance(training.correlation, self.neighbours)
        limit = usual.min() if len(usual) else np.nan
        below = distance < limit if len(usual) else np.full(size, np.nan)
        note = (
            f"{np.nansum(below):.0f} of {size} whose distance 1 - c to the nearest, relative to the mean of the next "
            f"{min(self.neighbours, training.correlation.shape[1] - 1)}, is below {limit:.3f}, the least of {pool}"
        )
        rows.append(self._fraction("flagged_relative", below, "lower", note))
        both = np.where(np.isfinite(flagged * below), (flagged * below) > 0, np.nan)
        note = f"{np.nansum(both):.0f} of {size} look like copies: flagged_correlation and flagged_relative"
        rows.insert(0, self._fraction("flagged", both, "lower", note))
        return rows, largest

    def _notes(self, cohort: Cohort, training: Comparison, cohorts: Cohorts) -> list[str]:
        """Sentences on copies, duplicates and volumes that cannot be judged."""
        notes = []
        real, held_out = cohorts.real, cohorts.held_out
        constant = [
            os.path.basename(f)
            for f, volume in zip(cohort.files, cohort.volumes)
            if np.ptp(volume.astype(np.float32)) == 0
        ]
        if constant:
            notes.append(
                f"{cohort.name}: {len(constant)} volumes are constant and correlate with nothing: {constant[0]}."
            )
        if cohort is real or cohort is held_out:
            for other in (real, held_out) if cohort is held_out else (real,):
                notes += self._duplicates(cohort, other, self.compare(cohort, other, cohorts).duplicates)
        elif training.exact.all():
            notes.append(
                f"{cohort.name}: every volume is an exact copy of a training volume (every distance is zero): was the "
                "folder of real volumes given twice?"
            )
        elif training.exact.any():
            notes.append(f"{cohort.name}: {training.exact.sum()} volumes are exact copies of training volumes.")
        if held_out is None and cohort is not real:
            notes.append(
                f"{cohort.name}: without held-out volumes (held_out_dir), nearness to training has no yardstick but "
                "the nearness of training volumes to each other."
            )
        return notes

    def _duplicates(self, cohort: Cohort, other: Cohort, pairs: np.ndarray) -> list[str]:
        """A sentence on real volumes that are the same scan."""
        if not len(pairs):
            return []
        names = "; ".join(
            f"{os.path.basename(cohort.files[i])} and {os.path.basename(other.files[j])}" for i, j in pairs[:3]
        )
        where = "" if cohort is other else f" with one of {other.name}"
        return [
            f"{cohort.name}: {len(pairs)} pairs{where} correlate by {self.duplicate} or more and are taken for the "
            f"same scan: {names}{' ...' if len(pairs) > 3 else ''}. They do not count as a yardstick."
        ]

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict]:
        """Histograms of the nearest similarities, and each synthetic cohort's most similar pairs with their files."""
        os.makedirs(folder, exist_ok=True)
        synthetic = [cohort for cohort in cohorts.synthetic if cohort.name in results]
        if not synthetic:
            return []
        entries = [draw_histograms(results, cohorts, synthetic, folder, self.kinds)]
        for number, cohort in enumerate(synthetic, 1):
            data = results[cohort.name]["data"]
            entries += draw_pairs(data, cohort, cohorts.real, folder, number, self.num_worst)
        return entries


def _described(function: Callable | None) -> str | None:
    """A function, or a partial one, in words that change with what it computes."""
    if function is None:
        return None
    if isinstance(function, functools.partial):
        ignored = ("device", "batch_size", "memory", "description")
        words = {key: value for key, value in function.keywords.items() if key not in ignored}
        return f"{_described(function.func)} {json.dumps(words, sort_keys=True, default=str)}"
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
