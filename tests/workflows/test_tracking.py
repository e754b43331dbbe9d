"""Training, sampling and evaluation as MLflow (a real SQLite store) and Weights & Biases (offline) keep them."""

import ast
import csv
import json
import struct
import sys

import pytest
from conftest import ROOT, TINY_NETWORK, TINY_TRAINING, train
from monai.bundle import create_workflow

mlflow = pytest.importorskip("mlflow", reason="pip install -r requirements-dev.txt")
SETTINGS = str(ROOT / "configs/mlflow.json")
EXPERIMENTS = {"mlflow": "monai_experiment", SETTINGS: "brain_mri_ddpm_3d"}


def uri(folder):
    return f"sqlite:///{folder}/mlruns.db"


def the_run(folder, experiment):
    """The only run of an experiment in the store of `folder`; {metric: {step: value}}; {artifact: its path}."""
    client = mlflow.MlflowClient(tracking_uri=uri(folder))
    (run,) = client.search_runs(client.get_experiment_by_name(experiment).experiment_id)
    assert run.info.status == "FINISHED"
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    artifacts = {path.name: path for path in folder.glob(f"mlruns/{run.info.run_id}/artifacts/*")}
    return run, {name: {m.step: m.value for m in history} for name, history in histories.items()}, artifacts


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_here(monkeypatch, config, **knobs):
    """A workflow of the bundle in this process, whose hook for uncaught errors is put back at the end."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    knobs = {"bundle_root": str(ROOT), "logging_file": False, "device": "cpu"} | knobs
    create_workflow(config_file=str(ROOT / f"configs/{config}.json"), **knobs).run()


def losses_of(output):
    """{metric: {iteration: value}} by loss.csv and validation.csv."""
    expected = {"train_loss": {int(row["iteration"]): float(row["loss"]) for row in table(output / "loss.csv")}}
    for row in table(output / "validation.csv"):
        for column in ("loss", *(f"loss_quarter_{i}" for i in (1, 2, 3, 4))):
            name = f"validation_{row['weights']}/{column}"
            expected.setdefault(name, {})[int(row["iteration"])] = float(row[column])
    return expected


@pytest.fixture(scope="module")
def tracked(cohort, tmp_path_factory):
    """A training run that both MLflow, by MONAI's own settings, and Weights & Biases keep."""
    pytest.importorskip("wandb", reason="pip install -r requirements-dev.txt")
    output = tmp_path_factory.mktemp("tracked")
    configs = "['configs/train.json','configs/presets/wandb.json']"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        done = train(cohort, output, config_file=configs, tracking="mlflow")
    assert done.returncode == 0, done.stderr
    return output


def test_mlflow_has_the_losses_of_the_csv_files_by_iteration(tracked):
    run, metrics, _ = the_run(tracked, EXPERIMENTS["mlflow"])
    expected = losses_of(tracked)
    assert metrics["train_loss"] == expected["train_loss"]  # every digit
    for name in expected:
        if name.startswith("validation_ema"):
            assert metrics[name] == pytest.approx(expected[name], abs=1e-6)
    assert metrics["lr_group_0"] == dict.fromkeys(range(1, 7), 0.001)
    assert run.data.params == {"max_epochs": "2", "epoch_length": "3"}


