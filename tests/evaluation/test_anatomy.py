import json
import warnings
from itertools import combinations

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from conftest import cohort_of
from scipy.stats import false_discovery_control, ttest_ind, wasserstein_distance_nd

from scripts.evaluation import anatomy, effects
from scripts.evaluation.anatomy import Anatomy
from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.effects import cohen_d, permutation_p, wasserstein, wasserstein_with_chance
from scripts.evaluation.evaluator import without_nan
from scripts.evaluation.regions import FREESURFER, label_volumes
from scripts.running.errors import BundleError

QUICK = {"num_permutations": 499, "num_resamples": 50}


def write_map(path, voxels: dict[int, int], affine: np.ndarray | None = None, dtype=np.uint8) -> str:
    """A label map of 10 x 10 x 10 with so many voxels of each label."""
    labels = np.zeros(1000, dtype)
    labels[: sum(voxels.values())] = np.repeat(list(voxels), list(voxels.values()))
    nib.save(nib.Nifti1Image(labels.reshape(10, 10, 10), np.eye(4) if affine is None else affine), path)
    return str(path)


def brains(n: int, seed: int = 0, grey: float = 0.45, shape: tuple[int, ...] = (16, 16, 16)) -> np.ndarray:
    """Noise of three classes in a box on a background of -1; the share of the middle class is about `grey`."""
    rng = np.random.default_rng(seed)
    volumes = np.full((n, *shape), -1.0)
    for volume in volumes:
        inside = tuple(slice(2, -2) for _ in shape)
        size = volume[inside].shape
        share = grey + rng.normal(0, 0.02)
        means = rng.choice([-0.6, 0.0, 0.6], size, p=[0.2, share, 0.8 - share])
        volume[inside] = means + rng.normal(0, 0.06, size)
    return volumes.astype(np.float16)


def mapped(name: str, folder, tables: list[dict[int, int] | None], **kwargs) -> Cohort:
    """A cohort with a label map a volume, "" for None."""
    folder.mkdir(exist_ok=True)
    paths = ["" if t is None else write_map(folder / f"{name}{i}.nii.gz", t, **kwargs) for i, t in enumerate(tables)]
    return cohort_of(name, brains(len(tables), seed=len(name)), paths, 2.0)


def measured(measure: Anatomy, cohorts: Cohorts) -> dict[str, dict]:
    measure.check(cohorts)
    return {c.name: json.loads(json.dumps(without_nan(measure(c, cohorts)), allow_nan=False)) for c in cohorts}


def values(result: dict) -> dict[str, float | None]:
    return {row["metric"]: row["value"] for row in result["rows"]}


def test_label_volumes_are_voxels_times_the_determinant_of_the_affine(tmp_path):
    turned = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -3], [0, 0, 3, 7], [0, 0, 0, 1]])
    for dtype in (np.uint8, np.int32, np.float32):
        found = label_volumes(write_map(tmp_path / "a.nii.gz", {17: 100, 2: 300, 53: 1}, turned, dtype))
        assert found == pytest.approx({17: 0.9, 2: 2.7, 53: 0.009})
    flat = np.array([[0, 4], [4, 4]], np.int16)
    nib.save(nib.Nifti1Image(flat[..., None], np.diag([2, 5, 10, 1])), tmp_path / "flat.nii")
    assert label_volumes(str(tmp_path / "flat.nii")) == pytest.approx({4: 0.3})


