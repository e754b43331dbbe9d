"""Covariates from participants.tsv to the header of a sample, by the commands and in the wiring that ships."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import run_bundle, sample, workflow

from scripts.scans.phantoms import phantom_cohort

GROUPS = {"norm_num_groups": 4}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return phantom_cohort(str(tmp_path_factory.mktemp("people")), 8, (20, 20, 20), 8.0, people=True)


@pytest.fixture(scope="module")
def told(people, tmp_path_factory):
    """Output folder of a training that is told age and sex, and has been resumed."""
    output = tmp_path_factory.mktemp("told")
    knobs = {"dataset_dir": people, "covariates": ["age", "sex"], "val_fraction": 0.3, "preview_samples": 2}
    knobs |= GROUPS  # a norm of each channel alone would take away what is added to it
    workflow("train", output, **knobs, max_iterations=3).run()
    workflow("train", output, **knobs, resume=True).run()
    return output


def test_what_was_told_is_written_down_with_the_weights(told):
    description = json.loads((told / "models/model.json").read_text())
    age, sex = description["covariates"]
    assert age["name"] == "age" and 20 <= age["min"] < age["mean"] < age["max"] <= 80 and sex["words"] == ["f", "m"]
    weights = torch.load(told / "models/model.pt", weights_only=True)
    assert weights["class_embedding.parts.1.weight"].shape[0] == 3
    with open(told / "validation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["weights"] for row in rows] == ["raw", "ema_other_conditions", "ema"] * 2
    assert rows[-1]["loss"] != rows[-2]["loss"]


def test_a_sweep_is_made_of_the_same_noises_and_says_what_was_asked(told, tmp_path):
    asked = "{'age': [30, 70], 'sex': 'f'}"
    done = sample(
        told / "models/model.pt", tmp_path, covariates=asked, num_inference_steps=2, guidance_scale=2, **GROUPS
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"sample_seed0_volume00{i}_age{age}_sexf.nii.gz" for i in range(2) for age in (30, 70)]
    assert [row["file"] for row in rows] == names and [row["age"] for row in rows] == ["30", "70"] * 2
    images = [nib.load(tmp_path / name) for name in names]
    assert images[1].header["descrip"].item().decode().endswith("seed 0, volume 0, age 70, sex f")
    voxels = [image.get_fdata() for image in images]
    assert np.isfinite(voxels).all() and not np.array_equal(voxels[0], voxels[1])
    refused = sample(told / "models/model.pt", tmp_path, covariates="{'agee': 70}", **GROUPS)
    assert refused.returncode == 1 and "error: covariates: 'agee' was given; these weights know age" in refused.stderr


def test_a_table_asks_for_its_people(told, tmp_path):
    table = tmp_path / "people.csv"
    table.write_text("participant_id,age,sex\na,41.5,m\nb,n/a,f\n")
    done = sample(told / "models/model.pt", tmp_path / "out", covariates=table, num_inference_steps=2, **GROUPS)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["age"], row["sex"]) for row in rows] == [("41.5", "m"), ("n/a", "f")]


def test_the_evaluation_tells_a_generator_that_obeys_from_one_that_does_not(tmp_path):
    """The second one's volumes are those of other people than were asked for."""
    shape, rows = (24, 24, 24), {}
    for seed, name in enumerate(("real", "obeys", "deaf")):
        phantom_cohort(str(tmp_path / name), 24, shape, 7.0, seed=seed, people=True)
        with open(tmp_path / name / "participants.tsv", newline="") as file:
            rows[name] = list(csv.DictReader(file, delimiter="\t"))
    for name in ("obeys", "deaf"):
        files = sorted(path.name for path in (tmp_path / name).glob("*.nii.gz"))
        asked = [(row["age"], row["sex"]) for row in rows[name]]
        asked = asked if name == "obeys" else asked[::-1]
        lines = ["file,age,sex", *(f"{file},{age},{sex}" for file, (age, sex) in zip(files, asked))]
        (tmp_path / name / "samples.csv").write_text("\n".join(lines) + "\n")
    done = run_bundle(
        "run", config_file="configs/evaluate.json", real_dir=tmp_path / "real", output_dir=tmp_path / "evaluation",
        synthetic_dirs={name: str(tmp_path / name) for name in ("obeys", "deaf")}, spatial_shape=list(shape),
        covariates=["age", "sex"], device="cpu", num_workers=0, brain_extraction=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "evaluation/metrics.csv", newline="") as file:
        found = {row["model"]: row for row in csv.DictReader(file)}
    assert 0.7 < float(found["obeys"]["adherence_age"]) < 1.3 and abs(float(found["deaf"]["adherence_age"])) < 0.5
    assert 0.7 < float(found["obeys"]["adherence_sex"]) < 1.3 and abs(float(found["deaf"]["adherence_sex"])) < 0.5
    report = (tmp_path / "evaluation/report.html").read_text()
    assert "adherence_age" in report and "Measured against asked" in report


def test_weights_that_were_told_nothing_grow(people, trained, tmp_path, caplog):
    knobs = {"dataset_dir": people, "covariates": ["age"], "init_ckpt": str(trained / "models/model.pt")}
    caplog.set_level("INFO")
    knobs |= dict.fromkeys(("val_interval", "preview_interval", "checkpoint_interval"), 1)
    workflow("train", tmp_path, **knobs, max_iterations=1).run()
    assert "grown from the covariates [] to ['age']" in caplog.text
    old = torch.load(trained / "models/model.pt", weights_only=True)
    new = torch.load(tmp_path / "models/checkpoint_00000001.pt", weights_only=True)["network"]
    name = "conv_in.conv.weight"
    assert (old[name] - new[name]).abs().max() < 0.01 and set(new) - set(old) == {
        f"class_embedding.parts.0.{part}"
        for part in ("unknown", "first.weight", "first.bias", "second.weight", "second.bias")
    }
    workflow("train", tmp_path, **knobs, max_iterations=2, resume=True).run()  # the same command with --resume true
    assert (tmp_path / "models/checkpoint_00000002.pt").exists()


def test_classes_of_version_0_4_are_sampled_by_their_name(cohort, tmp_path):
    """Its files say class_names and nothing of covariates."""
    for i, path in enumerate(sorted(cohort.glob("*.nii.gz"))):
        place = tmp_path / "scans" / ("bright", "dark")[i % 2] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    short = dict.fromkeys(("max_iterations", "val_interval", "preview_interval", "checkpoint_interval"), 1)
    knobs = {"dataset_dir": str(tmp_path / "scans"), "class_names": ["bright", "dark"], "norm_num_groups": 4}
    workflow("train", tmp_path / "out", **knobs, **short, val_fraction=0.3).run()
    model = tmp_path / "out/models/model.pt"
    torch.save(dict(torch.load(model, weights_only=True)), model)  # without what this version writes into it
    description = json.loads(model.with_suffix(".json").read_text())
    description.pop("covariates", None)
    model.with_suffix(".json").write_text(json.dumps(description))
    done = sample(
        model, tmp_path / "samples", class_label="dark", num_samples=1, num_inference_steps=2, norm_num_groups=4
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples/dark/sample_seed0_volume000.nii.gz").exists()
