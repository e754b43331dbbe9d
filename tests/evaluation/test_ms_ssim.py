import json

import numpy as np
import pytest
import torch
from conftest import cohort_of
from monai.metrics import MultiScaleSSIMMetric
from scipy.ndimage import gaussian_filter

from scripts.evaluation import diversity, ms_ssim
from scripts.evaluation.cohorts import Cohorts
from scripts.evaluation.diversity import Diversity, resampled_means
from scripts.evaluation.ms_ssim import ms_ssim_pairs, protocol_for, random_pairs
from scripts.running.errors import BundleError

W = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])


def volumes(n: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A round head with smooth blobs of its own on an exact background of -1: alike but not the same."""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(sum(x**2 for x in np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")))
    blobs = np.stack([gaussian_filter(rng.standard_normal(shape), 1.5) for _ in range(n)])
    out = np.tanh(0.8 - radius + 0.3 * blobs / blobs.std())
    out[out < -0.2] = -1
    return out.astype(np.float32)


def halved(x: np.ndarray) -> np.ndarray:
    for axis in range(x.ndim):
        x = np.take(x, range(x.shape[axis] // 2 * 2), axis)
        x = (np.take(x, range(0, x.shape[axis], 2), axis) + np.take(x, range(1, x.shape[axis], 2), axis)) / 2
    return x


def by_definition(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(kwon2019, wang2003), straight from the formulas in float64 with SciPy's filter; nan for negative means."""
    x, y = x.astype(float), y.astype(float)
    cs, ssim = [], []
    for _ in range(5):
        mx, my = gaussian_filter(x, 1.5), gaussian_filter(y, 1.5)
        vx, vy = gaussian_filter(x * x, 1.5) - mx**2, gaussian_filter(y * y, 1.5) - my**2
        cov = gaussian_filter(x * y, 1.5) - mx * my
        contrast = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
        cs.append(contrast.mean())
        ssim.append(((2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2) * contrast).mean())
        x, y = halved(x), halved(y)
    with np.errstate(invalid="ignore"):
        kwon = np.prod([cs[i] ** W[i] * ssim[4] ** W[4] for i in range(4)])
        wang = np.prod([cs[i] ** W[i] for i in range(4)]) * ssim[4] ** W[4]
    return float(kwon), float(wang)


@pytest.mark.parametrize("shape", [(32, 32, 32), (33, 40, 19), (16, 16, 16), (64, 64), (37, 100)])
def test_kwon2019_and_wang2003_are_what_scipy_gives_from_the_definition(shape):
    v = volumes(4, shape)
    pairs = random_pairs(4, 99)
    truth = np.array([by_definition(v[i], v[j]) for i, j in pairs])
    assert np.isfinite(truth).sum() >= 6 and 0.1 < np.nanmean(truth) < 0.98
    truth = np.nan_to_num(truth, nan=0)  # a negative mean, which a last scale of few voxels may have, counts as 0
    for batch_size in (1, 4):
        found = [ms_ssim_pairs(v, None, pairs, p, batch_size=batch_size) for p in ("kwon2019", "wang2003")]
        np.testing.assert_allclose(np.stack(found, 1), truth, atol=1e-5)


@pytest.mark.parametrize(
    "shape, kernel, scales",
    [((64, 64, 64), 3, 5), ((48, 50, 61), 3, 5), ((32, 32, 32), 3, 4), ((24, 17, 30), 3, 3), ((9, 11, 8), 3, 2)]
    + [((200, 180), 11, 5), ((128, 128), 7, 5), ((40, 37), 3, 4), ((6, 6), 3, 2)],
)
def test_monai_is_the_metric_of_monai_with_the_kernel_that_fits(shape, kernel, scales):
    v = volumes(3, shape)
    pairs = random_pairs(3, 99)
    weights = W[:scales] / W[:scales].sum() if scales < 5 else W
    metric = MultiScaleSSIMMetric(len(shape), data_range=2, kernel_size=kernel, weights=weights.tolist())
    x = torch.as_tensor(v)[:, None]
    truth = metric(x[pairs[:, 0]], x[pairs[:, 1]])[:, 0].numpy()
    assert 0.01 < truth.mean() < 0.99
    np.testing.assert_allclose(ms_ssim_pairs(v, None, pairs, "monai"), truth, atol=1e-5)
    protocol = protocol_for("monai", shape)
    assert f"kernel {kernel}, " in protocol.note and f"{scales} scales" in protocol.note
    assert f"{weights[0]:.4f}" in protocol.note


@pytest.mark.parametrize("shape", [(64, 64, 64), (128, 128, 128), (160, 160, 160), (192, 192), (32, 32, 32), (31, 50)])
def test_no_larger_kernel_and_no_more_scales_would_be_accepted_by_monai(shape):
    window = protocol_for("monai", shape).window
    image = torch.zeros(1, 1, *shape[:1], *shape[1:])

    def accepted(kernel: int, scales: int) -> bool:
        # MONAI checks the sides before it computes anything; a stand-in stops it there.
        class Passed(Exception):
            pass

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("monai.metrics.regression.compute_ssim_and_cs", lambda **_: (_ for _ in ()).throw(Passed))
            try:
                MultiScaleSSIMMetric(len(shape), 2, kernel_size=kernel, weights=W[:scales].tolist())(image, image)
            except Passed:
                return True
            except ValueError:
                return False
        raise AssertionError("the stand-in was not reached")

    assert accepted(window.kernel_size, window.num_scales)
    assert window.kernel_size == 11 or not accepted(window.kernel_size + 2, window.num_scales)
    assert window.num_scales == 5 or not accepted(3, window.num_scales + 1)


@pytest.mark.parametrize("protocol", ms_ssim.PROTOCOLS)
def test_a_volume_is_one_with_itself_and_pairs_are_symmetric(protocol):
    v = volumes(3, (32, 32, 32)).astype(np.float16)
    same = ms_ssim_pairs(v, None, np.array([[0, 0], [2, 2]]), protocol)
    np.testing.assert_allclose(same, 1, atol=1e-6)
    there, back = (ms_ssim_pairs(v, None, np.array([pair]), protocol) for pair in ([0, 1], [1, 0]))
    assert there == pytest.approx(back, abs=1e-7) and there < 0.99


@pytest.mark.parametrize("protocol", ms_ssim.PROTOCOLS)
def test_opposite_volumes_count_as_zero_not_nan(protocol):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (64, 64)).astype(np.float32)
    pair = np.array([[0, 1]])
    assert np.isnan(by_definition(x, -x)).all()  # what the definition gives without a choice
    assert ms_ssim_pairs(np.stack([x, -x]), None, pair, protocol).tolist() == [0.0]


