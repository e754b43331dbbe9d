"""Memorisation and privacy: is a synthetic volume a copy of one that the generator was trained on?

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
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from tqdm import tqdm

from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.evaluator import metric_row, slug
from scripts.running.checks import check_knobs, resolved_device
from scripts.running.errors import BundleError
from scripts.running.pictures import save_figure, triplanar


def correlations(
    first: np.ndarray,
    second: np.ndarray,
    device: str | torch.device = "cpu",
    memory: float = 1.0,
    description: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pearson correlation over the voxels of every volume of `first` with every one of `second`, mirrored or not.

    Args:
        first: (N, *spatial).
        second: (M, *spatial); the first spatial axis is left to right.
        device: where to compute.
        memory: GiB of standardised volumes held at once; at least three volumes are held.
        description: of the progress bar; None for no bar.

    Returns:
        (N, M) float32, the larger correlation of (first[i], second[j]) and (mirror image of first[i], second[j]), and
        (N, M) bool, True where the mirror image's is larger. A constant volume correlates with nothing: 0.

    Raises:
        BundleError: the shapes differ.
    """
    if first.shape[1:] != second.shape[1:]:
        raise BundleError(
            f"memorisation: volumes of {first.shape[1:]} and {second.shape[1:]} voxels cannot be compared; "
            "all must have one shape"
        )
    size = max(1, int(memory * 2**30 / (3 * 4 * np.prod(first.shape[1:]))))
    values = np.empty((len(first), len(second)), np.float32)
    flipped = np.empty(values.shape, bool)
    starts = [(i, j) for i in range(0, len(first), size) for j in range(0, len(second), size)]
    x = x_flipped = None
    for i, j in tqdm(starts, description, unit="block", disable=description is None):
        if j == 0:
            block = torch.as_tensor(first[i : i + size], device=device)
            x, x_flipped = _standardised(block), _standardised(block.flip(1))
        y = _standardised(torch.as_tensor(second[j : j + size], device=device))
        plain, mirrored = _product(x, y), _product(x_flipped, y)
        here = np.s_[i : i + size, j : j + size]
        values[here] = np.maximum(plain, mirrored).clip(-1, 1)
        # A symmetric volume is its own mirror image; rounding must not decide that it is mirrored.
        flipped[here] = mirrored > plain + 1e-5
    return values, flipped


def _standardised(volumes: torch.Tensor) -> torch.Tensor:
    """(B, *spatial) -> (B, voxels) float32 with mean 0 and norm 1, so that a product is a correlation."""
    x = volumes.flatten(1).float()
    x = x - x.mean(1, keepdim=True)
    norm = x.square().sum(1, keepdim=True).sqrt()  # `norm` loses four digits in volumes of 128^3 voxels
    # The mean of equal float32 numbers is not always exactly that number; what is left is no signal.
    return torch.where(norm > 1e-5 * x.shape[1] ** 0.5, x / norm.clamp_min(1e-30), 0)


