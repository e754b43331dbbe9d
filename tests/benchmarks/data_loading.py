"""Volumes a second from disk to batch: `VolumeDataset` with each cache, and MONAI's own cached datasets.

    python tests/benchmarks/data_loading.py --side 64 --training_step step.json --output loading.json
    python tests/benchmarks/data_loading.py --volumes FOLDER --num_workers 8

All read the same files (random phantoms, or --volumes) through the transforms of configs/train.json, without and with
the augmentation of configs/presets/few_subjects.json, and hand out batches through a `DataLoader`. MONAI's
`CacheDataset` and `PersistentDataset` get the deterministic and the random transforms in one list, as their users do.
Before any time is taken, the first volume of every dataset is compared with that of a plain `Dataset`. Filling a cache
is timed apart. --training_step names the result of training_step.py, whose step needs batch / seconds volumes a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, hardware, options, read_config, spread, table, write
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.transforms import Compose
from torch.utils.data import DataLoader, RandomSampler

from scripts.scans.datasets import VolumeDataset
from scripts.scans.draws import DrawSampler
from scripts.scans.find import find_images
from scripts.scans.phantoms import phantom_cohort

TOLERANCE = 1e-3  # of values in [-1, 1]: caches hold float16
DATASETS = {  # each with the rival that keeps volumes in the same place
    "Dataset": "Dataset",
    "VolumeDataset none": "Dataset",
    "PersistentDataset": "PersistentDataset",
    "VolumeDataset disk": "PersistentDataset",
    "CacheDataset": "CacheDataset",
    "VolumeDataset memory": "CacheDataset",
}
PRESET = str(ROOT / "configs" / "presets" / "few_subjects.json")


def transforms_of(arguments: argparse.Namespace, augmented: bool) -> tuple[list, list]:
    """The deterministic and the random transforms, made anew."""
    values = vars(arguments) | {"preset": [*arguments.preset, *([PRESET] if augmented else [])]}
    config = read_config("train.json", argparse.Namespace(**values), arguments.set)
    return config.get_parsed_content("deterministic_transforms"), config.get_parsed_content("random_transforms")


def loader_of(name: str, images: list[dict], arguments: argparse.Namespace, augmented: bool, folder: str) -> DataLoader:
    """An endless loader; making it fills the memory caches."""
    steady, random = transforms_of(arguments, augmented)
    options = {"batch_size": arguments.batch, "num_workers": arguments.num_workers}
    if name.startswith("VolumeDataset"):
        cache = name.split()[1]
        threads = max(1, arguments.num_workers)
        dataset = VolumeDataset(images, Compose(steady), Compose(random), cache, f"{folder}/ours", 0, threads)
        return DataLoader(dataset, sampler=DrawSampler(dataset, arguments.batch), **options)
    if name == "CacheDataset":
        dataset = CacheDataset(images, [*steady, *random], num_workers=max(1, arguments.num_workers), progress=False)
    elif name == "PersistentDataset":
        dataset = PersistentDataset(images, [*steady, *random], f"{folder}/monai")
    else:
        dataset = Dataset(images, [*steady, *random])
    return DataLoader(dataset, sampler=RandomSampler(dataset, num_samples=10**7, replacement=True), **options)


def steady_volume(dataset: Dataset | VolumeDataset) -> torch.Tensor:
    """The first volume of a dataset, before its random transforms."""
    if isinstance(dataset, VolumeDataset):
        return dataset.volumes[0]["image"]
    if isinstance(dataset, CacheDataset):
        return dataset._cache[0]["image"]
    if isinstance(dataset, PersistentDataset):
        return dataset._cachecheck(dataset.data[0])["image"]
    steps = dataset.transform.transforms
    last = [type(step).__name__ for step in steps].index("EnsureTyped")  # the last of the deterministic ones
    return Compose(steps[: last + 1])(dataset.data[0])["image"]


def rate_of(loader: DataLoader, seconds: float) -> float:
    """Volumes a second, over the batches that some seconds last, after those that the workers load in advance."""
    stream = iter(loader)
    for _ in range(1 + 2 * loader.num_workers):
        next(stream)
    start, volumes = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        volumes += len(next(stream)["image"])
    return volumes / (time.perf_counter() - start)


def main() -> None:
    parser = options(__doc__.splitlines()[0], side=64, batch=4)
    parser.add_argument("--volumes", help="folder of NIfTI files; without it, random phantoms")
    parser.add_argument("--num_volumes", type=int, default=16, help="number of phantoms")
    parser.add_argument("--file_side", type=int, default=128, help="voxels along each side of a phantom's file")
    parser.add_argument("--num_workers", type=int, default=2, help="processes of a DataLoader")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a turn: many batches")
    parser.add_argument("--training_step", help="JSON file of training_step.py")
    arguments = parser.parse_args()
    result = {"hardware": hardware("cpu"), "arguments": vars(arguments), "variants": []}
    need = None
    if arguments.training_step:
        step = json.loads(Path(arguments.training_step).read_text())
        need = step["arguments"]["batch"] / step["variants"]["ours"]["median"]
        result["needed"] = {"volumes_a_second": need, "side": step["arguments"]["side"]}
    print(result["hardware"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.volumes or phantom_cohort(
            f"{folder}/cohort", arguments.num_volumes, [arguments.file_side] * 3, 192 / arguments.file_side
        )
        images = find_images(source)
        for augmented in (False, True):
            rows, loaders = [], {}
            for name in DATASETS:
                start = time.perf_counter()
                loaders[name] = loader_of(name, images, arguments, augmented, f"{folder}/{augmented}")
                dataset = loaders[name].dataset
                kept = getattr(dataset, "volumes", dataset)
                if isinstance(kept, PersistentDataset):
                    for item in kept.data:
                        kept._cachecheck(item)
                row = {"dataset": name, "augmented": augmented, "seconds_to_fill": time.perf_counter() - start}
                wanted = steady_volume(loaders["Dataset"].dataset).float()
                row["difference"] = float((steady_volume(dataset).float() - wanted).abs().max())
                if not row["difference"] <= TOLERANCE:
                    sys.exit(f"{name}: a volume differs by {row['difference']:.2e}; times mean nothing")
                rows.append(row | {"volumes_a_second": []})
            for i in range(arguments.rounds):
                k = i % len(rows)
                for row in rows[k:] + rows[:k]:
                    row["volumes_a_second"].append(rate_of(loaders[row["dataset"]], arguments.seconds))
            for row in rows:
                row["median"] = statistics.median(row["volumes_a_second"])
                rival = next(r for r in rows if r["dataset"] == DATASETS[row["dataset"]])
                row["ratio"] = row["median"] / statistics.median(rival["volumes_a_second"])
            result["variants"] += rows
            print(f"{'with' if augmented else 'without'} augmentation: done", flush=True)

    lines = []
    for row in result["variants"]:
        words = "few_subjects" if row["augmented"] else "as in train.json"
        cells = [f"{row['seconds_to_fill']:.2f}", spread(row["volumes_a_second"]), DATASETS[row["dataset"]]]
        enough = [f"{row['median'] / need:.1f}"] if need else []
        lines.append([row["dataset"], words, *cells, f"{row['ratio']:.2f}", *enough])
    header = ["dataset", "random transforms", "seconds to fill", "volumes a second", "rival", "times the rival"]
    header += [f"times the need ({need:.2g} a second at {result['needed']['side']}^3)"] if need else []
    print(f"\n{len(images)} files, side {arguments.side}, batch {arguments.batch}, {arguments.num_workers} workers\n")
    print(table(header, lines))
    write(arguments.output, result)


if __name__ == "__main__":
    main()