def test_two_arrays_are_compared_across():
    v = volumes(6, (16, 20, 18))
    pairs = np.array([[0, 3], [3, 0], [2, 1], [0, 0]])
    across = ms_ssim_pairs(v[:4], v[2:], pairs)
    np.testing.assert_allclose(across, ms_ssim_pairs(v, None, pairs + [0, 2]), atol=1e-7)


@pytest.mark.parametrize("capacity", [2, 3, 5, 8])
def test_little_memory_gives_the_same_values(capacity):
    v = volumes(12, (16, 16, 16))
    pairs = random_pairs(12, 40)[np.random.default_rng(0).permutation(40)]
    voxels = 16**3 + 8**3 + 4**3 + 2**3 + 1
    found = ms_ssim_pairs(v, None, pairs, memory=(capacity + 0.5) * 24 * voxels / 2**30, batch_size=7)
    np.testing.assert_allclose(found, ms_ssim_pairs(v, None, pairs), atol=1e-6)


@pytest.mark.parametrize("capacity", [2, 3, 5, 8])
def test_a_group_of_pairs_has_no_more_volumes_than_there_is_memory_for(capacity):
    pairs = random_pairs(12, 40)[np.random.default_rng(0).permutation(40)]
    groups = list(ms_ssim.pairs_in_blocks(pairs, capacity))
    assert max(len(kept) for _, kept in groups) <= capacity and len(groups) > 1
    assert all(set(pairs[rows].ravel().tolist()) <= kept for rows, kept in groups)
    assert sorted(np.concatenate([rows for rows, _ in groups])) == list(range(40))


class Counted(np.ndarray):
    """Volumes that count how often one of them is taken."""

    taken = 0

    def __getitem__(self, key):
        Counted.taken += isinstance(key, int)
        return super().__getitem__(key)


def test_each_volume_is_read_once_where_memory_allows():
    Counted.taken = 0
    ms_ssim_pairs(volumes(6, (16, 16)).view(Counted), None, random_pairs(6, 99))
    assert Counted.taken == 6


def test_the_precision_chosen_elsewhere_does_not_matter_and_is_left():
    v = volumes(2, (16, 16, 16))
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = ms_ssim_pairs(v, None, np.array([[0, 1]]))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(previous)
    assert found[0] == pytest.approx(by_definition(*v)[0], abs=1e-5)