def test_files_that_are_no_label_maps_are_named(tmp_path):
    image = nib.Nifti1Image(np.random.default_rng(0).random((4, 4, 4)).astype(np.float32), np.eye(4))
    nib.save(image, tmp_path / "t1.nii.gz")
    (tmp_path / "text.nii.gz").write_text("no image")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.uint8), np.eye(4)), tmp_path / "four.nii.gz")
    labels = np.zeros((4, 4, 4), np.float32)
    for name, value in (("infinite", np.inf), ("nan", np.nan)):
        labels[1, 2, 3] = value
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(labels.astype(np.complex64), np.eye(4)), tmp_path / "complex.nii.gz")
    whole = (tmp_path / "t1.nii.gz").read_bytes()
    (tmp_path / "bits.nii.gz").write_bytes(whole[:100] + bytes(20) + whole[120:])
    wrong = {"t1": "whole numbers", "text": "cannot be read", "four": "three dimensions", "bits": "cannot be read"}
    wrong |= {"infinite": "the value inf; whole", "nan": "the value nan; whole", "complex": "voxels of type complex64"}
    for name, word in wrong.items():
        with pytest.raises(BundleError, match=f"{name}.nii.gz.*{word}"):
            label_volumes(str(tmp_path / f"{name}.nii.gz"))
    real = cohort_of("real", brains(2), [str(tmp_path / "t1.nii.gz")] * 2, voxel_size=2.0)
    cohorts = Cohorts(real, None, [cohort_of("ours", brains(2, 1), voxel_size=2.0)])
    with pytest.raises(BundleError, match="whole numbers"):
        Anatomy().check(cohorts)
    real.label_maps = [str(tmp_path / "gone.nii.gz"), ""]
    with pytest.raises(BundleError, match="gone.nii.gz.*no such file"):
        Anatomy().check(cohorts)


def test_cohen_d_by_hand():
    x = np.array([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0]])
    y = np.array([[3.0, 10.0], [5.0, 10.0]])
    pooled = np.sqrt((2 * 1.0 + 1 * 2.0) / 3)  # variances 1 (n 3) and 2 (n 2)
    d = cohen_d(x, y)
    assert d[0] == pytest.approx(2 / pooled) and np.isnan(d[1])
    rng = np.random.default_rng(0)
    x, y = 1e6 + rng.normal(size=(20, 4)), 1e6 + rng.normal(1, 2, size=(13, 4))
    np.testing.assert_allclose(cohen_d(x, y), -ttest_ind(x, y).statistic / np.sqrt(1 / (1 / 20 + 1 / 13)), rtol=1e-6)


def test_a_resample_gives_the_d_of_the_volumes_that_it_holds():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    of_x, of_y = np.array([[2, 0, 1, 1, 0, 2]]), np.array([[1, 1, 0, 3, 0]])
    found = effects.weighted_d(x, y, of_x, of_y)[0]
    np.testing.assert_allclose(found, cohen_d(x.repeat(of_x[0], 0), y.repeat(of_y[0], 0)))


def test_permutation_p_is_exact_for_few_volumes():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(4, 3)), rng.normal([0, 2, 5], 1, size=(5, 3))
    pooled = np.concatenate([x, y])
    found = permutation_p(x, y)
    for k in range(3):
        differences = []
        for group in combinations(range(9), 4):
            inside = np.isin(np.arange(9), group)
            differences.append(pooled[inside, k].mean() - pooled[~inside, k].mean())
        seen, differences = x[:, k].mean() - y[:, k].mean(), np.array(differences)
        tails = [(differences <= seen + 1e-12).mean(), (differences >= seen - 1e-12).mean()]
        assert found[k] == pytest.approx(min(1, 2 * min(tails)))
    assert found[2] == pytest.approx(2 / 126)


def test_permutation_p_is_near_the_t_test_for_many_and_one_without_spread():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal([0, 0.2, 0.4, 0], 1, size=(50, 4))
    x[:, 3] = y[:, 3] = 2.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = permutation_p(x, y, 4999)
    np.testing.assert_allclose(found[:3], ttest_ind(x[:, :3], y[:, :3]).pvalue, atol=0.02)
    assert found[3] == 1
    np.testing.assert_array_equal(found, permutation_p(x, y, 4999))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_wasserstein_in_closed_form_and_as_scipy(k):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, k)), rng.normal(0.5, 2, size=(12, k))
    assert wasserstein(x, x[::-1]) == 0
    assert wasserstein(x, x + 0.7) == pytest.approx(0.7)
    assert wasserstein(np.zeros((3, k)), np.full((3, k), 2.0)) == pytest.approx(2)
    expected = wasserstein_distance_nd(x, y) / np.sqrt(k)
    assert wasserstein(x, y) == pytest.approx(expected, rel=1e-6)


