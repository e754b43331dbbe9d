import json

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import cohort_of
from matplotlib import image as png
from monai.metrics import FIDMetric
from scipy.ndimage import gaussian_filter

from scripts.evaluation.cohorts import Cohorts
from scripts.evaluation.extractors import PCAFeatures
from scripts.evaluation.fidelity import Fidelity, frechet_distances, prdc, resampled_row, unbiased_mmd, volume_kernel
from scripts.evaluation.pretrained import MedicalNet, SliceNetwork
from scripts.running.errors import BundleError


def frechet_by_matrix_root(x, y):
    c, d = np.cov(x.T), np.cov(y.T)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * np.real(scipy.linalg.sqrtm(c @ d)))


def test_frechet_distance_is_that_of_the_matrix_root_and_of_monai():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(0.3, 1.4, size=(25, 6)) @ rng.normal(size=(6, 6))
    found = frechet_distances(x, y)
    assert found.shape == (1,)
    np.testing.assert_allclose(found[0], frechet_by_matrix_root(x, y), rtol=1e-9)
    np.testing.assert_allclose(found[0], float(FIDMetric()(torch.tensor(y), torch.tensor(x))), rtol=1e-9)


def test_frechet_distance_of_fewer_samples_than_features():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 60)), rng.normal(0.2, 2, size=(5, 60))
    # tr (C D)^(1/2) from the eigenvalues of the small matrix with the same ones as C D, X Y^T Y X^T
    x0, y0 = (v - v.mean(0) for v in (x, y))
    eigenvalues = np.linalg.eigvals(x0 @ y0.T @ y0 @ x0.T).real.clip(0)
    root = np.sqrt(eigenvalues).sum() / np.sqrt(6 * 4)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * root
    np.testing.assert_allclose(frechet_distances(x, y)[0], want, rtol=1e-6)
    np.testing.assert_allclose(frechet_distances(x, x + 3)[0], 60 * 9, rtol=1e-9)  # a shift only
    assert frechet_distances(x, x)[0] == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_resamples_is_that_of_the_repeated_rows():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(12, 4)), rng.normal(1, 2, size=(9, 4))
    counts = np.array([[1] * 9, [3, 0, 2, 1, 0, 0, 1, 1, 1], [0, 0, 0, 9, 0, 0, 0, 0, 0]])
    want = [frechet_by_matrix_root(x, np.repeat(y, c, 0)) for c in counts[:2]]
    want.append(((x.mean(0) - y[3]) ** 2).sum() + x.var(0, ddof=1).sum())  # one volume only: no spread
    np.testing.assert_allclose(frechet_distances(x, y, counts), want, rtol=1e-7)


