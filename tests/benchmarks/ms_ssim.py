"""Time pair-wise MS-SSIM (protocol monai) against a loop over MONAI's MultiScaleSSIMMetric, in one run.

    python tests/benchmarks/ms_ssim.py                                   # 64 random phantoms of 64^3
    python tests/benchmarks/ms_ssim.py --volumes folder_of_nifti         # preprocessed as in configs/train.json
    python tests/benchmarks/ms_ssim.py --volumes volumes.npy             # (N, *spatial) in [-1, 1]

The loop takes one pair at a time, as a user of the metric would write it; its volumes are float32 tensors from the
start. Ours starts from the array and includes all it computes. The values of all pairs are compared before any time is
printed; the script fails if they differ by more than 1e-5. The two take turns, chunk by chunk, so that other work on
the machine disturbs both alike. Mean MS-SSIM by every protocol is printed too.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from monai.bundle import ConfigParser  # noqa: E402
from monai.metrics import MultiScaleSSIMMetric  # noqa: E402
from monai.transforms import Compose  # noqa: E402
from tqdm import tqdm  # noqa: E402

from scripts.evaluation.ms_ssim import PROTOCOLS, ms_ssim_pairs, protocol_for, random_pairs  # noqa: E402
from scripts.running.files import write_atomically  # noqa: E402
from scripts.scans.phantoms import shepp_logan_phantom  # noqa: E402

TOLERANCE = 1e-5


def load(source: str | None, side: int, number: int) -> np.ndarray:
    """(N, *spatial) float16 or float32 in [-1, 1]."""
    if source is None:
        heads = (shepp_logan_phantom([side] * 3, (0, i)) for i in tqdm(range(number), desc="phantoms", unit="volume"))
        return np.stack([(2 * head - 1).astype(np.float16) for head in heads])
    if source.endswith(".npy"):
        return np.load(source)
    files = sorted(glob.glob(os.path.join(glob.escape(source), "**", "*.nii*"), recursive=True))
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs" / "train.json"))
    parser["spatial_shape"] = [side] * 3
    transform = Compose(parser.get_parsed_content("deterministic_transforms"))
    volumes = [transform({"image": file})["image"][0] for file in tqdm(files, desc="preprocessing", unit="volume")]
    return np.stack([volume.numpy().astype(np.float16) for volume in volumes])


def hardware() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def naive(tensors: torch.Tensor, pairs: np.ndarray, metric: MultiScaleSSIMMetric) -> np.ndarray:
    return np.array([metric(tensors[i : i + 1], tensors[j : j + 1]).item() for i, j in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", help="folder of NIfTI files or .npy file; without it, random phantoms")
    parser.add_argument("--side", type=int, default=64, help="voxels along each side of phantoms and NIfTI volumes")
    parser.add_argument("--num_volumes", type=int, default=64, help="number of phantoms")
    parser.add_argument("--num_pairs", type=int, default=1000, help="random distinct pairs; all are timed by both")
    parser.add_argument("--output", help="JSON file that receives the result")
    arguments = parser.parse_args()

    volumes = load(arguments.volumes, arguments.side, arguments.num_volumes)
    shape = volumes.shape[1:]
    pairs = random_pairs(len(volumes), arguments.num_pairs)
    protocol = protocol_for("monai", shape)
    metric = MultiScaleSSIMMetric(
        len(shape), data_range=2, kernel_size=protocol.window.kernel_size, weights=protocol.exponents
    )
    tensors = torch.as_tensor(volumes).float()[:, None]

    warm_up = pairs[:2]
    naive(tensors, warm_up, metric), ms_ssim_pairs(volumes, None, warm_up, "monai")
    # Ours in as many whole runs as the loop has parts; the middle one counts, so that the two see the same machine.
    parts = np.array_split(np.arange(len(pairs)), min(5, len(pairs)))
    naive_seconds, our_seconds, expected, ours = 0.0, [], [], None
    for part in tqdm(parts, desc="naive loop and ours, taking turns", unit="part"):
        start = time.perf_counter()
        expected.append(naive(tensors, pairs[part], metric))
        naive_seconds += time.perf_counter() - start
        start = time.perf_counter()
        ours = ms_ssim_pairs(volumes, None, pairs, "monai")
        our_seconds.append(time.perf_counter() - start)
    difference = float(np.abs(ours - np.concatenate(expected)).max())
    if not difference <= TOLERANCE:
        sys.exit(f"values differ by {difference:.2e}, more than {TOLERANCE}; times mean nothing")

    middle = float(np.median(our_seconds))
    result = {
        "hardware": hardware(),
        "torch": torch.__version__,
        "volumes": len(volumes),
        "shape": list(shape),
        "pairs": len(pairs),
        "protocol": protocol.note,
        "max_difference": difference,
        "naive_seconds": round(naive_seconds, 2),
        "our_seconds": [round(seconds, 2) for seconds in our_seconds],
        "ratio": round(naive_seconds / middle, 2),
        "ratio_to_slowest": round(naive_seconds / max(our_seconds), 2),
        "mean_ms_ssim": {name: float(ms_ssim_pairs(volumes, None, pairs, name).mean()) for name in PROTOCOLS},
    }
    print(f"{result['hardware']}, torch {torch.__version__}")
    print(f"{len(pairs)} pairs of {len(volumes)} volumes of {shape}; {protocol.note}; equal to {difference:.1e}")
    print(
        f"loop over MultiScaleSSIMMetric {naive_seconds:.1f} s, ours {middle:.1f} s (median of {len(our_seconds)} runs)"
    )
    print(f"ratio {result['ratio']} (against our slowest run {result['ratio_to_slowest']})")
    for name, mean in result["mean_ms_ssim"].items():
        print(f"mean MS-SSIM, {name}: {mean:.4f}")
    if arguments.output:
        write_atomically(arguments.output, lambda path: Path(path).write_text(json.dumps(result, indent=2) + "\n"))


if __name__ == "__main__":
    main()