def test_wasserstein_with_chance_tells_one_population_from_two_and_from_copies():
    rng = np.random.default_rng(0)
    x, same, shifted = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)), rng.normal(1, 1, size=(40, 3))
    one = wasserstein_with_chance(x, same, num_resamples=200)
    assert one["p"] > 0.05 and one["chance_low"] < one["value"] < one["chance_high"]
    two = wasserstein_with_chance(x, shifted, num_resamples=200)
    assert two["p"] == pytest.approx(1 / 201) and two["value"] == wasserstein(x, shifted)
    assert two["low"] < two["value"] < two["high"] and two["low"] > two["chance_high"]
    copies = wasserstein_with_chance(x, x[::-1], num_resamples=200)
    assert copies["value"] == 0 == copies["low"] and copies["p"] == 1 and copies["chance_low"] > 0.1
    assert wasserstein_with_chance(x, shifted, max_volumes=20, num_resamples=20)["value"] > one["value"]


def test_regions_from_label_maps(tmp_path):
    # label 17 of 100, 110, 120 voxels against 130, 140, 150 of 8 mm3; label 53 alike; 99 only in "ours"
    reals = [{17: 100 + 10 * i, 53: 200 + 10 * (i % 2)} for i in range(3)]
    real = mapped("real", tmp_path / "real", reals, affine=np.diag([2, 2, 2, 1]))
    tables = [{17: 130 + 10 * i, 53: 200 + 10 * (i % 2), 99: 5} for i in range(3)] + [None]
    ours = mapped("ours", tmp_path / "ours", tables, affine=np.diag([2, 2, 2, 1]))
    measure = Anatomy({"17": "left hippocampus"}, **QUICK)
    results = measured(measure, Cohorts(real, None, [ours]))
    of_real, of_ours = values(results["real"]), values(results["ours"])
    assert of_real["region_left_hippocampus"] == pytest.approx(0.88)
    assert of_ours["region_left_hippocampus"] == pytest.approx(1.12)
    assert of_ours["region_label_53"] == pytest.approx(of_real["region_label_53"])
    assert of_ours["cohen_d_left_hippocampus"] == pytest.approx(0.24 / 0.08)
    assert of_ours["cohen_d_label_53"] == pytest.approx(0)
    p = results["ours"]["data"]["regions"]["p"]
    assert p == pytest.approx([0.1, 1])  # 2 of 20 ways
    assert [of_ours["p_fdr_left_hippocampus"], of_ours["p_fdr_label_53"]] == pytest.approx(
        false_discovery_control(p).tolist()
    )
    assert of_ours["max_abs_cohen_d_regions"] == pytest.approx(3) and of_ours["regions_different"] == 0
    assert of_ours["wasserstein_regions"] == pytest.approx(3 / np.sqrt(2))  # one of two regions moved by 3 SD
    assert not any("tissue" in metric for metric in of_ours)
    notes = " ".join(results["ours"]["notes"])
    assert "1 of 4 volumes have no label map" in notes and "labels 99 do not occur" in notes
    assert all(row["low"] <= row["value"] <= row["high"] for row in results["ours"]["rows"] if row["low"] is not None)


def test_relative_regions_do_not_depend_on_the_voxel_size(tmp_path):
    tables = [{1: 100 + 5 * i, 2: 300} for i in range(3)]
    real = mapped("real", tmp_path / "real", tables)
    ours = mapped("ours", tmp_path / "ours", tables, affine=np.diag([3, 3, 3, 1]))
    of_ours = values(measured(Anatomy(relative="true", **QUICK), Cohorts(real, None, [ours]))["ours"])
    assert of_ours["region_label_2"] == pytest.approx(np.mean([100 * 300 / (400 + 5 * i) for i in range(3)]))
    assert of_ours["cohen_d_label_1"] == pytest.approx(0, abs=1e-9)
    assert of_ours["wasserstein_regions"] == pytest.approx(0, abs=1e-6)


def test_a_label_that_a_map_lacks_has_no_volume_and_one_without_spread_no_d(tmp_path):
    real = mapped("real", tmp_path / "real", [{1: 10}, {1: 10, 2: 6}, {1: 10, 2: 3}])
    ours = mapped("ours", tmp_path / "ours", [{1: 10}, {1: 10}])
    results = measured(Anatomy(**QUICK), Cohorts(real, None, [ours]))
    assert values(results["real"])["region_label_2"] == pytest.approx(0.003)
    assert values(results["ours"])["region_label_2"] == 0
    assert values(results["ours"])["cohen_d_label_1"] is None
    assert values(results["ours"])["wasserstein_regions"] is not None