def _product(x: torch.Tensor, y: torch.Tensor, length: int = 2**12) -> np.ndarray:
    """x @ y.T, summed in float64 every `length` voxels: float32 sums over 128^3 voxels lose the fourth digit."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32, if the program around it chose so, would lose the third
    try:
        total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
        for start in range(0, x.shape[1], length):
            total += x[:, start : start + length] @ y[:, start : start + length].T
    finally:
        torch.set_float32_matmul_precision(previous)
    return total.cpu().numpy()


def relative_distance(values: np.ndarray, neighbours: int) -> np.ndarray:
    """r of the module's docstring for each row of correlations.

    Args:
        values: (N, M); -inf where a pair is left out.
        neighbours: k, how many of the next nearest are averaged; fewer if there are not so many.

    Returns:
        (N) float64, 0 for a copy of one volume; nan where fewer than two correlations are finite.
    """
    ordered = -np.sort(-np.asarray(values, float), axis=1)[:, : neighbours + 1]
    distance = np.where(np.isfinite(ordered), 1 - ordered, np.nan)
    count = np.isfinite(distance[:, 1:]).sum(1)
    others = np.nansum(distance[:, 1:], axis=1) / np.maximum(count, 1)
    return np.where((count > 0) & (others > 0), distance[:, 0] / np.where(others > 0, others, 1), np.nan)


def excess_over_chance(fraction: np.ndarray | float, num_training: float, num_held_out: float) -> np.ndarray | float:
    """(fraction - p) / (1 - p) with p = num_training / (num_training + num_held_out): 0 by chance, 1 at most."""
    chance = num_training / (num_training + num_held_out)
    return (fraction - chance) / (1 - chance)


def label_permutation_p(nearest: np.ndarray, num_training: int, num_held_out: int, resamples: int, seed: int) -> float:
    """How often shuffled labels put at least as many volumes nearer to "training" as the true ones: a p-value.

    Args:
        nearest: (N) number of the nearest real volume, training ones first: 0 ... num_training + num_held_out - 1.
        resamples: shuffles.
        seed: of the shuffles.
    """
    weights = np.bincount(nearest, minlength=num_training + num_held_out)
    shuffled = np.random.default_rng(seed).permuted(np.tile(weights, (resamples, 1)), axis=1)
    as_many = (shuffled[:, :num_training].sum(1) >= weights[:num_training].sum()).sum()
    return float((1 + as_many) / (1 + resamples))


@dataclass
class Comparison:
    """One cohort against one real one, the reference.

    Attributes:
        correlation: (N, M); -inf for pairs that do not count (a volume with itself, the same scan twice).
        flipped: (N, M), whether the mirror image correlates more.
        index: (N) the nearest by correlation.
        ms_ssim: (N) the largest second similarity among the candidates; None without one.
        exact: (N) whether one of the candidates has the same voxels, mirrored or not.
        duplicates: (D, 2) pairs of real volumes that are the same scan; each pair once.
    """

    correlation: np.ndarray
    flipped: np.ndarray
    index: np.ndarray
    ms_ssim: np.ndarray | None
    exact: np.ndarray
    duplicates: np.ndarray

    @property
    def nearest(self) -> np.ndarray:
        """(N) the largest correlation; nan where no pair counts."""
        largest = self.correlation.max(1).astype(float)
        return np.where(np.isfinite(largest), largest, np.nan)

    def similarity(self, kind: str) -> np.ndarray:
        """(N), "correlation" or "ms_ssim"."""
        return self.nearest if kind == "correlation" else self.ms_ssim

    def data(self) -> dict:
        """What the figures need, JSON-able."""
        number = np.arange(len(self.index))
        return {
            "index": self.index.tolist(),
            "flipped": self.flipped[number, self.index].tolist(),
            **{kind: _plain(self.similarity(kind)) for kind in ("correlation", "ms_ssim") if self.has(kind)},
        }

    def has(self, kind: str) -> bool:
        """Whether there are values of that kind."""
        return kind == "correlation" or self.ms_ssim is not None


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
                f"similarity: {similarity!r} was given; a function of two arrays of volumes and pairs of them, such as "
                "scripts.evaluation.ms_ssim.ms_ssim_pairs, or null would be right"
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
        shape = cohorts.real.volumes.shape[1:]
        for cohort in cohorts:
            if cohort.volumes.shape[1:] != shape:
                raise BundleError(
                    f"{cohort.name}: volumes of {cohort.volumes.shape[1:]} voxels were found; {shape}, as the real "
                    "ones have, would be right"
                )
        if self.measure is not None:
            found = np.shape(self.measure(cohorts.real.volumes[:1], cohorts.real.volumes[:1], np.array([[0, 0]])))
            if found != (1,):
                raise BundleError(f"similarity: it returned the shape {found} for one pair; (1,) would be right")

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
        entries = [self._draw_histograms(results, cohorts, synthetic, folder)]
        for number, cohort in enumerate(synthetic, 1):
            entries += self._draw_worst(results[cohort.name]["data"], cohort, cohorts.real, folder, number)
        return entries

    def _draw_histograms(self, results: dict, cohorts: Cohorts, synthetic: list[Cohort], folder: str) -> dict:
        """A row of panels a synthetic cohort, a column a similarity."""
        kinds = self.kinds
        figure = Figure(figsize=(9.1, 0.7 + 2.3 * len(synthetic)), dpi=110, layout="constrained")
        panels = figure.subplots(len(synthetic), len(kinds), squeeze=False, sharex="col")
        colours = cohorts.colours
        for column, kind in enumerate(kinds):
            everything = [_floats(results[c.name]["data"]["training"][kind]) for c in cohorts if c.name in results]
            everything += [
                _floats(results[c.name]["data"]["held_out"][kind])
                for c in synthetic
                if results[c.name]["data"]["held_out"]
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

    def _draw_worst(self, data: dict, cohort: Cohort, real: Cohort, folder: str, number: int) -> list[dict]:
        """Picture and table of the pairs that are most alike."""
        nearest = data["training"]
        worst = most_similar(_floats(nearest["correlation"]), self.num_worst)
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
            table.append(row + ([] if self.measure is None else [None if ms_ssim is None else round(ms_ssim, 4)]))
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
        columns += [] if self.measure is None else ["MS-SSIM"]
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


def _plain(values: np.ndarray) -> list[float | None]:
    """(N) -> JSON-able; what is not finite becomes None."""
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]


def _floats(values: list) -> np.ndarray:
    """The inverse of `_plain`: None becomes nan."""
    return np.array([np.nan if value is None else value for value in values], float)


def _described(function: Callable | None) -> str | None:
    """A function, or a partial one, in words that change with what it computes."""
    if function is None:
        return None
    if isinstance(function, functools.partial):
        ignored = ("device", "batch_size", "memory", "description")
        words = {key: value for key, value in function.keywords.items() if key not in ignored}
        return f"{_described(function.func)} {json.dumps(words, sort_keys=True, default=str)}"
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
