import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from scripts.evaluation.tissue import TISSUES, classify, tissue_map


def three_classes(shape: tuple[int, ...], fractions: list[float], noise: float, seed: int = 0) -> tuple:
    """A ball of three tissues on a background of exactly -1 -> volume, true classes (1 to 3, 0 outside)."""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(sum((g - (n - 1) / 2) ** 2 for g, n in zip(np.indices(shape), shape)))
    brain = radius < 0.45 * min(shape)
    pattern = gaussian_filter(rng.standard_normal(shape), 1.5)
    edges = np.quantile(pattern[brain], np.cumsum(fractions)[:2])
    classes = np.where(brain, 1 + np.digitize(pattern, edges), 0)
    means = np.array([-1, -0.6, 0.0, 0.55])
    volume = np.where(brain, np.clip(means[classes] + noise * rng.standard_normal(shape), -0.99, 1), -1)
    return volume.astype(np.float16), classes


@pytest.mark.parametrize("fractions", [[0.15, 0.47, 0.38], [0.3, 0.35, 0.35], [0.1, 0.6, 0.3]])
@pytest.mark.parametrize("shape, noise", [((40, 44, 40), 0.05), ((40, 44, 40), 0.15), ((180, 160), 0.12)])
def test_known_fractions_are_recovered_within_two_percent(shape, noise, fractions):
    volume, classes = three_classes(shape, fractions, noise)
    truth = np.bincount(classes[classes > 0], minlength=4)[1:] / (classes > 0).sum()
    found = classify(volume)
    np.testing.assert_allclose(found.fractions, truth, atol=0.02)
    assert found.fractions.sum() == pytest.approx(1) and len(TISSUES) == 3
    assert found.num_voxels == pytest.approx((classes > 0).sum(), rel=0.02)
    if noise == 0.05:
        assert (tissue_map(volume, found) == classes).mean() > 0.99


def test_the_quantiles_stand_for_all_voxels():
    volume, _ = three_classes((50, 50, 50), [0.2, 0.45, 0.35], 0.2)
    found = classify(volume)
    brain = volume[volume > -0.9].astype(float)
    assert len(brain) > 10_000
    np.testing.assert_allclose(found.posterior(brain).mean(0), found.fractions, atol=1e-3)


def test_the_result_does_not_hang_on_the_seed_of_k_means_nor_on_the_smeared_rim():
    volume, classes = three_classes((40, 40, 40), [0.2, 0.45, 0.35], 0.15)
    first = classify(volume)
    np.testing.assert_allclose(first.fractions, classify(volume, seed=7).fractions, atol=2e-3)
    rim = (gaussian_filter((classes > 0).astype(float), 1) > 0.05) & (classes == 0)
    smeared = np.where(rim, -0.97, volume)
    np.testing.assert_allclose(first.fractions, classify(smeared).fractions, atol=1e-6)
    assert (tissue_map(smeared, first)[rim] == 0).all()


@pytest.mark.parametrize(
    "volume",
    [
        np.full((16, 16, 16), -1.0),
        np.zeros((16, 16, 16)),
        np.indices((16, 16, 16)).sum(0) % 2 * 1.0,
        np.full((16, 16, 16), np.nan),
        np.full((16, 16, 16), np.inf),
        np.pad(np.linspace(0, 1, 27).reshape(3, 3, 3), 5, constant_values=-1),
    ],
    ids=["empty", "constant", "two values", "nan", "inf", "27 voxels"],
)
def test_what_cannot_be_classified_gives_none(volume):
    assert classify(volume) is None


@pytest.mark.parametrize("spoil", [lambda v: gaussian_filter(v, 2), lambda v: np.clip(v + noise_like(v), -1, 1)])
def test_blurred_and_noisy_volumes_are_still_classified(spoil):
    volume, _ = three_classes((32, 32, 32), [0.2, 0.45, 0.35], 0.1)
    found = classify(spoil(volume.astype(np.float32)))
    assert found is not None and (found.fractions > 0.02).all()
    assert (np.diff(found.mixture.means_[found.order, 0]) > 0).all()


def noise_like(volume: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.5, volume.shape) * (volume > -1)