def test_label_maps_are_never_compared_with_tissues(tmp_path):
    tables = [{1: 100 + 5 * i} for i in range(4)]
    real = mapped("real", tmp_path / "real", tables)
    with_maps = mapped("with", tmp_path / "with", tables)
    without = cohort_of("without", brains(4, 5), voxel_size=2.0)
    single = mapped("single", tmp_path / "single", [{1: 100}, None, None])
    results = measured(Anatomy(**QUICK), Cohorts(real, None, [with_maps, without, single]))
    for name in ("real", "with"):
        assert {"region_label_1", "tissue_csf"} <= set(values(results[name]))
    for name, reason in (("without", "no label maps"), ("single", "only 1 label map")):
        found = values(results[name])
        assert found["wasserstein_regions"] is None and found["wasserstein_tissues"] is not None
        assert "region_label_1" not in found
        assert any(reason in note for note in results[name]["notes"])
    # the other way round: nothing to compare the maps with
    results = measured(Anatomy(**QUICK), Cohorts(without, None, [with_maps]))
    assert not any("region" in metric for metric in values(results["with"]))
    assert any("are not used" in note for note in results["with"]["notes"])


@pytest.mark.parametrize("shape", [(16, 16, 16), (48, 48)])
def test_tissues_of_like_and_unlike_cohorts(shape):
    real, held_out = (
        cohort_of(n, brains(20, s, shape=shape), voxel_size=2.0) for n, s in (("real", 0), ("held-out", 1))
    )
    other = cohort_of("other", brains(20, 2, grey=0.6, shape=shape), voxel_size=3)
    results = measured(Anatomy(**QUICK), Cohorts(real, held_out, [other]))
    of_real, alike, unlike = (values(results[name]) for name in ("real", "held-out", "other"))
    assert of_real["tissue_grey_matter"] == pytest.approx(45, abs=2)
    assert of_real["tissue_csf"] == pytest.approx(20, abs=2)
    assert sum(of_real[f"tissue_{name}"] for name in ("csf", "grey_matter", "white_matter")) == pytest.approx(100)
    assert unlike["cohen_d_grey_matter"] > 3 and abs(alike["cohen_d_grey_matter"]) < 1
    assert unlike["p_fdr_grey_matter"] < 0.02 and unlike["tissues_different"] >= 2 > alike["tissues_different"]
    assert unlike["wasserstein_tissues"] > 2 * alike["wasserstein_tissues"]
    brain_ml = np.prod([side - 4 for side in shape]) * 3 ** len(shape) / 1000
    assert results["other"]["data"]["tissues"]["ml"]["brain"][0] == pytest.approx(brain_ml, rel=1e-3)
    assert any("no replacement" in note and "SynthSeg" in note for note in results["real"]["notes"])


def test_volumes_without_tissues_are_left_out_and_counted():
    volumes = brains(5)
    volumes[1], volumes[3] = -1, 0.25
    real = cohort_of("real", brains(5, 1), voxel_size=2.0)
    results = measured(Anatomy(**QUICK), Cohorts(real, None, [cohort_of("bad", volumes, voxel_size=2.0)]))
    assert any("2 of 5 volumes could not be classified" in note for note in results["bad"]["notes"])
    assert len(results["bad"]["data"]["tissues"]["values"]) == 3
    empty = cohort_of("empty", np.full_like(volumes, -1), voxel_size=2.0)
    results = measured(Anatomy(**QUICK), Cohorts(real, None, [empty]))
    assert values(results["empty"])["wasserstein_tissues"] is None
    assert values(results["real"])["tissue_csf"] is not None
    results = measured(Anatomy(**QUICK), Cohorts(empty, None, [real]))
    assert values(results["real"])["wasserstein_tissues"] is None


