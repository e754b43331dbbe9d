import functools
import json
import math

import numpy as np
import pytest
from conftest import cohort_of
from matplotlib import image as png
from scipy.ndimage import gaussian_filter
from scipy.stats import hypergeom

from scripts.evaluation.cohorts import Cohorts
from scripts.evaluation.memorisation import Memorisation
from scripts.evaluation.memorisation_figures import most_similar
from scripts.evaluation.nearness import correlations, excess_over_chance, label_permutation_p, relative_distance
from scripts.running.errors import BundleError


def brains(n, seed, shape=(16, 16, 16)):
    """A common ball with smooth structure of each volume's own, asymmetric, background -1."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
    ball = sum(g**2 for g in grid) < 0.8
    own = np.stack([gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(n)])
    own /= own.std(axis=tuple(range(1, own.ndim)), keepdims=True)
    return np.where(ball, np.clip(0.3 * own, -0.9, 1), -1).astype(np.float16)


def likeness(first, second, pairs):
    """1 for equal volumes, less by the root mean square difference."""
    return np.array([1 - np.sqrt(np.mean((first[i].astype(float) - second[j].astype(float)) ** 2)) for i, j in pairs])


def run(measure, cohorts):
    measure.check(cohorts)
    return {c.name: json.loads(json.dumps(measure(c, cohorts), allow_nan=False)) for c in cohorts}


def values(result):
    return {row["metric"]: row["value"] for row in result["rows"]}


@pytest.fixture(scope="module")
def shown():
    """Copies, mirror images, noisy and blurred copies, and volumes that are new, judged once."""
    real, rng = brains(14, 0), np.random.default_rng(9)
    blurred = np.stack([gaussian_filter(v.astype(np.float32), 0.5) for v in real])
    fresh = brains(14, 2)
    smooth = np.repeat(real.astype(np.float32).mean(0)[None], 3, 0) + rng.normal(0, 0.01, (3, *real.shape[1:]))
    cohorts = Cohorts(
        cohort_of("real", real),
        cohort_of("held-out", brains(12, 1)),
        [
            cohort_of("copies", real),
            cohort_of("flipped", real[:, ::-1]),
            cohort_of("noisy", real + rng.normal(0, 0.05, real.shape)),
            cohort_of("blurred", blurred),
            cohort_of("fresh", fresh),
            cohort_of("smooth", smooth),
        ],
    )
    measure = Memorisation(likeness, num_worst=3, num_resamples=200)
    return measure, cohorts, run(measure, cohorts)


@pytest.mark.parametrize("memory", [1.0, 1e-6])
@pytest.mark.parametrize("shape", [(9, 10), (6, 5, 7)])
def test_correlations_are_those_of_numpy_and_mirror_images_count(shape, memory):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, *shape)).astype(np.float32), rng.normal(size=(4, *shape)).astype(np.float32)
    second[2] = 3 * np.flip(first[1], 0) + 5
    found, flipped = correlations(first, second, memory=memory)
    plain = np.corrcoef(first.reshape(5, -1), second.reshape(4, -1))[:5, 5:]
    mirrored = np.corrcoef(np.flip(first, 1).reshape(5, -1), second.reshape(4, -1))[:5, 5:]
    np.testing.assert_allclose(found, np.maximum(plain, mirrored), atol=1e-5)
    np.testing.assert_array_equal(flipped, mirrored > plain)
    assert found[1, 2] == pytest.approx(1) and flipped[1, 2]


def test_a_constant_volume_correlates_with_nothing_and_a_symmetric_one_is_not_mirrored():
    rng = np.random.default_rng(0)
    first = np.full((3, 6, 6, 6), 0.1, np.float32)
    first[1] = rng.normal(size=(6, 6, 6))
    first[2] = first[1] + first[1][::-1]
    found, flipped = correlations(first, first)
    np.testing.assert_array_equal(found[0], 0)
    assert found[2, 2] == pytest.approx(1) and not flipped[2, 2]


def test_volumes_of_different_shape_are_refused():
    with pytest.raises(BundleError, match="4, 4"):
        correlations(np.zeros((2, 4, 4)), np.zeros((2, 5, 4)))


def test_relative_distance_by_hand():
    found = relative_distance(np.array([[0.5, 0.9, 0.7, -np.inf], [1, 0.2, 0.2, 0.2], [0.4] + 3 * [-np.inf]]), 2)
    np.testing.assert_allclose(found, [0.1 / 0.4, 0, np.nan])  # (1 - 0.9) / mean(1 - 0.7, 1 - 0.5)


def test_excess_is_zero_by_chance_and_one_if_all_are_nearer():
    assert excess_over_chance(60 / 69, 60, 9) == pytest.approx(0)
    assert excess_over_chance(1.0, 60, 9) == pytest.approx(1)
    # The closed form that it rests on: the nearest of 69 exchangeable volumes is one of 60 with probability 60 / 69.
    rng = np.random.default_rng(0)
    nearer = rng.random((20000, 60)).max(1) > rng.random((20000, 9)).max(1)
    assert excess_over_chance(nearer.mean(), 60, 9) == pytest.approx(0, abs=0.06)


def test_the_p_value_is_the_hypergeometric_one():
    # 6 synthetic volumes, each with another nearest real volume, all of them training: P = C(14, 6) / C(20, 6).
    nearest = np.array([0, 2, 4, 6, 8, 10])
    exact = hypergeom(20, 14, 6).sf(5)
    assert exact == pytest.approx(math.comb(14, 6) / math.comb(20, 6))
    assert label_permutation_p(nearest, 14, 6, 20000, 0) == pytest.approx(exact, abs=0.006)
    assert label_permutation_p(np.array([14, 15, 16]), 14, 6, 200, 0) == 1  # all nearer to held-out ones


@pytest.mark.parametrize("name", ["copies", "flipped", "noisy", "blurred"])
def test_copies_are_flagged(shown, name):
    found = values(shown[2][name])
    for metric in ("flagged", "flagged_correlation", "flagged_relative", "nearer_to_training"):
        assert found[metric] == 1, metric
    assert found["nearer_to_training_excess_correlation"] == pytest.approx(1)
    assert found["nearer_than_held_out_to_each_other"] == found["nearer_than_held_out_to_training"] == 1
    assert found["nearer_to_training_p"] == pytest.approx(1 / 201)
    assert found["exact_copies"] == (name in ("copies", "flipped"))


def test_mirror_images_are_found_and_said(shown):
    _, cohorts, results = shown
    assert all(results["flipped"]["data"]["training"]["flipped"])
    assert not any(results["copies"]["data"]["training"]["flipped"])
    for name in ("copies", "flipped"):
        assert results[name]["data"]["training"]["index"] == list(range(len(cohorts.real)))
        assert values(results[name])["nearest_training_ms_ssim"] == pytest.approx(1)


def test_new_volumes_are_not_flagged(shown):
    found = values(shown[2]["fresh"])
    assert found["flagged"] <= 1 / 14 and found["exact_copies"] == 0
    assert 14 / 26 - 0.3 < found["nearer_to_training"] < 14 / 26 + 0.3
    assert found["nearer_to_training_p"] > 0.05


def test_a_mean_image_is_alike_to_all_and_not_flagged(shown):
    found = values(shown[2]["smooth"])
    assert found["flagged_correlation"] == 1
    assert found["flagged_relative"] == found["flagged"] == 0


def test_yardsticks_leave_the_volume_itself_out(shown):
    _, cohorts, results = shown
    flat = cohorts.real.volumes.astype(float)
    both = np.corrcoef(np.concatenate([flat, flat[:, ::-1]]).reshape(28, -1))
    pairs = np.maximum(both[:14, :14], both[14:, :14])
    np.fill_diagonal(pairs, -1)
    np.testing.assert_allclose(results["real"]["data"]["training"]["correlation"], pairs.max(1), atol=1e-4)
    assert "flagged" not in values(results["real"]) and "flagged" in values(results["held-out"])
    note = next(row["note"] for row in results["real"]["rows"] if row["metric"] == "nearer_to_training")
    assert note.startswith("0.520 by chance")  # 13 others and 12


def test_intervals_hold_the_values(shown):
    for result in shown[2].values():
        for row in result["rows"]:
            if row["low"] is not None:
                assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9, row


def test_the_same_folder_given_twice_is_said(shown):
    assert any("given twice" in note for note in shown[2]["copies"]["notes"])
    assert not any("copy" in note or "copies" in note for note in shown[2]["fresh"]["notes"])


def test_the_same_scan_twice_is_named_and_no_yardstick():
    real = brains(8, 0)
    real[5] = real[2]
    held_out = brains(5, 1)
    held_out[4] = real[0][::-1]
    cohorts = Cohorts(cohort_of("real", real), cohort_of("held-out", held_out), [cohort_of("new", brains(6, 2))])
    results = run(Memorisation(None), cohorts)
    assert "real_02.nii.gz and real_05.nii.gz" in results["real"]["notes"][0]
    assert "held-out_04.nii.gz and real_00.nii.gz" in results["held-out"]["notes"][0]
    assert len(results["real"]["notes"]) == len(results["held-out"]["notes"]) == 1
    assert results["new"]["data"]["largest"]["correlation"] < 0.99


def test_without_held_out_volumes_rows_say_so():
    real = brains(8, 0)
    cohorts = Cohorts(cohort_of("real", real), None, [cohort_of("copies", real[:4])])
    results = run(Memorisation(likeness), cohorts)
    rows = {row["metric"]: row for row in results["copies"]["rows"]}
    for metric in ("nearest_held_out_correlation", "nearer_to_training", "nearer_than_held_out_to_training"):
        assert rows[metric]["value"] is None and "held_out_dir" in rows[metric]["note"]
    assert rows["nearest_training_correlation"]["value"] == pytest.approx(1, abs=1e-5) and rows["flagged"]["value"] == 1
    assert any("held_out_dir" in note for note in results["copies"]["notes"])


def test_two_dimensional_cohorts(tmp_path):
    real = brains(10, 0, (24, 24))
    cohorts = Cohorts(
        cohort_of("real", real), cohort_of("held-out", brains(9, 1, (24, 24))), [cohort_of("copies", real[:5])]
    )
    measure = Memorisation(likeness)
    results = run(measure, cohorts)
    assert values(results["copies"])["flagged"] == 1
    assert len(measure.draw(results, cohorts, str(tmp_path))) == 3


def test_the_most_similar_come_first_and_missing_ones_never():
    assert most_similar([0.1, np.nan, 0.9, 0.5, -np.inf], 2) == [2, 3]
    assert most_similar([np.nan, 0.2], 5) == [1]


def test_figures_and_tables(shown, tmp_path):
    measure, cohorts, results = shown
    entries = measure.draw(results, cohorts, str(tmp_path / "figures"))
    files = [entry["file"] for entry in entries if "file" in entry]
    assert len(files) == len(set(files)) == 1 + len(cohorts.synthetic)
    for file in files:
        picture = png.imread(tmp_path / "figures" / file)
        assert 500 < picture.shape[1] < 1100 and picture.shape[0] > 150 and picture[..., :3].std() > 0.02
    table = next(e["table"] for e in entries if "table" in e and e["title"].startswith("noisy"))
    correlation = results["noisy"]["data"]["training"]["correlation"]
    expected = sorted(range(14), key=lambda i: -correlation[i])[:3]
    assert [row[1] for row in table["rows"]] == [f"noisy_{i:02d}.nii.gz" for i in expected]
    assert [row[2] for row in table["rows"]] == [f"real_{i:02d}.nii.gz" for i in expected]
    assert len(table["columns"]) == len(table["rows"][0])


def test_knobs_are_checked_at_once():
    for key, value in {"candidates": 0, "duplicate": 1.5, "neighbours": 2.5, "seed": -1, "memory": 0}.items():
        with pytest.raises(BundleError, match=key):
            Memorisation(None, **{key: value})
    with pytest.raises(BundleError, match="similarity"):
        Memorisation("ms_ssim")
    cohorts = Cohorts(cohort_of("real", brains(3, 0)), None, [cohort_of("small", np.zeros((2, 8, 8, 8)))])
    with pytest.raises(BundleError, match="small"):
        Memorisation(None).check(cohorts)


def test_settings_name_the_similarity_without_how_it_is_computed():
    first = Memorisation(functools.partial(likeness, protocol="a", device="cpu")).settings
    assert json.loads(json.dumps(first)) == first
    assert first == Memorisation(functools.partial(likeness, protocol="a", batch_size=3)).settings
    assert first != Memorisation(functools.partial(likeness, protocol="b")).settings
    assert first != Memorisation(functools.partial(likeness, protocol="a"), candidates=2).settings
