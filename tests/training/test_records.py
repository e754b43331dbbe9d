import csv
import math

import numpy as np
import pytest
from matplotlib import image as png

from scripts.training import curves, records


def record_at(path, rows):
    record = records.CsvRecord(str(path), ["epoch", "loss"])
    record.start(0)
    for row in rows:
        record.add(*row)
    return record


def test_rows_come_back_as_written(tmp_path):
    record = record_at(tmp_path / "loss.csv", [(1, 1, 0.5), (2, 1, 0.25)])
    with open(tmp_path / "loss.csv", newline="") as file:
        assert list(csv.reader(file)) == [["iteration", "epoch", "loss"], ["1", "1", "0.5"], ["2", "1", "0.25"]]
    assert [float(row["loss"]) for row in record.rows()] == [0.5, 0.25]


def test_a_resumed_run_drops_what_it_will_write_again_and_a_torn_row(tmp_path):
    path = tmp_path / "loss.csv"
    record_at(path, [(1, 1, 0.5), (2, 1, 0.4), (3, 1, 0.3)])
    with open(path, "a") as file:
        file.write("4,1")  # killed here
    record = records.CsvRecord(str(path), ["epoch", "loss"])
    record.start(2)
    record.add(3, 1, 0.33)
    assert [row["loss"] for row in record.rows()] == ["0.5", "0.4", "0.33"]


def test_the_table_is_count_mean_std_and_quartiles_by_hand():
    statistics = curves.loss_statistics(np.array([4.0, 1.0, 3.0, 2.0]))
    expected = dict(zip(curves.STATISTICS, (4, 2.5, math.sqrt(5 / 3), 1, 1.75, 2.5, 3.25, 4)))
    assert statistics == pytest.approx(expected)
    assert curves.loss_statistics(np.array([2.0]))["std"] == 0


def test_the_curve_is_a_picture_and_nothing_half_written_stays(tmp_path):
    record_at(tmp_path / "loss.csv", [(i, 1, 1 / i) for i in range(1, 200)])
    run = records.TrainingRecords(str(tmp_path))
    run.validation.start(0)
    run.validation.add(100, "ema", 0.02, *[0] * 4)
    curves.plot_losses(run, str(tmp_path / "curve.png"))
    picture = png.imread(tmp_path / "curve.png")
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05
    assert not list(tmp_path.glob("*.partial"))
