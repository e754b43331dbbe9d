"""Slopes, intervals and adherence against scipy and closed forms; the shipped command is in tests/workflows."""

import csv

import numpy as np
import pytest
from conftest import cohort_of
from scipy.stats import linregress

from scripts.evaluation.cohorts import Cohorts
from scripts.evaluation.conditions import Conditions, explained, predicted, slope
from scripts.evaluation.tissue import inner_dark
from scripts.running.errors import BundleError

N = 40
RNG = np.random.default_rng(0)
AGES = RNG.uniform(20, 80, N)
SEXES = np.where(np.arange(N) % 2, "m", "f")


class Quantities:
    """In place of `Anatomy`: what is measured is known."""

    settings = {"label_names": {}}

    def __init__(self, **tables):
        self.tables = tables

    def quantities(self, cohort):
        return self.tables[cohort.name]


def write(path, columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if str(path).endswith(".tsv") else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def cohorts_in(folder, count=N, ages=AGES, sexes=SEXES):
    """A real cohort with its participants.tsv, and a synthetic one of which samples.csv says the same."""
    found = [cohort_of(name, np.zeros((count, 4, 4, 4))) for name in ("real", "synthetic")]
    for cohort in found:
        cohort.folder = str(folder / cohort.name)
        (folder / cohort.name).mkdir()
        cohort.files = [f"{cohort.folder}/sub-{i:02d}_T1w.nii.gz" for i in range(count)]
    ids = [f"sub-{i:02d}" for i in range(count)]
    write(folder / "real/participants.tsv", {"participant_id": ids, "age": ages[:count], "sex": sexes[:count]})
    files = [f"{name}_T1w.nii.gz" for name in ids]
    write(folder / "synthetic/samples.csv", {"file": files, "age": ages[:count], "sex": sexes[:count]})
    return Cohorts(found[0], None, found[1:])


def rows_of(measure, cohorts):
    measure.check(cohorts)
    return {cohort.name: {row["metric"]: row for row in measure(cohort, cohorts)["rows"]} for cohort in cohorts}


def test_the_slope_is_that_of_least_squares_and_a_resample_that_of_its_volumes():
    y = 0.1 * AGES + RNG.normal(size=N)
    line = linregress(AGES, y)
    assert slope(AGES, y)[0] == pytest.approx(line.slope)
    assert explained(AGES, y, None) == pytest.approx(line.rvalue**2)
    assert predicted(np.array([50.0]), AGES, y, None)[0] == pytest.approx(line.intercept + 50 * line.slope)
    counts = np.array([[2, 1, 0, 3]])
    chosen = np.repeat([0, 1, 2, 3], counts[0])
    assert slope(AGES[:4], y[:4], counts)[0] == pytest.approx(linregress(AGES[chosen], y[chosen]).slope)
    assert np.isnan(slope(np.ones(5), np.arange(5.0))[0]) and explained(np.ones(5), np.arange(5.0), None) == 0
    x, words = np.array([0, 0, 1, 1.0]), ["a", "b", "never"]
    assert predicted(np.array([1, 2.0]), x, np.array([1, 3, 7, 9.0]), words)[0] == 8
    assert explained(x, np.array([1, 3, 7, 9.0]), words) == pytest.approx(36 / 40)  # between over total, by hand


@pytest.mark.parametrize("obedience", [0.0, 0.5, 1.0, 1.7])
def test_adherence_is_the_share_of_the_real_relation(tmp_path, obedience):
    cohorts = cohorts_in(tmp_path)
    noise, male = RNG.normal(size=(4, N)), SEXES == "m"
    real = {"CSF (% of the brain)": 0.2 * AGES + noise[0], "brain (% of the picture)": 5 * male + noise[1]}
    made = {
        "CSF (% of the brain)": 0.2 * obedience * AGES + 0.1 * noise[2],
        "brain (% of the picture)": 5 * obedience * male + 0.1 * noise[3],
    }
    rows = rows_of(Conditions(["age", "sex"], None, Quantities(real=real, synthetic=made)), cohorts)
    assert rows["real"]["adherence_age"]["value"] == pytest.approx(1)
    for name in ("adherence_age", "adherence_sex"):
        row = rows["synthetic"][name]
        assert row["low"] <= row["value"] <= row["high"] and row["value"] == pytest.approx(obedience, abs=0.2)
    assert "CSF (% of the brain) against age" in rows["real"]["adherence_age"]["note"]
    assert "brain (% of the picture) against sex" in rows["real"]["adherence_sex"]["note"]
    expected = linregress(AGES, made["CSF (% of the brain)"]).slope
    assert rows["synthetic"]["slope_csf_age"]["value"] == pytest.approx(expected, abs=1e-5)
    size = made["brain (% of the picture)"]
    difference = rows["synthetic"]["difference_brain_sex"]
    assert difference["value"] == pytest.approx(size[male].mean() - size[~male].mean(), abs=1e-5)
    assert difference["unit"] == "% of the picture"


def test_volumes_of_which_nothing_is_known_are_left_out_and_a_folder_without_a_table_has_no_figures(tmp_path):
    ages = np.array([f"{age:.1f}" for age in AGES])
    ages[:5] = "n/a"
    cohorts = cohorts_in(tmp_path, ages=ages)
    table = {"CSF (% of the brain)": 0.2 * AGES}
    table["CSF (% of the brain)"][7] = np.nan  # could not be classified
    measure = Conditions(["age"], None, Quantities(real=table, synthetic=table))
    rows_of(measure, cohorts)
    assert len(measure(cohorts.real, cohorts)["data"]["age"]["quantities"]["CSF (% of the brain)"]["x"]) == N - 6
    (tmp_path / "synthetic/samples.csv").unlink()
    rows = rows_of(measure, cohorts)
    assert rows["synthetic"]["adherence_age"]["value"] is None
    assert "known of no volume" in measure(cohorts.synthetic[0], cohorts)["notes"][0]


def test_volumes_that_were_asked_for_an_age_alone_are_judged_by_it(tmp_path):
    """As a sweep of one covariate is, of weights that know several."""
    cohorts = cohorts_in(tmp_path)
    with open(tmp_path / "synthetic/samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    write(tmp_path / "synthetic/samples.csv", {k: ["n/a" if k == "sex" else row[k] for row in rows] for k in rows[0]})
    table = {"CSF (% of the brain)": 0.2 * AGES + RNG.normal(size=N)}
    rows = rows_of(Conditions(["age", "sex"], None, Quantities(real=table, synthetic=table)), cohorts)["synthetic"]
    assert rows["adherence_age"]["value"] == pytest.approx(1) and rows["adherence_sex"]["value"] is None


@pytest.mark.parametrize(
    "names, ages, message",
    [
        (["weight"], AGES, "has no column 'weight'"),
        (["age"], np.array(["30", "40", *["n/a"] * (N - 2)]), "age is known of 2 real volumes .* expected 3 or more"),
    ],
)
def test_a_table_that_says_too_little_is_refused_before_anything_is_measured(tmp_path, names, ages, message):
    with pytest.raises(BundleError, match=message):
        Conditions(names, None, Quantities()).check(cohorts_in(tmp_path, ages=ages))


def test_what_is_dark_within_is_the_ventricle_and_not_the_surface():
    """A ball of 20 voxels of radius: a rim of CSF, a ball of it in the middle, and grey and white matter between."""
    radius = np.sqrt(sum((axis - 21.5) ** 2 for axis in np.indices((44, 44, 44))))
    noise = np.random.default_rng(1).normal(0, 0.03, radius.shape)
    for ventricle, dark in ((4, -0.6), (7, -0.6), (7, -1.0)):  # as dark as the background, too
        volume = np.select([radius < ventricle, radius < 12, radius < 17, radius < 20], [dark, 0.5, 0, -0.6], -1)
        volume = np.where(volume > -1, volume + noise, -1)
        truth = (radius < ventricle).sum() / (radius < 20).sum()
        assert inner_dark(volume) == pytest.approx(truth, rel=0.03)
    assert np.isnan(inner_dark(np.full((8, 8, 8), -1.0)))
