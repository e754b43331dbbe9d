"""The runner keeps what is measured, measures again what changed, and says everything in one report."""

import csv
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import cohort_of

from scripts.evaluation.cohorts import Cohorts
from scripts.evaluation.evaluator import CohortEvaluator
from scripts.evaluation.report import number, summary, write_report
from scripts.running.errors import BundleError
from scripts.running.pictures import save_png


def level(name, value, n=3):
    return cohort_of(name, np.full((n, 4, 4, 4), value))


@pytest.fixture
def cohorts():
    gan = level("<gan> & co", 0.75)
    gan.notes.append("Made by <b>hand</b>.")
    return Cohorts(level("real", 0.0), level("held-out", 0.125), [level("ours", 0.25), gan])


def evaluate(cohorts, measures, output_dir, settings=None):
    return CohortEvaluator(cohorts, measures, output_dir, settings).run().evaluation


class Level:
    """A measure of one line: the mean of the voxels."""

    name, title = "level", "Level"

    def __init__(self, offset=0.0, fails_at=None):
        self.settings = {"offset": offset}
        self.fails_at, self.calls = fails_at, []

    def check(self, cohorts):
        if len(cohorts.real) < 2:
            raise BundleError("too few")

    def __call__(self, cohort, cohorts):
        if cohort.name == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(cohort.name)
        value = float(cohort.volumes.astype(float).mean()) + self.settings["offset"]
        row = {"metric": "mean", "value": value, "low": value - 0.1, "high": float("nan"), "better": "real"}
        return {
            "rows": [row | {"unit": "", "note": "plain"}],
            "notes": ["One note."],
            "data": {"list": [value, math.inf]},
        }

    def draw(self, results, cohorts, folder):
        assert [c.name for c in cohorts] == list(results) and results["ours"]["data"]["list"][1] is None
        save_png(np.random.default_rng(0).random((8, 8)), f"{folder}/level.png", 0, 1)
        table = {"columns": ["model", "value"], "rows": [["ours", 0.25], ["none", None]]}
        return [
            {"file": "level.png", "title": "A figure", "caption": "Its caption."},
            {"table": table, "title": "A table", "caption": "Of numbers."},
        ]


def test_a_row_a_model_and_everything_in_the_json(cohorts, tmp_path):
    result = evaluate(cohorts, [Level()], str(tmp_path), {"seed": 3})
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["real", "held-out", "ours", "<gan> & co"]
    assert float(rows["ours"]["mean"]) == 0.25 and float(rows["ours"]["mean_low"]) == pytest.approx(0.15)
    assert rows["ours"]["volumes"] == "3"
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept == result and kept["settings"] == {"seed": 3} and kept["shape"] == [4, 4, 4]
    assert kept["measures"][0]["rows"]["held-out"][0]["value"] == 0.125
    assert kept["measures"][0]["rows"]["ours"][0]["high"] is None and kept["measures"][0]["notes"] == ["One note."]


def test_a_stopped_run_goes_on_and_only_what_changed_is_measured_again(cohorts, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(cohorts, [Level(fails_at="<gan> & co")], str(tmp_path))
    second, third, fourth = Level(), Level(), Level(offset=1.0)
    evaluate(cohorts, [second], str(tmp_path))
    assert second.calls == ["<gan> & co"]
    cohorts.synthetic[0] = level("ours", 0.5)
    evaluate(cohorts, [third], str(tmp_path))
    assert third.calls == ["ours"]
    evaluate(cohorts, [fourth], str(tmp_path))
    assert len(fourth.calls) == 4
    for part in (tmp_path / "parts").iterdir():
        part.write_text(part.read_text()[:20])
    fifth = Level(offset=1.0)
    evaluate(cohorts, [fifth], str(tmp_path))
    assert len(fifth.calls) == 4
    cohorts.real = level("real", 0.0625)
    sixth = Level(offset=1.0)
    evaluate(cohorts, [sixth], str(tmp_path))
    assert len(sixth.calls) == 4  # everything is relative to the real cohort


def test_checks_come_before_work_and_names_must_differ(cohorts, tmp_path):
    measure = Level()
    with pytest.raises(BundleError, match="not different"):
        evaluate(cohorts, [measure, Level()], str(tmp_path))
    cohorts.real = level("real", 0.0, n=1)
    with pytest.raises(BundleError, match="too few"):
        evaluate(cohorts, [measure], str(tmp_path))
    assert measure.calls == []


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.text, self.cells = [], "", []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "td":
            self.cells.append(dict(attrs).get("class"))

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_that_escapes_names_and_marks_the_best(cohorts, tmp_path):
    path = write_report(evaluate(cohorts, [Level()], str(tmp_path)), str(tmp_path))
    page = Page()
    page.feed(open(path).read())
    assert all(link.startswith(("data:", "#")) for link in page.links) and len(page.links) > 2
    for words in (
        "<gan> & co",
        "Made by <b>hand</b>.",
        "One note.",
        "A figure",
        "Its caption.",
        "Of numbers.",
        "plain",
    ):
        assert words in page.text, words
    assert page.cells.count("best") == 1  # ours, 0.25 from the real ones; the other is 0.75 from them


def row(value, better):
    return [{"metric": "m", "value": value, "low": None, "high": None, "better": better, "note": ""}]


@pytest.mark.parametrize("better, best", [("higher", "b"), ("lower", "a"), ("real", "b"), (None, None)])
def test_the_best_is_what_better_says(better, best):
    rows = {"real": row(0.8, better), "a": row(0.3, better), "b": row(0.9, better), "c": row(None, better)}
    (line,) = summary({"rows": rows}, ["a", "b", "c"])
    assert [name for name, cell in line["cells"].items() if cell["best"]] == ([best] if best else [])


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (0.84481, "0.8448"), (12.345678, "12.35"), (3, "3"), (0.0, "0"), (1.2e-5, "1.2e-05")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text
