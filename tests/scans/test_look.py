"""The pages of pictures and the table of a training's scans."""

import csv

import nibabel as nib
import numpy as np
import pytest
from conftest import workflow
from PIL import Image
from test_outliers import egg

from scripts.scans.look import look_at


@pytest.fixture
def scans(tmp_path):
    (tmp_path / "scans").mkdir()
    for number in range(10):
        image, _, spacing = egg(pitch=number - 5, spacing=(6.0, 6.0, 6.0))
        scale = [1, 1, 1.6][max(0, number - 7)]  # the last is much larger than a brain
        affine = np.diag([*spacing * scale, 1.0])
        name = f"sub-{number:02d}.nii.gz"
        nib.save(nib.Nifti1Image((image * 1000).astype(np.int16), affine), tmp_path / "scans" / name)
    return tmp_path / "scans"


def test_what_stands_out_comes_first_and_nothing_is_left_out(scans, tmp_path, caplog):
    images = [{"image": str(path)} for path in sorted(scans.iterdir())]
    files, values = look_at(images, str(tmp_path / "out"), str(scans))
    assert files == [f"sub-{i:02d}.nii.gz" for i in range(10)] and values.shape == (10, 9)
    said = caplog.records[-1].getMessage()
    assert said.startswith("dataset_dir: 1 of 10 scans stand out") and "'sub-09.nii.gz' has a volume of" in said
    assert "--exclude \"['sub-09.nii.gz']\"" in said
    page = np.asarray(Image.open(tmp_path / "out/brains.png"))
    assert page.shape == (3 * 130, 4 * 342, 3)
    orange = (page[..., 0] > 200) & (page[..., 1] > 120) & (page[..., 2] < 60)
    assert orange[:14, :342].any() and not orange[14:].any() and not orange[:, 342:].any()  # its name alone
    with open(tmp_path / "out/brains.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and [bool(row["stands_out"]) for row in rows] == [False] * 9 + [True]


def test_a_training_draws_them_before_it_begins_and_a_resumed_one_does_not_again(scans, tmp_path, caplog):
    workflow("train", tmp_path / "out", dataset_dir=str(scans), max_iterations=2).run()
    assert "1 of 10 scans stand out" in caplog.text
    before = (tmp_path / "out/brains.png").stat().st_mtime_ns
    assert before < (tmp_path / "out/models/model.pt").stat().st_mtime_ns
    caplog.clear()
    workflow("train", tmp_path / "out", dataset_dir=str(scans), max_iterations=4, resume=True).run()
    assert "stand out" not in caplog.text
    assert (tmp_path / "out/brains.png").stat().st_mtime_ns == before
