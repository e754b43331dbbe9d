import json

import numpy as np
import pytest
from conftest import cohort_of
from matplotlib import image as png
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from scripts.evaluation.appearance import Appearance, nearest_distances
from scripts.evaluation.appearance_figures import slices
from scripts.evaluation.cohorts import Cohorts
from scripts.evaluation.spectrum import mirror_correlation, outermost_shell, radial_power
from scripts.running.errors import BundleError
from scripts.running.pictures import triplanar


def balls(n, seed, shape=(16, 16, 16)):
    """A ball of noise with detail at every frequency in background -1."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
    inside = sum(g**2 for g in grid) < 0.7
    own = np.stack([gaussian_filter(rng.normal(size=shape), 0.6) for _ in range(n)])
    return np.where(inside, np.clip(own, -0.9, 1), -1).astype(np.float16)


def run(measure, cohorts):
    measure.check(cohorts)
    return {c.name: json.loads(json.dumps(measure(c, cohorts), allow_nan=False)) for c in cohorts}


def values(result):
    return {row["metric"]: row["value"] for row in result["rows"]}


@pytest.fixture(scope="module", params=[(16, 16, 16), (24, 24)], ids=["3D", "2D"])
def shown(request):
    real, held_out = balls(10, 0, request.param), balls(9, 1, request.param)
    noise = np.random.default_rng(5).normal(0, 0.1, held_out.shape)
    blurred = np.stack([gaussian_filter(v.astype(np.float32), 1) for v in held_out])
    cohorts = Cohorts(
        cohort_of("real", real),
        cohort_of("held-out", held_out),
        [
            cohort_of("noise 0.1", np.clip(held_out + noise, -1, 1)),
            cohort_of("blur/1", blurred),
            cohort_of("copies", real[3:6]),
        ],
    )
    measure = Appearance(num_shown=4, num_extremes=2, num_resamples=100)
    return measure, cohorts, run(measure, cohorts)


@pytest.mark.parametrize("shape", [(32, 32), (12, 16, 15)])
def test_the_spectrum_keeps_all_power(shape):
    volume = np.random.default_rng(0).normal(1, 2, shape)
    frequency, power, number = radial_power(volume)
    assert number.sum() == volume.size and len(frequency) == len(power) == len(number)
    assert power @ number == pytest.approx((volume**2).sum(), rel=1e-5)  # Parseval
    assert (np.diff(frequency) > 0).all() and frequency[0] == 0
    assert power[0] == pytest.approx(volume.sum() ** 2 / volume.size, rel=1e-4)


def test_white_noise_has_its_variance_at_every_frequency():
    frequency, power, number = radial_power(np.random.default_rng(0).normal(0, 3, (48, 48, 48)))
    kept = number > 200
    # The mean of n exponential variables has the relative deviation 1 / sqrt(n); of a real volume, n / 2 are distinct.
    np.testing.assert_allclose(power[kept] / 9, 1, atol=5 * np.sqrt(2 / 200))
    assert abs(np.polyfit(frequency[kept], power[kept] / 9, 1)[0]) < 0.1


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("cycles", [2, 5, 8])
def test_a_cosine_has_its_power_at_its_frequency(axis, cycles):
    side = 32
    wave = np.cos(2 * np.pi * cycles * np.arange(side) / side)
    volume = np.broadcast_to(wave.reshape([-1 if i == axis else 1 for i in range(3)]), (side,) * 3)
    frequency, power, number = radial_power(volume)
    peak = int((power * number).argmax())
    assert peak == cycles and abs(frequency[peak] - cycles / side) < 0.5 / side
    assert power[peak] * number[peak] == pytest.approx(volume.size / 2, rel=1e-5)  # mean square of a cosine is 1 / 2
    assert np.delete(power * number, peak).sum() < 1e-3


def test_the_shell_is_the_faces():
    shell = outermost_shell((4, 5, 6))
    assert shell.sum() == 4 * 5 * 6 - 2 * 3 * 4 and shell[0].all() and shell[:, :, -1].all() and not shell[1, 1, 1]
    assert outermost_shell((4, 4)).sum() == 12


def test_mirror_correlation_is_that_of_numpy():
    x = np.random.default_rng(0).normal(size=(7, 6, 5))
    assert mirror_correlation(x) == pytest.approx(np.corrcoef(x.ravel(), x[::-1].ravel())[0, 1])
    assert mirror_correlation(x + x[::-1]) == pytest.approx(1)
    assert mirror_correlation(x - x[::-1]) == pytest.approx(-1)
    assert np.isnan(mirror_correlation(np.full((4, 4), -1.0)))


@pytest.mark.parametrize("memory", [1.0, 1e-6])
def test_nearest_distances_are_those_of_scipy(memory):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, 4, 5, 3)).astype(np.float16), rng.normal(size=(6, 4, 5, 3)).astype(np.float16)
    truth = cdist(first.reshape(7, -1).astype(float), second.reshape(6, -1).astype(float)) / np.sqrt(60)
    distance, index = nearest_distances(first, second, memory)
    np.testing.assert_allclose(distance, truth.min(1), rtol=1e-5)
    np.testing.assert_array_equal(index, truth.argmin(1))
    own = cdist(*[first.reshape(7, -1).astype(float)] * 2) / np.sqrt(60)
    np.fill_diagonal(own, np.inf)
    distance, index = nearest_distances(first, None, memory)
    np.testing.assert_allclose(distance, own.min(1), rtol=1e-5)
    np.testing.assert_array_equal(index, own.argmin(1))


def test_slices_are_those_of_the_strip():
    volume = np.random.default_rng(0).normal(size=(6, 6, 6))
    np.testing.assert_array_equal(np.concatenate(slices(volume), 1), triplanar(volume))
    odd = slices(np.random.default_rng(0).normal(size=(4, 6, 8)))
    assert [image.shape for image in odd] == [(8, 8)] * 3
    assert len(slices(volume[0])) == 1


def test_blur_and_noise_are_told_apart_by_sign(shown):
    found = {name: values(result) for name, result in shown[2].items()}
    assert found["real"]["spectrum_high_frequency"] == 0
    assert found["blur/1"]["spectrum_high_frequency"] < -0.5 < abs(found["held-out"]["spectrum_high_frequency"])
    assert found["noise 0.1"]["spectrum_high_frequency"] > found["held-out"]["spectrum_high_frequency"] + 0.005
    for name in ("blur/1", "noise 0.1"):
        assert found[name]["spectrum_log_ratio"] > found["held-out"]["spectrum_log_ratio"]
        assert found[name]["intensity_wasserstein"] > 3 * found["held-out"]["intensity_wasserstein"]


def test_background_and_foreground(shown):
    found = {name: values(result) for name, result in shown[2].items()}
    volumes = shown[1].real.volumes
    assert found["real"]["background_level"] == -1
    assert found["real"]["foreground_fraction"] == pytest.approx((volumes > -1 + 1 / 255).mean())
    # Noise of 0.1 cut off at -1 has the mean 0.1 / sqrt(2 pi).
    assert found["noise 0.1"]["background_level"] == pytest.approx(-1 + 0.1 / np.sqrt(2 * np.pi), abs=0.003)


def test_the_intensity_distance_is_that_of_the_voxels(shown):
    measure, cohorts, results = shown
    real, other = cohorts.real.volumes.astype(float), cohorts.held_out.volumes.astype(float)
    # Every volume has the same number of foreground voxels here, so pooling them weighs the volumes alike.
    truth = wasserstein_distance(real[real > -1], other[other > -1])
    assert values(results["held-out"])["intensity_wasserstein"] == pytest.approx(truth, abs=2 / measure.num_bins)


def test_copies_have_distance_zero(shown):
    data = shown[2]["copies"]["data"]
    np.testing.assert_allclose(data["distance"], 0, atol=1e-3)
    assert data["nearest"] == [3, 4, 5]
    assert values(shown[2]["real"])["nearest_real_rms"] > 0.05


def test_intervals_hold_the_values(shown):
    for result in shown[2].values():
        for row in result["rows"]:
            if row["low"] is not None:
                assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9, row


def test_figures(shown, tmp_path):
    measure, cohorts, results = shown
    entries = measure.draw(results, cohorts, str(tmp_path))
    files = [entry["file"] for entry in entries]
    assert sorted(files) == sorted(p.name for p in tmp_path.iterdir()) and len(files) == 5 + len(cohorts.synthetic)
    for entry in entries:
        picture = png.imread(tmp_path / entry["file"])
        assert 500 < picture.shape[1] < 1100 and picture.shape[0] > 150 and picture[..., :3].std() > 0.02
        assert entry["title"] and entry["caption"]


def test_empty_volumes_are_said_and_nothing_breaks(tmp_path):
    cohorts = Cohorts(cohort_of("real", balls(4, 0)), None, [cohort_of("empty", np.full((3, 16, 16, 16), -1.0))])
    measure = Appearance(num_resamples=20)
    results = run(measure, cohorts)
    found = values(results["empty"])
    assert found["intensity_wasserstein"] is None and found["left_right_symmetry"] is None
    assert found["foreground_fraction"] == 0 and "3 volumes are empty" in results["empty"]["notes"][0]
    assert len(measure.draw(results, cohorts, str(tmp_path))) == 6


def test_knobs_and_shapes_are_checked_at_once():
    for key, value in {"num_shown": 0, "num_extremes": 1.5, "num_bins": 1, "seed": -1, "memory": 0}.items():
        with pytest.raises(BundleError, match=key):
            Appearance(**{key: value})
    cohorts = Cohorts(cohort_of("real", balls(3, 0)), None, [cohort_of("small", np.zeros((2, 8, 8, 8)))])
    with pytest.raises(BundleError, match="small"):
        Appearance().check(cohorts)
    settings = Appearance().settings
    assert json.loads(json.dumps(settings)) == settings != Appearance(num_bins=50).settings
