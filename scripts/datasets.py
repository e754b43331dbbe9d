"""Cached volumes, and samplers that make the data order and every random draw a function of seed and position."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import monai.data
import numpy as np
from monai.data import CacheDataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset, Sampler

from scripts.errors import BundleError
from scripts.files import write_atomically

CACHES = ("memory", "disk", "none")


def stamped_hashing(item: dict) -> bytes:
    """Cache key of {"image": path, ...}: the paths, and size and time of each file: one that was replaced is new."""
    stats = {key: os.stat(path) for key, path in item.items() if os.path.isfile(path)}
    return pickle_hashing([sorted(item.items()), sorted((k, s.st_size, s.st_mtime_ns) for k, s in stats.items())])


class DiskCache(PersistentDataset):
    """`PersistentDataset` that makes a half written file (full disk, killed run) anew instead of failing on it."""

    def _cachecheck(self, item: dict) -> dict:
        path = self.cache_dir / f"{self.hash_func(item).decode()}{self.transform_hash}.pt"
        if path.is_file() and not zipfile.is_zipfile(path):
            path.unlink(missing_ok=True)
        return super()._cachecheck(item)


class VolumeDataset(Dataset):
    """Volumes with a cached deterministic part and a random part that is a function of (seed, draw).

    Args:
        data: [{"image": path, ...}, ...]; "class_label": int of an item passes by the transforms and the caches.
        transform: deterministic transforms, path -> {"image": tensor (C, *spatial), "voxel_size": mm}, run once a file
            where `cache` is not "none"; float16 at their end halves the memory (1500 volumes of 128^3: 6.3 GB).
        random_transform: run at each access, seeded by `seed` and the draw; None for no augmentation.
        cache: "memory", "disk" (in `cache_dir`) or "none".
        cache_dir: folder of the disk cache.
        seed: of the random transforms.
        num_workers: threads that fill the memory cache.

    An item is {"image": float32 tensor (C, *spatial), "draw": int}, with its "class_label" if it has one. It is asked
    for by (index, draw), see `DrawSampler`; a plain index is its own draw.
    """

    def __init__(
        self,
        data: Sequence[dict],
        transform: Callable,
        random_transform: Callable | None = None,
        cache: str = "memory",
        cache_dir: str | None = None,
        seed: int = 0,
        num_workers: int = 1,
    ) -> None:
        self.labels = [item.get("class_label") for item in data]
        data = [{key: value for key, value in item.items() if key != "class_label"} for item in data]
        if cache == "memory":
            self.volumes: monai.data.Dataset = CacheDataset(
                data, transform, num_workers=max(1, num_workers), copy_cache=False
            )
        elif cache == "disk":
            self.volumes = DiskCache(data, transform, cache_dir, stamped_hashing, hash_transform=pickle_hashing)
        elif cache == "none":
            self.volumes = monai.data.Dataset(data, transform)
        else:
            raise BundleError(f"cache: {cache!r} is unknown; it must be one of {CACHES}")
        self.random_transform = random_transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, draw = key if isinstance(key, tuple) else (key, key)
        item = {"image": self.volumes[index]["image"].float()}
        if self.random_transform is not None:
            # three words, so that the stream differs from the one that `SeededPrepareBatch` draws noise from
            state = np.random.SeedSequence([self.seed, draw, 1]).generate_state(1)
            self.random_transform.set_random_state(seed=int(state[0]))
            item = self.random_transform(item)
        # no MetaTensor, which random transforms make: each operation of the network would carry its history
        item = {"image": convert_to_tensor(item["image"], track_meta=False).contiguous(), "draw": draw}
        return item if self.labels[index] is None else item | {"class_label": self.labels[index]}

    def voxel_sizes(self) -> np.ndarray:
        """Physical size of the preprocessed voxels of up to 100 volumes (8 if nothing is cached), evenly chosen.

        Returns:
            (n, spatial dims), in mm.
        """
        most = 100 if isinstance(self.volumes, CacheDataset | PersistentDataset) else 8
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)) if len(self) else []
        return np.array([self.volumes[int(i)]["voxel_size"].numpy() for i in chosen])


class DrawSampler(Sampler):
    """An endless stream of (index, draw): draw = 0, 1, 2, ... is the position in the stream, and the indices are one
    seeded permutation of the dataset after another.

    The batch of iteration k is draws k B .. (k + 1) B - 1, whatever was done before: set `iteration` and the stream
    goes on exactly there.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int = 0) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.iteration = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count, draw = len(self.dataset), self.iteration * self.batch_size
        order, epoch = None, -1
        while count:
            if draw // count != epoch:
                epoch = draw // count
                order = np.random.default_rng([self.seed, epoch]).permutation(count)
            yield int(order[draw % count]), draw
            draw += 1


class RepeatSampler(Sampler):
    """(index, draw) for every volume `repeats` times in a row, always the same: for validation."""

    def __init__(self, dataset: Dataset, repeats: int = 4) -> None:
        self.dataset, self.repeats = dataset, repeats

    def __len__(self) -> int:
        return len(self.dataset) * self.repeats

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((draw // self.repeats, draw) for draw in range(len(self)))


def summarise(
    training: VolumeDataset,
    validation: VolumeDataset,
    spatial_shape: Sequence[int],
    path: str,
    class_names: Sequence[str] | None = None,
) -> list[float]:
    """Write what was trained on (counts, files, physical voxel sizes of the cubes) to a JSON file.

    With classes it also counts them, and a file beside it lists those of each: dataset.json has dataset_glioma.json.

    Returns:
        the median voxel size in mm, a list of spatial dims numbers; without volumes 1 mm, and no file.
    """
    if not len(training):
        return [1.0] * len(spatial_shape)
    sizes = training.voxel_sizes()
    statistics = {name: getattr(np, name)(sizes, axis=0).round(4).tolist() for name in ("median", "mean", "min", "max")}
    summary = {
        "spatial_shape": list(spatial_shape),
        "voxel_size_mm": statistics,
        "training": [item["image"] for item in training.volumes.data],
        "validation": [item["image"] for item in validation.volumes.data],
    }
    written = {path: summary}
    for label, name in enumerate(class_names or ()):
        of_class = {
            side: [file for file, of in zip(summary[side], data.labels, strict=True) if of == label]
            for side, data in (("training", training), ("validation", validation))
        }
        summary.setdefault("classes", {})[name] = {side: len(files) for side, files in of_class.items()}
        root, ending = os.path.splitext(path)
        written[f"{root}_{name}{ending}"] = of_class
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for place, content in written.items():
        text = json.dumps(content, indent=4)
        write_atomically(place, lambda temporary, text=text: Path(temporary).write_text(text))
    return statistics["median"]