def test_the_real_volumes_are_classified_once(monkeypatch):
    calls = []
    monkeypatch.setattr(anatomy, "classify", lambda *a, f=anatomy.classify: (calls.append(1), f(*a))[1])
    cohorts = Cohorts(
        cohort_of("real", brains(4), voxel_size=2.0),
        None,
        [cohort_of("a", brains(3, 1), voxel_size=2.0), cohort_of("b", brains(3, 2), voxel_size=2.0)],
    )
    measure = Anatomy(**QUICK)
    measured(measure, cohorts)
    assert len(calls) == 10


def test_many_regions_have_a_table_instead_of_rows_and_figures_are_written(tmp_path):
    rng = np.random.default_rng(0)

    def tables(n: int, more: int) -> list[dict[int, int]]:
        sizes = rng.normal(20, 2, (n, 32)).astype(int)
        return [{label: v + more * (label == 17) for label, v in zip(FREESURFER, row)} for row in sizes]

    real, held_out = (mapped(n, tmp_path / n, tables(8, 0)) for n in ("real", "held-out"))
    ours = mapped("ours", tmp_path / "ours", tables(7, 10))
    cohorts = Cohorts(real, held_out, [ours, cohort_of("without", brains(4, 9), voxel_size=2.0)])
    measure = Anatomy("freesurfer", num_resamples=50)
    results = measured(measure, cohorts)
    rows = values(results["ours"])
    assert not any(metric.startswith("region_") for metric in rows)
    assert rows["regions_different"] == 1 and rows["max_abs_cohen_d_regions"] > 2.5
    out = measure.draw(results, cohorts, str(tmp_path / "figures"))
    files = [entry["file"] for entry in out if "file" in entry]
    assert len(files) == len(set(files)) == 5
    for file in files:
        picture = matplotlib.image.imread(tmp_path / "figures" / file)
        assert 900 < picture.shape[1] < 1100 and picture[..., :3].std() > 0.01
    for entry in out:
        assert entry["title"] and entry["caption"]
    tables_ = {entry["title"]: entry["table"] for entry in out if "table" in entry}
    assert set(tables_) == {"All regions", "All tissues"}
    for table in tables_.values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    regions = tables_["All regions"]
    assert len(regions["rows"]) == 33 and not any("without" in column for column in regions["columns"])
    line = next(row for row in regions["rows"] if row[0].startswith("left hippocampus"))
    assert float(line[regions["columns"].index("ours: p (FDR)")]) < 0.05
    json.dumps(out, allow_nan=False)


def test_freesurfer_names_are_those_of_synthseg():
    assert len(FREESURFER) == 32 and len(set(FREESURFER.values())) == 32
    known = {2: "left cerebral white matter", 17: "left hippocampus", 53: "right hippocampus", 16: "brain-stem"}
    assert known.items() <= FREESURFER.items()


@pytest.mark.parametrize(
    "knob, value",
    [("label_names", {"hippocampus": 17}), ("label_names", "aal"), ("relative", "maybe"), ("num_permutations", 10)]
    + [("num_resamples", 0), ("max_volumes", 1), ("seed", -1), ("seed", True)],
)
def test_bad_knobs_are_named(knob, value):
    with pytest.raises(BundleError, match=knob):
        Anatomy(**{knob: value})


def test_settings_are_json_and_a_cohort_of_one_volume_is_refused():
    assert json.loads(json.dumps(Anatomy({17: "x"}).settings))["label_names"] == {"17": "x"}
    with pytest.raises(BundleError, match="ours: 1 volume"):
        Anatomy().check(
            Cohorts(cohort_of("real", brains(2), voxel_size=2.0), None, [cohort_of("ours", brains(1), voxel_size=2.0)])
        )


def test_results_are_measured_again_when_a_cohort_without_label_maps_joins(tmp_path):
    tables = [{1: 100 + 5 * i} for i in range(3)]
    real, ours = (mapped(name, tmp_path / name, tables) for name in ("real", "ours"))
    measure, settings = Anatomy(**QUICK), []
    for more in ([], [cohort_of("without", brains(3, 5), voxel_size=2.0)]):
        cohorts = Cohorts(real, None, [ours, *more])
        results = measured(measure, cohorts)
        settings.append(measure.settings)
        assert ("tissue_csf" in values(results["ours"])) == bool(more)
    assert settings[0] != settings[1]
