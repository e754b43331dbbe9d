"""How much two samples differ: effect sizes, permutation tests, distances between distributions."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import permutation_test
from tqdm import tqdm

from scripts.evaluation.bootstrap import interval

FALSE_DISCOVERY = 0.05


def cohen_d(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(mean of y - mean of x) / pooled standard deviation (Cohen 1988), of each column.

    Args:
        x, y: (N, K) and (M, K), N and M at least 2.

    Returns:
        (K); nan where both have no spread.
    """
    return weighted_d(x, y, np.ones((1, len(x))), np.ones((1, len(y))))[0]


def weighted_d(x: np.ndarray, y: np.ndarray, of_x: np.ndarray, of_y: np.ndarray) -> np.ndarray:
    """Cohen's d where volume i of x counts of_x[r, i] times: (R, N), (R, M) -> (R, K)."""
    centre = np.concatenate([x, y]).mean(0)  # sums of squares lose no digits
    means, squares, freedom = [], [], len(x) + len(y) - 2
    for values, counts in ((x - centre, of_x), (y - centre, of_y)):
        mean = counts @ values / len(values)
        means.append(mean)
        squares.append(np.maximum(counts @ values**2 - len(values) * mean**2, 0))
    spread = np.sqrt((squares[0] + squares[1]) / freedom)
    spread[spread < 1e-9 * np.abs(centre)] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        d = (means[1] - means[0]) / spread
    return np.where(np.isfinite(d), d, np.nan)


def permutation_p(x: np.ndarray, y: np.ndarray, num_permutations: int = 9999, seed: int = 0) -> np.ndarray:
    """Two-sided p values of the difference of means of each column, by `scipy.stats.permutation_test`.

    Exact where there are no more than `num_permutations` ways to part the volumes into two groups.

    Args:
        x, y: (N, K) and (M, K).
    """

    def difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - b.mean(axis)

    batch = max(1, 2**24 // (x.shape[1] * (len(x) + len(y))))
    rng = np.random.default_rng(seed)
    test = permutation_test((x, y), difference, vectorized=True, n_resamples=num_permutations, batch=batch, rng=rng)
    return np.asarray(test.pvalue)


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """The 1-Wasserstein distance of two sets of N points by optimal assignment, divided by sqrt(K).

    With the Euclidean distance and equal weights, as `scipy.stats.wasserstein_distance_nd`, whose linear programme is
    far slower. By the root, a shift of every column by s is a distance of s, whatever their number.

    Args:
        x, y: (N, K) both.
    """
    distances = cdist(x, y)
    rows, columns = linear_sum_assignment(distances)
    return float(distances[rows, columns].mean() / np.sqrt(x.shape[1]))


def wasserstein_with_chance(
    x: np.ndarray, y: np.ndarray, max_volumes: int = 300, num_resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """`wasserstein` of two cohorts of any size, with intervals.

    Sets of different size, or larger than `max_volumes`, are compared as random subsets of equal size (the mean of
    10). Between finite sets of one population the distance is not 0 and grows with the number of columns: "chance" is
    what random relabelling of all volumes as x and y gives. A resample with replacement repeats volumes, which adds to
    the distance; the bootstrap values are therefore shifted to have the estimate as their mean.

    Returns:
        {"value", "low", "high", "chance", "chance_low", "chance_high", "p"}; p is one-sided.
    """
    rng = np.random.default_rng(seed)
    size = min(len(x), len(y), max_volumes)
    draws = 1 if size == len(x) == len(y) else 10
    subsets = [[rng.choice(len(z), size, replace=False) for z in (x, y)] for _ in range(draws)]
    value = float(np.mean([wasserstein(x[i], y[j]) for i, j in subsets]))
    pooled = np.concatenate([x, y])
    boot, chance = np.empty(num_resamples), np.empty(num_resamples)
    for r in tqdm(range(num_resamples), "Wasserstein resamples", leave=False):
        boot[r] = wasserstein(x[rng.integers(len(x), size=size)], y[rng.integers(len(y), size=size)])
        order = rng.permutation(len(pooled))[: 2 * size]
        chance[r] = wasserstein(pooled[order[:size]], pooled[order[size:]])
    low, high = interval(np.maximum(boot - boot.mean() + value, 0))
    chance_low, chance_high = interval(chance)
    p = (1 + int((chance >= value * (1 - 1e-12)).sum())) / (1 + num_resamples)
    result = {"value": value, "low": low, "high": high, "chance": float(chance.mean())}
    return result | {"chance_low": chance_low, "chance_high": chance_high, "p": p}
