"""Data that is damaged, hostile, or goes away while it is read: each ends in a sentence or in the right voxels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mutations
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, bundle_command, quiet

from scripts.running.errors import BundleError
from scripts.scans.find import find_images
from scripts.scans.inspect import examine, readable

TINY = TINY_NETWORK | {
    "batch_size": "2",
    "max_iterations": "100000",
    "checkpoint_interval": "100000",
    "val_interval": "100000",
    "preview_interval": "100000",
}


def training(dataset_dir: Path, output: Path, **overrides: object) -> subprocess.Popen:
    """A training without end, all of whose words land in output/log."""
    output.mkdir()
    knobs = TINY | {"dataset_dir": dataset_dir, "output_dir": output, "ckpt_dir": output / "models"} | overrides
    command = bundle_command("run", "training", config_file="configs/train.json", **knobs)
    with open(output / "log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=quiet(), stdout=log, stderr=subprocess.STDOUT)


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    start = time.monotonic()
    while not condition():
        assert process.poll() is None and time.monotonic() - start < seconds, "the training has not got so far"
        time.sleep(0.1)


def steps(output: Path) -> int:
    path = output / "loss.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def last_words(output: Path) -> str:
    """The sentence that the training ended with, and nothing of a traceback."""
    log = (output / "log").read_text()
    assert log.count("error: ") == 1 and "Traceback" not in log, log
    return log.split("error: ", 1)[1].split("\n")[0]


def children(pid: int) -> list[int]:
    """Process ids whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


# damaged and hostile files


@pytest.mark.slow
def test_each_mutated_file_is_refused_by_name_or_has_the_right_voxels(tmp_path):
    """With 2 GiB of memory beyond the imports, in one process: a crash or a hang would end it."""
    mutations.write_all(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import mutations; mutations.main({str(tmp_path)!r})"],
        env=dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests/faults'}", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    *lines, memory = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == list(mutations.MUTATIONS) and len(lines) >= 50
    for line in lines:
        if line["name"] in mutations.RIGHT:
            assert line["problem"] == "" and line["same"], line
        else:
            assert (
                "expected" in line["problem"]
                or "cannot be read" in line["problem"]
                or ("cannot be inverted" in line["problem"])
            ), line
    assert memory["peak_mb"] < 1500


SMALL = [name for name in mutations.MUTATIONS if not name.startswith(("bomb", "claims", "huge"))]


def test_the_small_mutations_are_refused_together_and_the_right_ones_remain(tmp_path):
    for name in SMALL:
        (tmp_path / name).write_bytes(mutations.MUTATIONS[name]())
    with pytest.raises(BundleError) as error:
        readable(find_images(str(tmp_path)))
    refused = {name for name in SMALL if f"/{name}'" in str(error.value)}
    assert refused == set(SMALL) - mutations.RIGHT and len(refused) > 40
    good = [Path(item["image"]).name for item in readable(find_images(str(tmp_path)), skip_bad_files=True)]
    assert sorted(good) == sorted(mutations.RIGHT)


@pytest.mark.parametrize("seed", range(50))
def test_a_flipped_bit_of_a_compressed_file_is_found_or_harmless(seed, tmp_path):
    """An uncompressed file has no checksum: there a flipped bit of a voxel cannot be told from the truth."""
    path = tmp_path / "a.nii.gz"
    path.write_bytes(mutations.flipped(mutations.GZ, 1000 + seed))
    if examine(str(path)).problem == "":
        image = nib.load(path)
        assert np.array_equal(image.dataobj, mutations.VOXELS) and np.array_equal(image.affine, mutations.AFFINE)


# data that goes away


@pytest.fixture
def copies(cohort, tmp_path) -> Path:
    """The cohort of the session in a folder of its own."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in cohort.glob("*.nii.gz"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("cache, num_workers", [("none", 0), ("none", 2)])
@pytest.mark.parametrize("damage", ["vanished", "torn"])
def test_a_file_that_goes_away_while_a_training_runs_is_named(cache, num_workers, damage, copies, tmp_path):
    output = tmp_path / "output"
    process = training(copies, output, cache=cache, num_workers=num_workers)
    try:
        wait_for(lambda: steps(output) > 5, process)
        for path in copies.iterdir():  # each is read within a few steps
            path.unlink() if damage == "vanished" else path.write_bytes(path.read_bytes()[:300])
        assert process.wait(120) == 1
        words = last_words(output)
        assert words.startswith(f"'{copies}") and "cannot be read now" in words
        assert ("no such file any more" in words) == (damage == "vanished")
    finally:
        process.kill()


@pytest.mark.slow
def test_a_loader_process_that_is_killed_is_named(copies, tmp_path):
    output = tmp_path / "output"
    process = training(copies, output, cache="none", num_workers=2)
    try:
        wait_for(lambda: steps(output) > 5, process)
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)  # as the kernel does where memory runs out
        assert process.wait(120) == 1
        words = last_words(output)
        assert words.startswith("num_workers: a loader process has died") and str(workers[0]) in words
        assert "memory ran out" in words
    finally:
        process.kill()


FILL = """
import sys
sys.path[:0] = {paths!r}
from conftest import preprocessing
from scripts.scans.find import find_images
from scripts.scans.datasets import VolumeDataset
dataset = VolumeDataset(find_images({scans!r}), preprocessing(), None, "disk", {cache!r})
print("ready", flush=True)
sys.stdin.readline()
for _ in range({rounds}):
    for i in range(len(dataset)):
        print(float(dataset[i]["image"].double().sum()), flush=True)
"""


def filling(scans: Path, cache: Path, rounds: int = 1) -> subprocess.Popen:
    """A process that preprocesses all scans into a disk cache, once it gets a line."""
    code = FILL.format(
        paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/scans")],
        scans=str(scans),
        cache=str(cache),
        rounds=rounds,
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], **pipes)


@pytest.mark.slow
def test_processes_share_a_disk_cache_and_a_kill_leaves_it_whole(copies, tmp_path):
    """Two fill one folder at once; a third is killed at random moments of filling it, again and again."""
    cache = tmp_path / "cache"
    both = [filling(copies, cache) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    answers = [process.communicate("\n")[0].split() for process in both]
    assert len(answers[0]) == 6 and answers[0] == answers[1]
    files = sorted(cache.rglob("*.*"))
    assert len(files) == 6 and {path.suffix for path in files} == {".pt"}
    expected = [torch.load(path, weights_only=True)["image"] for path in files]

    generator = np.random.default_rng(0)
    for _ in range(5):
        for path in files[:3]:
            path.unlink(missing_ok=True)
        process = filling(copies, cache)
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(generator.uniform(0, 0.2))
        process.kill()
        process.wait()
        for path in cache.rglob("*.pt"):
            assert torch.equal(torch.load(path, weights_only=True)["image"], expected[files.index(path)])
    last = filling(copies, cache)
    last.stdout.readline()
    assert last.communicate("\n")[0].split() == answers[0]
