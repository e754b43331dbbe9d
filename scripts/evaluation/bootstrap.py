"""Bootstrap intervals (Efron 1979) over volumes: a volume, not a pair of volumes, is what was sampled independently."""

from __future__ import annotations

import numpy as np


def bootstrap_counts(n: int, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each of n volumes is in each resample with replacement: (num_resamples, n), rows sum to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values; values that are not finite are left out. (nan, nan) without any."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
