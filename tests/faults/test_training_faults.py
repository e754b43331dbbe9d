"""Training is killed, stopped, given full disks and wrong clocks; nothing is lost. See docs/robustness.md."""

import os
import random
import signal

import pytest
import torch
from conftest import TINY_TRAINING
from harness import checkpoint_iterations, lost, rows, sentence, small_disk, start, table

WORKERS = {"num_workers": 2}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def train(cohort, output, resume=True, die_at=0, clock=None, **knobs):
    places = {"dataset_dir": cohort, "output_dir": output, "ckpt_dir": output / "models", "resume": resume}
    knobs = {"config_file": "configs/train.json"} | TINY_TRAINING | places | knobs
    return start(output, "run", "training", die_at=die_at, clock=clock, **knobs)


@pytest.fixture(scope="module")
def undisturbed(cohort, tmp_path_factory):
    """Output folder of a whole run, and how many changes to files it made."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run = train(cohort, output)
    assert run.wait() == 0, run.text()
    return output, run.changes.value


def at_random(run, rng):
    """Wait for a random moment of a run: between start-up and some time after one of its six iterations."""
    wanted = rng.randint(0, 6)
    if wanted:
        run.until(lambda: len(rows(run.output / "loss.csv")) >= wanted)
    delay = rng.uniform(0, 0.5 if wanted else 5)
    run.process.join(delay)
    return f"{delay:.2f} s after " + (f"iteration {wanted}" if wanted else "the start")


def killed(cohort, undisturbed, output, seed):
    """One run that is killed at a random moment, and its resume; returns what was done and what was lost."""
    reference, changes = undisturbed
    rng = random.Random(seed)
    knobs = {"num_workers": rng.choice((0, 2)), "cache": rng.choice(("memory", "disk"))}
    if seed % 2:
        moment = rng.randint(1, changes)
        run, when = train(cohort, output, die_at=moment, **knobs), f"before change {moment} of {changes} to its files"
    else:
        run = train(cohort, output, **knobs)
        when = at_random(run, rng)
        run.send(signal.SIGKILL)
    status = run.wait()
    done = {"when": when, "killed": status == -signal.SIGKILL, "rows": len(rows(output / "loss.csv"))}
    done |= knobs | {"checkpoints": checkpoint_iterations(output / "models")}
    run = train(cohort, output, **knobs)
    assert run.wait() == 0, run.text()
    return done | {"lost": lost(output, reference)}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_training_loses_nothing(cohort, undisturbed, tmp_path, seed):
    assert killed(cohort, undisturbed, tmp_path / "run", seed)["lost"] == []


@pytest.mark.slow
def test_twenty_killed_trainings_lose_nothing(cohort, undisturbed, tmp_path):
    kills, seed = 0, 2
    while kills < 20:  # one that came too late does not count
        seed += 1
        done = killed(cohort, undisturbed, tmp_path / str(seed), seed)
        table(os.environ.get("FAULT_TABLE"), "kill -9 of training", [done])
        assert done["lost"] == [], done
        kills += done["killed"]


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_comes_to_the_same_end(cohort, undisturbed, tmp_path):
    rng, output, kills = random.Random(0), tmp_path / "run", 0
    for _ in range(40):
        run = train(cohort, output, die_at=rng.randint(1, undisturbed[1]))
        if run.wait() == 0:
            break
        kills += 1
    assert kills and run.wait() == 0 and lost(output, undisturbed[0]) == []


@pytest.mark.slow
def test_a_kill_between_a_checkpoint_and_its_weights_leaves_no_mixed_pair(cohort, undisturbed, tmp_path):
    """The last checkpoint is there, its model.pt is not; and a run of another kind had left its own model.pt."""
    output = tmp_path / "run"
    (output / "models").mkdir(parents=True)
    for name in ("model.pt", "model.json"):
        (output / "models" / name).write_bytes((undisturbed[0] / "models" / name).read_bytes())
    run = train(cohort, output, resume=False, prediction_type="sample")
    run.until(lambda: checkpoint_iterations(output / "models"))
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    described = (output / "models/model.json").read_text()
    if (output / "models/model.pt").exists():
        ours, theirs = (torch.load(p / "models/model.pt", weights_only=True) for p in (output, undisturbed[0]))
        old = all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert ("epsilon" in described) == old
    run = train(cohort, output, prediction_type="sample")
    assert run.wait() == 0, run.text()
    newest = torch.load(output / "models/checkpoint_00000006.pt", weights_only=True)
    model = torch.load(output / "models/model.pt", weights_only=True)
    assert all(torch.equal(model[name], newest["ema"][name]) for name in model)
    assert '"sample"' in (output / "models/model.json").read_text()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), slow(signal.SIGINT, 130)])
def test_a_training_that_is_told_to_stop_does_so_with_a_checkpoint(cohort, undisturbed, tmp_path, number, status):
    """The signal goes to all processes of the job, its loader's workers too, as SLURM and a terminal send it."""
    output, wanted = tmp_path / "run", random.Random(number).randint(1, 4)
    run = train(cohort, output, **WORKERS)
    run.until(lambda: len(rows(output / "loss.csv")) >= wanted)
    run.send(number, group=True)
    assert run.wait() == status, run.text()
    done = len(rows(output / "loss.csv"))
    assert wanted <= done < 6 and checkpoint_iterations(output / "models")[-1] == done
    said = run.text()
    assert f"after iteration {done} (exit status {status})" in said and "--resume true" in said
    assert "Traceback" not in said
    run = train(cohort, output)
    assert run.wait() == 0, run.text()
    assert lost(output, undisturbed[0]) == []


