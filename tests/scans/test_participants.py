"""From a table to what each scan is: every bad table gets its sentence."""

import pytest

from scripts.running.errors import BundleError
from scripts.scans.participants import Covariates

ROWS = [("sub-01", "31", "f"), ("sub-02", "62.5", "m"), ("sub-03", "n/a", "f"), ("sub-04", "45", "n/a")]


@pytest.fixture
def scans(tmp_path):
    return [{"image": str(tmp_path / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_T1w.nii.gz")} for i in range(1, 5)]


def write(path, rows, columns=("participant_id", "age", "sex")):
    path.write_text("\n".join("\t".join(map(str, row)) for row in [columns, *rows]) + "\n")
    return path


def test_a_bids_table_is_found_and_read(tmp_path, scans):
    write(tmp_path / "participants.tsv", ROWS)
    covariates = Covariates(["age", "sex"], None, dataset_dir=str(tmp_path))
    items = covariates.attached(scans)
    assert [item["covariates"] for item in items] == [
        {"age": 31.0, "sex": "f"},
        {"age": 62.5, "sex": "m"},
        {"age": None, "sex": "f"},
        {"age": 45.0, "sex": None},
    ]
    age, sex = covariates.described(items[:2])
    assert age == {"name": "age", "mean": 46.75, "std": 15.75, "min": 31.0, "max": 62.5}
    assert sex == {"name": "sex", "words": ["f", "m"]}
    encoded = covariates.encoded(items, [age, sex])
    assert encoded[1]["condition"] == [1.0, 1.0] and "covariates" not in encoded[1]
    assert encoded[2]["condition"][0] != encoded[2]["condition"][0] and encoded[3]["condition"][1] == 2.0


def test_ids_may_lack_sub_and_files_may_be_named(tmp_path, scans):
    write(tmp_path / "a.tsv", [("01", 31), ("02", 40)], ("participant_id", "age"))
    items = Covariates(["age"], str(tmp_path / "a.tsv"), dataset_dir=str(tmp_path)).attached(scans)
    assert [item["covariates"]["age"] for item in items] == [31, 40, None, None]
    table = tmp_path / "b.csv"
    table.write_text(f"file,age\nsub-01/anat/sub-01_T1w.nii.gz,31\n{scans[1]['image']},40\n")
    items = Covariates(["age"], str(table), dataset_dir=str(tmp_path)).attached(scans)
    assert [item["covariates"]["age"] for item in items] == [31, 40, None, None]


def test_classes_are_one_covariate_more(tmp_path, scans):
    for item in scans:
        item["image"] = item["image"].replace("anat", "patient")
    write(tmp_path / "participants.tsv", ROWS)
    covariates = Covariates(["age"], None, ["control", "patient"], None, str(tmp_path))
    items = covariates.attached(scans)
    assert items[0]["covariates"] == {"class": "patient", "age": 31.0}
    assert [c["name"] for c in covariates.known] == ["class", "age"]


@pytest.mark.parametrize(
    "rows, columns, names, words",
    [
        (ROWS, ("participant_id", "years", "sex"), ["age"], ["no column 'age'", "participant_id"]),
        (ROWS, ("who", "age", "sex"), ["age"], ["no column 'file'"]),
        ([], ("participant_id", "age", "sex"), ["age"], ["has no rows"]),
        ([*ROWS, ("sub-05", "4x", "m")], None, ["age"], ["line 6", "age is '4x'", "expected a number, or n/a"]),
        ([*ROWS, ("sub-05", "700", "m")], None, ["age"], ["line 6", "age is '700'", "from 0 to 125 years"]),
        ([(s, "n/a", x) for s, _, x in ROWS], None, ["age"], ["'age'", "has no values"]),
        ([*ROWS, ("sub-01", "32", "f")], None, ["age"], ["two rows for '01', lines 2 and 6", "31.0", "32.0"]),
        ([(f"x{i}", 40 + i, "f") for i in range(3)], None, ["age"], ["none of the 3 rows", "sub-01"]),
        ([(f"sub-{i}", 4, f"w{i}") for i in range(60)], None, ["sex"], ["60 different words"]),
        (ROWS, None, ["age", "age"], ["name one twice"]),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, scans, rows, columns, names, words):
    write(tmp_path / "participants.tsv", rows, columns or ("participant_id", "age", "sex"))
    with pytest.raises(BundleError) as error:
        Covariates(names, None, dataset_dir=str(tmp_path)).attached(scans)
    assert all(word in str(error.value) for word in words), error.value


def test_what_is_odd_is_said(tmp_path, scans, caplog):
    rows = [*ROWS[:2], ("sub-77", "50", "m"), ("sub-78", "51", "m")]
    write(tmp_path / "participants.tsv", rows)
    caplog.set_level("INFO")
    covariates = Covariates(["age", "sex"], None, dataset_dir=str(tmp_path))
    items = covariates.attached(scans)
    assert "2 of 4 scans have no row" in caplog.text and "2 of 4 rows are of no scan" in caplog.text
    covariates.described(items[:1] + items[2:3] + [items[0] | {"covariates": {"age": 40.0, "sex": "f"}}])
    assert "of the training scans none has sex 'm'" in caplog.text
    write(
        tmp_path / "volumes.tsv",
        [(f"sub-0{i}", v) for i, v in enumerate((20, 21, 22, 23, 9000), 1)],
        ("participant_id", "ml"),
    )
    Covariates(["ml"], str(tmp_path / "volumes.tsv"))
    assert "ml is '9000', far from all others" in caplog.text


def test_weights_to_go_on_with_keep_their_words_and_scale(tmp_path, scans, caplog):
    write(tmp_path / "participants.tsv", ROWS)
    before = {
        "covariates": [
            {"name": "sex", "words": ["m"]},
            {"name": "age", "mean": 50.0, "std": 20.0, "min": 20, "max": 60},
        ]
    }
    covariates = Covariates(["age", "sex"], None, dataset_dir=str(tmp_path), description=before)
    age, sex = covariates.described(covariates.attached(scans))
    assert age == {"name": "age", "mean": 50.0, "std": 20.0, "min": 20, "max": 62.5} and sex["words"] == ["m", "f"]
    with pytest.raises(BundleError, match="the words of 'sex' are .*, but the run that goes on was begun with"):
        Covariates(["sex", "age"], None, dataset_dir=str(tmp_path), description=before, resumed=True)
    caplog.set_level("INFO")
    assert [c["name"] for c in Covariates(["age"], None, dataset_dir=str(tmp_path), description=before).known] == [
        "age"
    ]
    assert "the weights to begin with know ['sex'] too, which this training passes over" in caplog.text
    with pytest.raises(
        BundleError, match=r"\['age'\] were given, but the run that goes on was begun with \['sex', 'age'\]"
    ):
        Covariates(["age"], None, dataset_dir=str(tmp_path), description=before, resumed=True)
