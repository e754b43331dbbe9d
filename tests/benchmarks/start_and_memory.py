"""What a long training needs on Linux: seconds from the command to its first iteration, and memory after 1,000 of them.

    python tests/benchmarks/start_and_memory.py FOLDER [FILES]

prints the figures of docs/robustness.md, with 10,000 FILES unless told otherwise. Everything goes into FOLDER, which it
makes.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from scripts.scans.phantoms import phantom_cohort  # noqa: E402

TINY = (
    "--spatial_shape [16,16,16] --channels [8,8] --attention_levels [False,True] --num_head_channels [0,8] "
    "--norm_num_groups 8 --num_train_timesteps 10 --amp float32 --preview_interval 100000"
).split()


def training(dataset_dir, output, *options):
    """A training in the background; what it prints goes to a file beside its output."""
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json", *TINY]
    command += ["--dataset_dir", str(dataset_dir), "--output_dir", str(output), "--ckpt_dir", str(output / "models")]
    with open(f"{output}.log", "a") as log:
        return subprocess.Popen([*command, *options], cwd=ROOT, stdout=log, stderr=log)


def reach(process, output, iteration):
    """Wait until loss.csv has so many rows."""
    path = output / "loss.csv"
    while not path.exists() or path.read_text().count("\n") <= iteration:
        if process.poll() is not None:
            raise SystemExit(f"it ended with {process.returncode}, see {output}.log")
        time.sleep(0.02)


def anonymous_memory(pid):
    """MB of a process that no file stands for."""
    return round(int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024)


def held(process, output, iteration, workers):
    """Memory of a training and of its loader processes: the least in 20 iterations, each of which frees some."""
    readings = []
    for i in range(iteration + 5, iteration + 25):  # the validation and the checkpoint are over
        reach(process, output, i)
        loaders = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[:workers]
        readings.append([anonymous_memory(pid) for pid in (process.pid, *loaders)])
    return np.min(readings, axis=0).tolist()


def start_up(folder, files):
    scans = folder / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    for i in range(files):
        voxels = np.zeros((16, 16, 16), np.uint8)
        voxels[3:13, 3:13, 3:13] = rng.integers(1, 255, (10, 10, 10))
        nib.Nifti1Image(voxels, np.diag([8, 8, 8, 1])).to_filename(scans / f"sub-{i:05d}.nii.gz")
    for cache in ("disk", "memory"):
        for which in ("first", "second"):
            begun = time.monotonic()
            process = training(scans, folder / cache, "--cache", cache, "--max_iterations", "100000")
            reach(process, folder / cache, 1)
            seconds = time.monotonic() - begun
            process.send_signal(signal.SIGTERM)
            process.wait()
            (folder / cache / "loss.csv").unlink()
            print(f"{files} files, cache {cache}, {which} start: {seconds:.1f} s to the first iteration", flush=True)


def memory(folder):
    cohort = phantom_cohort(str(folder / "cohort"), 24, (20, 20, 20), 8.0, seed=1)
    for cache, workers in (("memory", 0), ("disk", 2)):
        output = folder / f"long_{cache}"
        intervals = [f"--{key}_interval=100" for key in ("val", "checkpoint")]
        options = ["--cache", cache, "--num_workers", str(workers), "--max_iterations", "1100"]
        process = training(cohort, output, *intervals, *options)
        for iteration in (100, 500, 1000):
            main, *loaders = held(process, output, iteration, workers)
            print(f"{iteration} iterations, cache {cache}: main {main} MB, loaders {loaders}", flush=True)
        process.wait()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True)  # a new one
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    memory(place)
    start_up(place, int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)
