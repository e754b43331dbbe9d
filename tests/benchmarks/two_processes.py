"""One process against two on the CPU, a core each: losses of 40 iterations, wall time of sampling 8 volumes.

    python tests/benchmarks/two_processes.py FOLDER

draws docs/distributed.png and prints the figures of docs/distributed.md. Everything else goes into FOLDER.
"""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from scripts.scans.phantoms import phantom_cohort  # noqa: E402

TRAINING = (
    "--spatial_shape [16,16,16] --channels [16,32] --attention_levels [False,True] --num_head_channels [0,32] "
    "--norm_num_groups 16 --max_iterations 40 --batch_size 4 --val_interval 40 --preview_interval 1000 "
    "--preview_steps 5 --preview_samples 2 --amp float32 --num_workers 0"
).split()
SAMPLING = ["--num_samples", "8", "--amp", "float32"]


def run(processes, verb, config, overlay, options):
    """Wall time of a command of the bundle, in seconds, the start of Python included."""
    configs = [f"configs/{config}.json"] + ([f"configs/{overlay}.json"] if processes > 1 else [])
    launcher = [sys.executable, "-m"]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]  # wherever PATH leads
        launcher = [*torchrun, "--standalone", f"--nproc_per_node={processes}", "-m"]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    start = time.monotonic()
    command = [*launcher, "monai.bundle", *verb, "--config_file", str(configs), *options]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - start


def main(folder):
    cohort = phantom_cohort(str(folder / "cohort"), 24, (20, 20, 20), 8.0, seed=1)
    losses, seconds = {}, {}
    # channels_last is a control: one process, the same sums in another order
    for name, n, options in (("one", 1, []), ("two", 2, []), ("control", 1, ["--channels_last", "true"])):
        output = folder / f"training_{name}"
        places = ["--dataset_dir", cohort, "--output_dir", str(output), "--ckpt_dir", str(output / "models")]
        run(n, ["run", "training"], "train", "multi_gpu_train", TRAINING + places + options)
        with open(output / "loss.csv", newline="") as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    for name in ("two", "control"):
        difference = [abs(a - b) for a, b in zip(losses["one"], losses[name], strict=True)]
        first = max(difference[:20])
        print(f"one and {name}: {first:.2g} in 20 iterations, {max(difference):.2g} in {len(difference)}", flush=True)
    difference = [abs(a - b) for a, b in zip(losses["one"], losses["two"], strict=True)]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    iterations = range(1, len(difference) + 1)
    axes.plot(iterations, losses["one"], color="tab:blue", linewidth=4, alpha=0.4, label="1 process")
    axes.plot(iterations, losses["two"], color="black", linewidth=1, linestyle="--", label="2 processes")
    axes.set(xlabel="iteration", ylabel="loss of a batch of 4", title=f"largest difference {max(difference):.1g}")
    axes.legend()
    figure.savefig(ROOT / "docs/distributed.png", dpi=100)
    for n in (1, 2, 2, 1):
        output = ["--output_dir", str(folder / f"samples_{n}_{len(seconds.get(n, []))}")]
        load = os.getloadavg()[0]
        seconds.setdefault(n, []).append(run(n, ["run"], "inference", "multi_gpu_inference", SAMPLING + output))
        print(f"{n} processes: {seconds[n][-1]:.1f} s for 8 volumes (load average {load:.1f} before)", flush=True)
    for path in sorted((folder / "samples_1_0").glob("[!.]*")):
        same = path.read_bytes() == (folder / "samples_2_0" / path.name).read_bytes()
        print(path.name, "the same bytes" if same else "DIFFERS")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