@pytest.mark.slow
def test_trainings_that_are_told_to_stop_at_random_moments_lose_nothing(cohort, undisturbed, tmp_path):
    stops, seed = 0, 0
    while stops < 10:  # one that came before the first iteration, or after the last, does not count
        seed += 1
        rng, output = random.Random(seed), tmp_path / str(seed)
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        run = train(cohort, output, **WORKERS)
        when = at_random(run, rng)
        run.send(number, group=True)
        status, stopped, said = run.wait(), len(rows(output / "loss.csv")), run.text()
        run = train(cohort, output)
        assert run.wait() == 0, run.text()
        done = {"signal": number, "when": when, "status": status, "rows": stopped, "lost": lost(output, undisturbed[0])}
        table(os.environ.get("FAULT_TABLE"), "SIGTERM or Ctrl-C of training", [done])
        assert done["lost"] == []
        assert status in (128 + number, 0) or stopped == 0  # before the first step there is nothing to keep
        assert "a loader process has died" not in said
        stops += status == 128 + number


def test_a_training_ends_before_its_time_limit(cohort, tmp_path):
    output = tmp_path / "run"
    run = train(cohort, output, time_limit=0.1, max_iterations=100000, val_interval=1000, preview_interval=1000)
    assert run.wait() == 75, run.text()
    done = len(rows(output / "loss.csv"))
    assert "stopped by time_limit" in run.text()
    assert not done or checkpoint_iterations(output / "models")[-1] == done  # on a slow machine it does not even begin


def test_a_second_run_on_the_folder_of_another_is_told(cohort, undisturbed, tmp_path):
    output = tmp_path / "run"
    first = train(cohort, output, **WORKERS)
    first.until(lambda: (output / "loss.csv").exists())
    said = sentence(train(cohort, tmp_path / "other", resume=False, ckpt_dir=output / "models"))
    assert "ckpt_dir: another run is writing" in said and f"process {first.process.pid} on" in said
    assert first.wait() == 0, first.text()
    assert lost(output, undisturbed[0]) == []


@pytest.mark.parametrize("size, kept", [("800k", []), slow("1900k", [2]), ("2200k", [2, 4]), slow("2700k", [2, 4])])
def test_a_full_disk_ends_a_training_with_a_sentence_and_leaves_what_was_there(
    cohort, undisturbed, tmp_path, size, kept
):
    """A checkpoint is 896 KiB, model.pt 222. The first disk is refused at once; one is full between the two files."""
    output = tmp_path / "disk"
    with small_disk(output, size) as disk:
        said = sentence(train(cohort, output))
        assert checkpoint_iterations(output / "models") == kept
        assert ("No space left on device" if kept else "a checkpoint with its model.pt takes") in said, said
        assert not list(output.rglob("*.partial"))
        disk.remount("size=100m")
        run = train(cohort, output)
        assert run.wait() == 0, run.text()
        assert lost(output, undisturbed[0]) == []


@pytest.mark.parametrize("size", [slow("20k"), "28k", slow("64k")])
def test_a_full_disk_of_records_ends_a_training_with_a_sentence(cohort, undisturbed, tmp_path, size):
    output = tmp_path / "disk"
    with small_disk(output, size) as disk:
        said = sentence(train(cohort, output, ckpt_dir=tmp_path / "models"))
        assert "No space left on device" in said, said
        disk.remount("size=100m")
        run = train(cohort, output, ckpt_dir=tmp_path / "models")
        assert run.wait() == 0, run.text()
        assert (output / "loss.csv").read_text() == (undisturbed[0] / "loss.csv").read_text()


def test_a_folder_that_is_read_only_is_refused_before_any_work(cohort, tmp_path):
    with small_disk(tmp_path / "disk", "10m") as disk:
        disk.remount("ro")
        said = sentence(train(cohort, tmp_path / "disk"))
        assert "output_dir: nothing can be written" in said and "Read-only file system" in said


def test_a_clock_that_jumps_changes_nothing(cohort, undisturbed, tmp_path):
    """It jumps by months at each look, and the files of the scans come from the future."""
    output = tmp_path / "run"
    for path in cohort.glob("*"):
        os.utime(path, (4e9, 4e9))
    run = train(cohort, output, clock="jumping", cache="disk", die_at=undisturbed[1] - 5)
    assert run.wait() == -signal.SIGKILL
    run = train(cohort, output, clock="jumping", cache="disk", time_limit=60)
    assert run.wait() == 0, run.text()
    assert lost(output, undisturbed[0]) == []
