"""Pair-wise MS-SSIM of a cohort, the measure of Dorjsembe et al. 2022."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from scripts.evaluation.bootstrap import bootstrap_counts, interval
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.evaluator import metric_row
from scripts.evaluation.ms_ssim import ALIKE, PROTOCOLS, Window, combine, protocol_for, random_pairs, scale_terms
from scripts.running.checks import check_knobs, resolved_device
from scripts.running.errors import BundleError
from scripts.running.pictures import draw_box, save_figure

PAPER = {"real": 0.8448, "3D-DDPM": 0.8241}  # [2], protocol kwon2019


class Diversity:
    """Measure: mean MS-SSIM over random pairs of a cohort; the closer to the real cohort's, the better.

    High means that the volumes are alike (mode collapse); far below the real value, that they are noise or no brains.

    Args:
        protocols: some of PROTOCOLS, one row each.
        num_pairs: random distinct pairs a cohort; all if there are fewer.
        seed: of the pairs and of the bootstrap.
        device: where to compute, "cpu" or "cuda" and the like; None takes a GPU if there is one.
        batch_size: pairs at once; None for a choice by the device.
        memory: GiB of maps held at once (see `scale_terms`).
    """

    name = "diversity"
    title = "Diversity"
    together = True

    def __init__(
        self,
        protocols: Sequence[str] = PROTOCOLS,
        num_pairs: int = 1000,
        seed: int = 0,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        memory: float = 4.0,
    ) -> None:
        unknown = [name for name in protocols if name not in PROTOCOLS]
        if isinstance(protocols, str) or not protocols or unknown or len(set(protocols)) < len(protocols):
            raise BundleError(f"protocols: {protocols!r} was given; it must be a list of some of {PROTOCOLS}")
        check_knobs(num_pairs=num_pairs, batch_size=1 if batch_size is None else batch_size, seed=seed, memory=memory)
        self.protocols, self.num_pairs, self.seed = list(protocols), num_pairs, seed
        self.device = resolved_device(device)
        self.batch_size, self.memory = batch_size, memory

    @property
    def settings(self) -> dict:
        """The knobs that change the result."""
        return {"protocols": self.protocols, "num_pairs": self.num_pairs, "seed": self.seed}

    def check(self, cohorts: Cohorts) -> None:
        """Every cohort has a pair, and every protocol fits the volumes."""
        for cohort in cohorts:
            if len(cohort) < 2:
                raise BundleError(f"{cohort.name}: {len(cohort)} volume was found; a pair needs two or more")
            for protocol in self.protocols:
                protocol_for(protocol, cohort.volumes.shape[1:])

    def __call__(self, cohort: Cohort, cohorts: Cohorts) -> dict:
        """One row a protocol: mean over the pairs, with the 95 % bootstrap interval over volumes."""
        shape = cohort.volumes.shape[1:]
        pairs = random_pairs(len(cohort), self.num_pairs, self.seed)
        rows, notes, data = [], [], {}
        terms: dict[Window, np.ndarray] = {}
        for name in self.protocols:
            protocol = protocol_for(name, shape)
            if protocol.window not in terms:
                description = f"MS-SSIM ({name}) {cohort.name}"
                terms[protocol.window] = scale_terms(
                    cohort.volumes, None, pairs, name, self.device, self.batch_size, self.memory, description
                )
            values = combine(terms[protocol.window], name, shape)
            low, high = interval(resampled_means(values, pairs, bootstrap_counts(len(cohort), seed=self.seed)))
            note = f"{protocol.note}; std over {len(pairs)} pairs of {len(cohort)} volumes {values.std():.4f}"
            alike = int((values > ALIKE).sum())
            if alike:
                note += f"; {alike} pairs above {ALIKE}, nearly the same volume twice"
            rows.append(metric_row(f"ms_ssim_{name}", values.mean(), low, high, "real", note))
            opposite = int((values == 0).sum())
            if opposite:
                notes.append(
                    f"{opposite} of {len(pairs)} pairs of {cohort.name} have a negative mean at some scale; MS-SSIM by "
                    f"{name} counts them as 0."
                )
            data[name] = [round(float(value), 6) for value in values]
        return {"rows": rows, "notes": notes, "data": data}

    def draw(self, results: dict[str, dict], cohorts: Cohorts, folder: str) -> list[dict]:
        """One figure: the distribution over the pairs, a panel a protocol and a box a cohort."""
        names = [cohort.name for cohort in cohorts if cohort.name in results]
        colours = cohorts.colours
        # 1000 pixels wide: panels side by side while six boxes still fit one, below each other for more cohorts.
        number = len(self.protocols)
        grid = (1, number) if len(names) <= 6 else (number, 1)
        figure = Figure(figsize=(9.1, 0.6 + 3.6 * grid[0]), dpi=110, layout="constrained")
        panels = figure.subplots(*grid, squeeze=False).ravel()
        rng = np.random.default_rng(0)
        for panel, protocol in zip(panels, self.protocols):
            for place, name in enumerate(names):
                values = np.array(results[name]["data"][protocol])
                jitter = rng.uniform(-0.3, 0.3, len(values))
                panel.plot(place + jitter, values, ".", color=colours[name], markersize=2, alpha=0.35, zorder=1)
                draw_box(panel, place, values, colours[name], 6)
            if protocol == "kwon2019" and cohorts.real.volumes.ndim == 4:
                for (source, value), style in zip(PAPER.items(), ("--", ":")):
                    panel.axhline(value, color="0.3", linestyle=style, linewidth=1, label=f"{source} {value}", zorder=0)
                title = "lines in kwon2019: Dorjsembe et al. 2022, another dataset"
                figure.legend(loc="outside lower left", ncols=2, fontsize=8, title=title, title_fontsize=8)
            panel.set_title(protocol, fontsize=10)
            panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
            panel.set_xlim(-0.6, len(names) - 0.4)
        figure.supylabel("MS-SSIM of a pair", fontsize=10)
        os.makedirs(folder, exist_ok=True)
        caption = (
            "A dot is a pair of volumes of one cohort; boxes show quartiles, diamonds the mean. Volumes as diverse as "
            "the real ones have the real distribution; values near 1 mean that the volumes repeat."
        )
        return [save_figure(figure, folder, "diversity.png", "Pair-wise MS-SSIM", caption)]


def resampled_means(values: np.ndarray, pairs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over pairs in each bootstrap resample of the volumes.

    A pair (i, j) weighs counts[:, i] counts[:, j]; a volume drawn twice makes no pair with itself.

    Args:
        values: (P).
        pairs: (P, 2) volumes.
        counts: (R, N), how often a volume is in a resample.

    Returns:
        (R); nan where a resample holds none of the pairs.
    """
    means = np.full(len(counts), np.nan)
    for r, count in enumerate(counts):
        weights = count[pairs[:, 0]] * count[pairs[:, 1]]
        if weights.sum():
            means[r] = weights @ values / weights.sum()
    return means