def records(path):
    """The messages of a .wandb file: a header of 7 bytes, then a LevelDB log of blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(message)
            message = b""


def test_weights_and_biases_has_them_too_with_parameters_and_previews(tracked):
    (path,) = tracked.glob("wandb/offline-run-*/*.wandb")
    found, config, project = {}, {}, None
    for record in records(path):
        if record.HasField("run"):
            project = record.run.project
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            found.setdefault(name, {})[row.get("global_step")] = value
    for name, values in losses_of(tracked).items():
        assert found[name] == pytest.approx(values, abs=1e-6)
    assert project == "brain_mri_ddpm_3d" and config["learning_rate"] == 0.001 and config["channels"] == [8, 8]
    assert list(path.parent.glob("files/media/images/*.png"))


def test_the_bundles_settings_go_on_with_a_run_and_add_parameters_raw_weights_and_pictures(
    cohort, tmp_path, monkeypatch
):
    client = mlflow.MlflowClient(tracking_uri=uri(tmp_path))
    experiment = client.create_experiment("brain_mri_ddpm_3d", (tmp_path / "mlruns").as_uri())
    stopped = client.create_run(experiment, run_name="mine").info.run_id
    client.log_param(stopped, "batch_size", "2")
    knobs = {key: ast.literal_eval(value) for key, value in TINY_TRAINING.items()}
    knobs |= {"max_iterations": 3, "val_interval": 3, "preview_interval": 3, "preview_steps": 2}
    places = {"dataset_dir": str(cohort), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path / "models")}
    run_here(monkeypatch, "train", tracking=SETTINGS, run_name="mine", **knobs, **places)
    run, metrics, artifacts = the_run(tmp_path, EXPERIMENTS[SETTINGS])
    assert run.info.run_id == stopped
    assert set(metrics) == {*losses_of(tmp_path), "lr_group_0"}
    assert {"seed", "spatial_shape", "prediction_type", "learning_rate", "max_iterations"} <= set(run.data.params)
    assert run.data.params["batch_size"] == "2" and run.data.params["channels"] == "[8, 8]"
    (config,) = tmp_path.glob("config_*.json")
    assert set(artifacts) == {config.name, "loss_curve.png", "preview_00000003.png"}
    assert json.loads(artifacts[config.name].read_text())["channels"] == [8, 8]


@pytest.mark.parametrize("tracking", ["mlflow", SETTINGS], ids=["monai", "bundle"])
def test_sampling_is_kept_with_its_config(trained, tmp_path, monkeypatch, tracking):
    knobs = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()}
    knobs |= {"ckpt_path": str(trained / "models/model.pt"), "num_samples": 1, "num_inference_steps": 2}
    # MONAI 1.6.1 does not find its config again below a plain path, only below an expression
    output = f"$'{tmp_path}'" if tracking == "mlflow" else str(tmp_path)
    run_here(monkeypatch, "inference", tracking=tracking, output_dir=output, **knobs)
    run, _, artifacts = the_run(tmp_path, EXPERIMENTS[tracking])
    (config,) = tmp_path.glob("config_*.json")
    assert set(artifacts) == ({config.name} if tracking == "mlflow" else {config.name, "mosaic.png"})
    assert json.loads(artifacts[config.name].read_text())["num_inference_steps"] == 2
    assert run.data.params["epoch_length"] == "1"
    if tracking == SETTINGS:
        assert run.data.params["num_inference_steps"] == "2" and run.data.params["seed"] == "0"


def test_every_number_of_an_evaluation_is_kept(cohort, tmp_path, monkeypatch):
    knobs = {"spatial_shape": [16, 16, 16], "num_pairs": 3, "num_workers": 0, "max_volumes": 4, "seed": 5}
    places = {"real_dir": str(cohort), "synthetic_dirs": {"ours 1": str(cohort)}, "output_dir": str(tmp_path)}
    for tracking, experiment in EXPERIMENTS.items():  # the second takes what the first has measured
        run_here(monkeypatch, "evaluate", tracking=tracking, **knobs, **places)
        run, metrics, artifacts = the_run(tmp_path, experiment)
        expected = {}
        for row in table(tmp_path / "metrics.csv"):
            for name, value in row.items():
                if value and name not in ("model", "volumes") and not name.endswith(("_low", "_high")):
                    expected[f"{row['model'].replace(' ', '_')}/{name}"] = {1: float(value)}
        assert metrics == expected
        assert {"real/ms_ssim_kwon2019", "ours_1/frechet_pca", "ours_1/flagged"} <= set(metrics)
    newest = max(tmp_path.glob("config_*.json"))
    assert set(artifacts) == {newest.name, "report.html", "metrics.csv"}
    assert artifacts["report.html"].read_text() == (tmp_path / "report.html").read_text()
    assert run.data.params["seed"] == "5"
