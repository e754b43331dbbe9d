"""The real evaluation command on folders of phantoms, and its report in a real browser."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import run_bundle

from scripts.scans.phantoms import phantom_cohort

MEASURES = ["diversity", "fidelity", "anatomy", "memorisation", "appearance"]


def evaluate(output, **overrides):
    knobs = {"config_file": "configs/evaluate.json", "output_dir": output, "spatial_shape": "[16,16,16]"}
    knobs["brain_extraction"] = "false"  # phantoms are heads
    return run_bundle("run", **knobs | {"num_pairs": 6} | overrides)


@pytest.fixture(scope="module")
def folders(cohort, tmp_path_factory) -> dict[str, Path]:
    """Real phantoms, unseen ones, others by another "generator", and copies of the real ones."""
    root = tmp_path_factory.mktemp("folders")
    made = {"real": cohort}
    for seed, (name, shape) in enumerate({"unseen": (20, 20, 20), "ours": (18, 20, 22)}.items(), 2):
        made[name] = Path(phantom_cohort(str(root / name), 5, shape, 8.0, seed=seed))
    made["copies"] = Path(shutil.copytree(cohort, root / "copies"))
    return made


@pytest.fixture(scope="module")
def evaluated(folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    names = repr({"ours": str(folders["ours"]), "copies": str(folders["copies"])})
    done = evaluate(output, real_dir=folders["real"], held_out_dir=folders["unseen"], synthetic_dirs=names)
    assert done.returncode == 0, done.stderr
    assert "real and copies hold the same volumes" in done.stdout
    return output


def test_one_command_writes_numbers_figures_and_a_report(evaluated):
    with open(evaluated / "metrics.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["real", "held-out", "ours", "copies"]
    assert float(rows["copies"]["flagged"]) == 1 and float(rows["copies"]["recall_pca"]) == 1
    assert rows["ours"]["fid_medicalnet"] == ""  # no weights were given
    for protocol in ("kwon2019", "wang2003", "monai"):
        value, low, high = (float(rows["ours"][f"ms_ssim_{protocol}{end}"]) for end in ("", "_low", "_high"))
        assert low <= value <= high < 1
        assert float(rows["copies"][f"ms_ssim_{protocol}"]) == pytest.approx(float(rows["real"][f"ms_ssim_{protocol}"]))
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert [measure["name"] for measure in metrics["measures"]] == MEASURES
    assert len(metrics["cohorts"]["ours"]["files"]) == 5
    assert "18 x 20 x 22 (5)" in metrics["cohorts"]["ours"]["notes"][0]
    report = (evaluated / "report.html").read_text()
    pictures = [figure for measure in metrics["measures"] for figure in measure["figures"] if "file" in figure]
    assert len(pictures) > 8 and report.count("data:image/png;base64,") == len(pictures)


def test_a_second_run_takes_what_is_there(evaluated, folders):
    before = {part: part.stat().st_mtime_ns for part in (evaluated / "parts").iterdir()}
    metrics = (evaluated / "metrics.json").read_text()
    names = repr({"ours": str(folders["ours"]), "copies": str(folders["copies"])})
    done = evaluate(evaluated, real_dir=folders["real"], held_out_dir=folders["unseen"], synthetic_dirs=names)
    assert done.returncode == 0 and done.stdout.count("taken from") == len(MEASURES) * 4
    assert {part: part.stat().st_mtime_ns for part in (evaluated / "parts").iterdir()} == before
    assert (evaluated / "metrics.json").read_text() == metrics


def test_the_report_opens_without_errors_and_loads_nothing(evaluated, browser):
    browser.get((evaluated / "report.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0 and browser.execute_script("return document.images.length") > 8
    assert browser.execute_script("return document.body.scrollWidth <= window.innerWidth")


def test_label_maps_give_regions_by_name(folders, tmp_path):
    for name in ("real", "ours"):
        for path in sorted(folders[name].rglob("*.nii.gz")):
            image = nib.load(path)
            labels = (np.asarray(image.dataobj) > 0).astype(np.uint8) * 17
            labels[: labels.shape[0] // 2] *= 2
            (tmp_path / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / name / path.name.replace(".nii", "_seg.nii"))
    done = evaluate(
        tmp_path / "out",
        real_dir=folders["real"],
        synthetic_dirs=repr({"ours": str(folders["ours"])}),
        label_dirs=repr({"real": str(tmp_path / "real"), "ours": str(tmp_path / "ours")}),
        label_names=repr({"17": "left hippocampus"}),
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/metrics.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["ours"]["region_left_hippocampus"]) > 0 and "cohen_d_left_hippocampus" in rows["ours"]


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"real_dir": "nowhere"}, "real_dir: 'nowhere': there is no such folder"),
        ({"medicalnet_weights": "none.pth"}, "medicalnet_weights"),
        ({"num_pairs": 0}, "num_pairs: 0 was given"),
    ],
)
def test_bad_input_gets_a_sentence_at_once(folders, tmp_path, overrides, sentence):
    synthetic = repr({"ours": str(folders["ours"])})
    done = evaluate(tmp_path, **{"real_dir": folders["real"], "synthetic_dirs": synthetic} | overrides)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and sentence in done.stderr, done.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_after_a_training_neither_sampling_nor_evaluation_is_told_its_size(trained, tmp_path):
    weights, samples = trained / "models/model.pt", tmp_path / "samples"
    few = {"num_samples": 2, "num_inference_steps": 2, "output_dir": samples}
    done = run_bundle("run", config_file="configs/inference.json", ckpt_path=weights, **few)
    assert done.returncode == 0, done.stderr
    split = json.loads((trained / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(split | {"validation": split["training"][-2:]}))  # it has one
    knobs = {"real_dir": tmp_path / "dataset.json", "synthetic_dirs": samples, "output_dir": tmp_path / "out"}
    done = run_bundle("run", config_file="configs/evaluate.json", **knobs, num_pairs=2)
    assert done.returncode == 0, done.stderr
    (note,) = json.loads((tmp_path / "out/metrics.json").read_text())["cohorts"]["synthetic"]["notes"]
    assert "files of 16 x 16 x 16 voxels" in note and "were not cropped or resampled" in note