def test_mmd_is_the_sum_over_different_pairs():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 3)), rng.normal(1, size=(5, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    want = within_x + within_y - 2 * np.mean([kernel(a, b) for a in x for b in y])
    found = unbiased_mmd(*(volume_kernel(a[:, None], b[:, None]) for a, b in ((x, x), (x, y), (y, y))))
    np.testing.assert_allclose(found, [want], rtol=1e-12)


def test_mmd_is_zero_in_the_mean_for_one_distribution_though_images_of_a_volume_are_alike():
    rng = np.random.default_rng(4)

    def cohort():
        return np.repeat(rng.normal(size=(8, 1, 2)), 3, 1) + rng.normal(0, 0.1, (8, 3, 2))

    pairs = [(cohort(), cohort()) for _ in range(200)]
    found = np.array([unbiased_mmd(volume_kernel(x, x), volume_kernel(x, y), volume_kernel(y, y))[0] for x, y in pairs])
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(200)


def test_mmd_of_a_resample_leaves_out_a_volume_paired_with_itself():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(6, 1, 2)), rng.normal(size=(4, 1, 2))
    kernels = volume_kernel(x, x), volume_kernel(x, y), volume_kernel(y, y)
    doubled, single, nothing = unbiased_mmd(*kernels, np.array([[2, 2, 2, 2], [1, 1, 1, 1], [4, 0, 0, 0]]))
    assert doubled == pytest.approx(single) and np.isnan(nothing)


def prdc_by_definition(x, y, k):
    """The papers' formulas, one pair at a time."""

    def distance(a, b):
        return np.sqrt(sum((p - q) ** 2 for p, q in zip(a, b)))

    def radius(i, points):
        return sorted(distance(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    ball_x, ball_y = [radius(i, x) for i in range(len(x))], [radius(j, y) for j in range(len(y))]
    return {
        "precision": np.mean([any(distance(a, b) <= r for a, r in zip(x, ball_x)) for b in y]),
        "recall": np.mean([any(distance(a, b) <= r for b, r in zip(y, ball_y)) for a in x]),
        "density": sum(distance(a, b) <= r for b in y for a, r in zip(x, ball_x)) / (k * len(y)),
        "coverage": np.mean([any(distance(a, b) <= r for b in y) for a, r in zip(x, ball_x)]),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_coverage_by_definition(k):
    rng = np.random.default_rng(k)
    x, y = rng.normal(size=(17, 3)), rng.normal(0.7, 0.8, size=(11, 3))
    found = {name: float(v[0]) for name, v in prdc(x, y, k).items()}
    assert found == pytest.approx(prdc_by_definition(x, y, k))


def test_precision_recall_density_coverage_where_they_are_plain():
    line = np.arange(10.0)[:, None]
    same = {name: v[0] for name, v in prdc(line, line, 1).items()}
    # each point is in its own ball (radius 1) and in those of its neighbours: 2 * 2 + 8 * 3 = 28 memberships
    assert same == {"precision": 1, "recall": 1, "density": 2.8, "coverage": 1}
    far = {name: v[0] for name, v in prdc(line, line + 100, 3).items()}
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    copies = {name: v[0] for name, v in prdc(line, np.repeat(line[:1], 8, 0), 2).items()}
    assert (copies["precision"], copies["recall"]) == (1, 0.1)  # only the copied point is within a ball of copies
    assert copies["coverage"] == pytest.approx(0.2)  # the balls (radius 2) around 0, radius 2, and 1, radius 1


def test_a_resample_without_the_covering_volume_does_not_cover():
    x, y = np.arange(6.0)[:, None], np.array([[0.0], [100], [101], [102]])
    found = prdc(x, y, 1, np.array([[1, 1, 1, 1], [0, 2, 1, 1], [4, 0, 0, 0]]))
    np.testing.assert_allclose(found["precision"], [0.25, 0, 1])
    np.testing.assert_allclose(found["coverage"], [2 / 6, 0, 2 / 6])


def test_the_interval_surrounds_the_estimate_though_resamples_are_biased():
    found = resampled_row("m", np.array([5.0, *np.linspace(7, 9, 101)]), "lower", (0, None))
    assert (found["value"], found["low"], found["high"]) == pytest.approx((5, 4.05, 5.95))
    assert resampled_row("m", np.array([0.0, 1, 2, 3]), "lower", (0, None))["low"] == 0
    assert resampled_row("m", None, "lower", (0, None), "why")["value"] is None


def blobs(n, seed, shape=(20, 24, 20)):
    """(n, *shape) smooth, textured ellipsoids in [-1, 1], background -1."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij"))
    volumes = []
    for _ in range(n):
        axes = rng.uniform(0.75, 0.95, len(shape)).reshape(-1, *[1] * len(shape))
        texture = gaussian_filter(rng.normal(size=shape), 1.5)
        texture *= 0.3 / texture.std()
        falling = 1 - ((grid / axes) ** 2).sum(0)  # no sharp edge, whose detail would hide the noise
        grey = falling.clip(0) ** 0.5 * (1 + rng.normal(0, 0.1) + texture)
        volumes.append(np.where(falling > 0, np.clip(grey - 1, -0.99, 1), -1))
    return np.array(volumes, np.float16)


def corrupted_cohorts(shape=(20, 24, 20)):
    volumes = blobs(48, 0, shape)
    real, held_out = volumes[::2], volumes[1::2]
    rng = np.random.default_rng(1)
    noisy = np.where(held_out > -1, np.clip(held_out + rng.normal(0, 0.2, held_out.shape), -1, 1), -1)
    blurred = np.array([gaussian_filter(v.astype(np.float32), 1) for v in held_out])
    made = {
        "noisy": noisy.astype(np.float16),
        "blurred": blurred.astype(np.float16),
        "copies of 3": np.repeat(real[:3], 8, 0),
    }
    return Cohorts(cohort_of("real", real), cohort_of("held-out", held_out), [cohort_of(n, v) for n, v in made.items()])


@pytest.mark.parametrize("shape", [(20, 24, 20), (40, 44)])
def test_corrupted_copies_rank_below_held_out_volumes_on_every_row(shape, tmp_path):
    cohorts = corrupted_cohorts(shape)
    measure = Fidelity([PCAFeatures(resolution=10), MedicalNet(), SliceNetwork()], num_resamples=30)
    measure.check(cohorts)
    results = {c.name: json.loads(json.dumps(measure(c, cohorts), allow_nan=False)) for c in cohorts}
    assert results["real"]["rows"] == []
    found = {name: {r["metric"]: r for r in result["rows"]} for name, result in results.items()}
    value = {name: {m: r["value"] for m, r in rows.items()} for name, rows in found.items()}
    for name in ("noisy", "blurred"):
        for metric in ("frechet_pca", "mmd_pca"):
            assert found[name][metric]["low"] > found["held-out"][metric]["high"]
        for metric in ("precision_pca", "recall_pca", "density_pca", "coverage_pca"):
            assert value[name][metric] < 0.5 * value["held-out"][metric]
    copies = value["copies of 3"]
    assert copies["precision_pca"] == 1 and copies["recall_pca"] == pytest.approx(3 / 24)
    assert copies["frechet_pca"] > value["held-out"]["frechet_pca"]
    assert copies["coverage_pca"] < 0.75 * value["held-out"]["coverage_pca"]
    for rows in list(found.values())[1:]:
        for r in rows.values():
            if r["metric"].endswith("_pca"):
                assert r["low"] <= r["value"] <= r["high"]
            else:
                assert r["value"] is None and ("_weights" in r["note"] or "2D" in r["note"])
    assert not any("fid" in metric or "kid" in metric for metric in found["noisy"] if metric.endswith("_pca"))
    figures = measure.draw(results, cohorts, str(tmp_path))
    assert [figure["file"] for figure in figures] == ["fidelity_frechet.png", "fidelity_scatter.png"]
    for figure in figures:
        assert png.imread(tmp_path / figure["file"]).std() > 0.05


@pytest.mark.parametrize(
    "real, mine, distances, balls", [(9, 2, False, False), (2, 9, False, False), (9, 5, True, False)]
)
def test_small_cohorts_get_rows_that_say_so(real, mine, distances, balls, tmp_path):
    volumes = blobs(20, 2, (16, 16, 16))
    cohorts = Cohorts(cohort_of("real", volumes[:real]), None, [cohort_of("few", volumes[-mine:])])
    measure = Fidelity([PCAFeatures(resolution=8)], nearest_k=5, num_resamples=10)
    results = {c.name: measure(c, cohorts) for c in cohorts}
    json.dumps(results, allow_nan=False)
    rows = {r["metric"]: r for r in results["few"]["rows"]}
    assert (rows["frechet_pca"]["value"] is not None) == distances
    assert (rows["coverage_pca"]["value"] is not None) == balls
    assert f"found {real} real and {mine} in few" in rows["coverage_pca"]["note"]
    measure.draw(results, cohorts, str(tmp_path))


class Given:
    """An extractor of given features, by the first voxel of a volume."""

    title, distances, settings = "given", ("fid", "kid"), {}

    def __init__(self, name, planes=("",), images=1):
        self.name, self.plane_names, self.images, self.calls = name, planes, images, []

    def check(self, spatial_dims):
        pass

    def planes(self, spatial_dims):
        return self.plane_names

    def fit(self, real):
        self.calls.append("fit")

    def __call__(self, volumes, progress=""):
        self.calls.append(len(volumes))
        rng = np.random.default_rng(len(volumes))
        return rng.normal(size=(len(volumes), len(self.plane_names), self.images, 4)).astype(np.float32)


def test_planes_are_measured_apart_and_averaged_and_features_made_once():
    volumes = np.zeros((40, 2, 2, 2), np.float16)
    cohorts = Cohorts(
        cohort_of("real", volumes[:20]), None, [cohort_of("a", volumes[:15]), cohort_of("b", volumes[:12])]
    )
    extractor = Given("given", ("sagittal", "coronal", "axial"), 2)
    measure = Fidelity([extractor], num_resamples=5)
    results = {c.name: measure(c, cohorts) for c in cohorts}
    assert extractor.calls == ["fit", 20, 15, 12]
    rows = {r["metric"]: r["value"] for r in results["a"]["rows"]}
    x, y = (np.random.default_rng(n).normal(size=(n, 3, 2, 4)).astype(np.float32) for n in (20, 15))
    want = [frechet_by_matrix_root(x[:, p].reshape(-1, 4), y[:, p].reshape(-1, 4)) for p in range(3)]
    planes = [rows[f"fid_given_{plane}"] for plane in ("sagittal", "coronal", "axial")]
    np.testing.assert_allclose(planes, want, rtol=1e-5)
    assert rows["fid_given"] == pytest.approx(np.mean(want), rel=1e-5)
    described = [f.mean(2).reshape(len(f), 12) for f in (x, y)]
    assert rows["coverage_given"] == pytest.approx(prdc_by_definition(*described, 5)["coverage"])


@pytest.mark.parametrize(
    "knobs, word",
    [
        ({"nearest_k": 0}, "nearest_k"),
        ({"nearest_k": 2.5}, "nearest_k"),
        ({"num_resamples": 0}, "num_resamples"),
        ({"extractors": []}, "extractors"),
        ({"extractors": [Given("a"), Given("a")]}, "extractors"),
    ],
)
def test_wrong_knobs(knobs, word):
    with pytest.raises(BundleError, match=word):
        Fidelity(**({"extractors": [Given("a")]} | knobs))
