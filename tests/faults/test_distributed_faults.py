"""One of two processes fails in each of several ways: all end, with its message, or go on together."""

import csv
import json
import signal

import pytest
from conftest import ROOT, run_bundle, run_two, table, train, train_two

pytestmark = pytest.mark.slow
LONGER = {"max_iterations": 20, "batch_size": 4, "val_interval": 10, "preview_interval": 20, "checkpoint_interval": 5}


@pytest.fixture(scope="module")
def undisturbed(cohort, tmp_path_factory):
    """Losses of one process."""
    output = tmp_path_factory.mktemp("one")
    done = train(cohort, output, amp="float32", **LONGER)
    assert done.returncode == 0, done.stderr
    return [float(row["loss"]) for row in table(output / "loss.csv")]


def with_fault(cohort, output, iteration, launcher=("--standalone",), what=None, **options):
    overlay = output / "fault.json"
    fault = {"_target_": "injected.Fault", "what": what, "iteration": iteration}
    overlay.write_text(json.dumps({"+train#handlers": [fault]}))
    env = {"PYTHONPATH": str(ROOT / "tests/faults")} | options.pop("env", {})
    knobs = {"amp": "float32"} | LONGER | options
    return train_two(cohort, output, [str(overlay)], launcher=launcher, env=env, **knobs)


def test_twenty_steps_are_those_of_one_process(cohort, undisturbed, tmp_path):
    done = train_two(cohort, tmp_path, amp="float32", **LONGER)
    assert done.returncode == 0, done.stderr
    assert [float(row["loss"]) for row in table(tmp_path / "loss.csv")] == pytest.approx(undisturbed, abs=1e-4)


def test_gradients_that_are_added_up_go_round_once(cohort, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, run in ((one, train), (two, train_two)):
        done = run(cohort, folder, amp="float32", accumulation_steps=2, **LONGER | {"checkpoint_interval": 10})
        assert done.returncode == 0, done.stderr
    losses, expected = ([float(row["loss"]) for row in table(folder / "loss.csv")] for folder in (two, one))
    assert losses == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("what", [{"0": "error"}, {"1": "error"}, {"0": "wait", "1": "error"}])
def test_an_error_of_one_process_ends_all_with_its_message(what, cohort, tmp_path):
    done = with_fault(cohort, tmp_path, 3, what=what)  # the subprocess has a limit, and "wait" is as long
    rank = max(rank for rank, kind in what.items() if kind == "error")
    assert done.returncode == 1
    assert f"error: rank {rank} failed: RuntimeError: an injected error" in done.stderr
    assert done.stderr.count("RuntimeError: an injected error\n") <= 3  # not a traceback from each


def test_a_killed_process_ends_all(cohort, tmp_path):
    done = with_fault(cohort, tmp_path, 3, what={"1": "kill"})
    assert done.returncode == 1 and "Signal 9 (SIGKILL)" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_that_is_ended_leaves_a_checkpoint(number, cohort, undisturbed, tmp_path):
    options = {"max_iterations": 1000, "val_interval": 1000, "preview_interval": 1000, "checkpoint_interval": 1000}
    done = with_fault(cohort, tmp_path, 3, what={"0": number}, **options)  # returns when all processes have ended
    assert done.returncode != 0
    assert "stopped by SIGTERM after iteration" in done.stdout + done.stderr, done.stderr
    stopped = len(table(tmp_path / "loss.csv"))
    assert 3 <= stopped < 1000 and list(tmp_path.glob(f"models/checkpoint_{stopped:08d}.pt"))
    done = train_two(
        cohort, tmp_path, amp="float32", resume="true", **LONGER | {"max_iterations": max(20, stopped + 1)}
    )
    assert done.returncode == 0, done.stderr
    losses = [float(row["loss"]) for row in table(tmp_path / "loss.csv")]
    assert losses[:20] == pytest.approx(undisturbed, abs=1e-4)


@pytest.mark.parametrize("store", [{}, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}])
def test_torchrun_starts_anew_from_the_newest_checkpoint(store, cohort, undisturbed, tmp_path):
    launcher = ["--standalone", "--max-restarts=1"]
    done = with_fault(cohort, tmp_path, 13, launcher, what={"1": "error"}, env=store)
    assert done.returncode == 0, done.stderr
    assert "resumed after iteration 10" in done.stdout
    assert not list(tmp_path.glob("models/previous_*"))
    assert [float(row["loss"]) for row in table(tmp_path / "loss.csv")] == pytest.approx(undisturbed, abs=1e-4)


def test_all_processes_go_back_from_a_surge_that_one_sees(cohort, tmp_path):
    # it goes back to a checkpoint from before the newest 21 losses
    options = {"max_iterations": 40, "surge_retries": 1, "checkpoints_kept": 10}
    done = with_fault(cohort, tmp_path, 33, what={"1": "nan"}, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going back to") == 1 and "checkpoint_00000010.pt" in done.stdout
    assert len(table(tmp_path / "loss.csv")) == 40
    assert {row["surge"] for row in table(tmp_path / "surges.csv")} == {"1"}


def test_two_processes_evaluate_as_one_does(cohort, tmp_path):
    knobs = {"config_file": "configs/evaluate.json", "real_dir": cohort, "synthetic_dirs": cohort, "num_pairs": 12}
    knobs |= {"spatial_shape": "[16,16,16]", "num_workers": 0, "brain_extraction": "false"}
    one, two = tmp_path / "one", tmp_path / "two"
    runs = (
        run_bundle("run", output_dir=one, **knobs),
        run_two("run", overlays=["configs/multi_gpu_evaluate.json"], output_dir=two, **knobs),
    )
    for done in runs:
        assert done.returncode == 0, done.stderr
    assert (one / "metrics.json").read_bytes() == (two / "metrics.json").read_bytes()
    assert (two / "report.html").exists()


def test_mlflow_keeps_one_run_of_two_processes(cohort, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    done = train_two(cohort, tmp_path, tracking="configs/mlflow.json")
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns.db")
    (run,) = client.search_runs(client.get_experiment_by_name("brain_mri_ddpm_3d").experiment_id)
    with open(tmp_path / "loss.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert [m.value for m in client.get_metric_history(run.info.run_id, "train_loss")] == losses