@pytest.mark.parametrize("n, num_pairs", [(2, 1), (5, 10), (5, 1000), (50, 100), (1000, 1000), (100_000, 500)])
def test_random_pairs_are_distinct_unordered_and_seeded(n, num_pairs):
    pairs = random_pairs(n, num_pairs, seed=3)
    assert pairs.shape == (min(num_pairs, n * (n - 1) // 2), 2)
    assert (0 <= pairs[:, 0]).all() and (pairs[:, 0] < pairs[:, 1]).all() and (pairs[:, 1] < n).all()
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    np.testing.assert_array_equal(pairs, random_pairs(n, num_pairs, seed=3))
    if len(pairs) == num_pairs > 50:
        assert (pairs != random_pairs(n, num_pairs, seed=4)).any()


def test_every_pair_is_drawn_equally_often():
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[tuple(random_pairs(6, 5, seed).T)] += 1
    drawn = counts[np.triu_indices(6, 1)]  # 1000 expected, standard deviation 26
    assert drawn.sum() == 15000 and abs(drawn - 1000).max() < 120


def test_a_resample_weighs_a_pair_by_both_its_volumes():
    pairs = np.array([[0, 1], [0, 2], [1, 2]])
    counts = np.array([[1, 1, 1], [2, 1, 0], [2, 0, 1], [1, 2, 0], [3, 0, 0], [2, 2, 1]])
    values = np.array([0.1, 0.5, 0.9])
    expected = []
    for count in counts:  # write each resample out, and take all its pairs of different volumes
        drawn = np.repeat(np.arange(3), count)
        table = {(0, 1): 0.1, (0, 2): 0.5, (1, 2): 0.9}
        met = [table[a, b] for k, a in enumerate(drawn) for b in drawn[k + 1 :] if a != b]
        expected.append(np.mean(met) if met else np.nan)
    np.testing.assert_allclose(resampled_means(values, pairs, counts), expected)


@pytest.mark.parametrize("shape", [(16, 18, 16), (48, 40)])
def test_rows_data_and_figure(tmp_path, shape):
    real, held = cohort_of("real", volumes(8, shape)), cohort_of("held-out", volumes(5, shape))
    copies = cohort_of("copies", np.repeat(real.volumes[:2], 4, 0) + 0.01 * volumes(8, shape, 1))
    cohorts = Cohorts(real, held, [copies, cohort_of("all the same", np.repeat(real.volumes[:1], 4, 0))])
    measure = Diversity(num_pairs=12, device="cpu")
    measure.check(cohorts)
    json.dumps(measure.settings)
    results = {c.name: json.loads(json.dumps(measure(c, cohorts))) for c in cohorts}
    pairs = random_pairs(8, 12, 0)
    truth = np.nan_to_num([by_definition(*real.volumes[pair]) for pair in pairs], nan=0)
    rows = results["real"]["rows"]
    assert [row["metric"] for row in rows] == ["ms_ssim_kwon2019", "ms_ssim_wang2003", "ms_ssim_monai"]
    for row, values in zip(rows, truth.T):
        assert row["value"] == pytest.approx(values.mean(), abs=1e-5) and row["better"] == "real"
        assert row["low"] < row["value"] < row["high"]
        assert f"12 pairs of 8 volumes {values.std():.4f}" in row["note"]
    assert "kernel 3" in rows[2]["note"]
    assert results["copies"]["rows"][0]["value"] > rows[0]["value"] + 0.05
    assert results["all the same"]["rows"][1]["value"] == pytest.approx(1, abs=1e-6)
    assert "6 pairs above 0.99" in results["all the same"]["rows"][1]["note"] and "above" not in rows[0]["note"]
    (entry,) = measure.draw(results, cohorts, str(tmp_path))
    assert (tmp_path / entry["file"]).stat().st_size > 10_000 and entry["title"] and entry["caption"]


def test_protocols_with_one_window_are_computed_once(monkeypatch):
    calls = []
    original = ms_ssim.scale_terms
    monkeypatch.setattr(diversity, "scale_terms", lambda *a, **k: (calls.append(a[3]), original(*a, **k))[1])
    real = cohort_of("real", volumes(3, (16, 16)))
    assert len(Diversity(device="cpu")(real, Cohorts(real, None, []))["rows"]) == 3
    assert calls == ["kwon2019", "monai"]


def test_opposite_pairs_are_said_in_a_note():
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (32, 32)).astype(np.float32)
    real = cohort_of("real", np.stack([x, -x, x]))
    result = Diversity(["kwon2019"], device="cpu")(real, Cohorts(real, None, []))
    assert result["rows"][0]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert "2 of 3 pairs of real" in result["notes"][0]


@pytest.mark.parametrize(
    "knobs, said",
    [
        ({"protocols": ["kwon"]}, "protocols: .*'kwon2019'"),
        ({"protocols": "monai"}, "must be a list"),
        ({"protocols": []}, "must be a list"),
        ({"num_pairs": 0}, "num_pairs: 0"),
        ({"batch_size": 1.5}, "batch_size: 1.5"),
        ({"memory": 0}, "memory: 0"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_wrong_knobs_are_refused_at_once(knobs, said):
    with pytest.raises(BundleError, match=said):
        Diversity(**knobs)


def test_wrong_volumes_are_refused_before_the_work():
    small, one = cohort_of("real", np.zeros((3, 15, 16, 16))), cohort_of("ours", np.zeros((1, 32, 32, 32)))
    with pytest.raises(BundleError, match=r"\(15, 16, 16\).* 16 voxels or more"):
        Diversity().check(Cohorts(small, None, []))
    Diversity(["monai"]).check(Cohorts(small, None, []))
    with pytest.raises(BundleError, match="ours: 1 volume"):
        Diversity().check(Cohorts(cohort_of("real", np.zeros((2, 32, 32, 32))), None, [one]))
    with pytest.raises(BundleError, match=r"\(5, 9\).* 6 voxels or more"):
        protocol_for("monai", (5, 9))
    with pytest.raises(BundleError, match="one shape"):
        ms_ssim_pairs(np.zeros((2, 16, 16)), np.zeros((2, 16, 17)), np.array([[0, 1]]))
    with pytest.raises(BundleError, match="there are 2 and 2 volumes"):
        ms_ssim_pairs(np.zeros((2, 16, 16)), None, np.array([[0, 2]]))
