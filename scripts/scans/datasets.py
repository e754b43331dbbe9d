"""Cached volumes, and samplers that make the data order and every random draw a function of seed and position."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import monai
import numpy as np
import torch
from monai.data import CacheDataset, PersistentDataset
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset

from scripts.running.checks import check_knobs
from scripts.running.condition_images import CONDITION_IMAGE
from scripts.running.covariates import one_word
from scripts.running.errors import root_bundle_error
from scripts.running.files import write_text
from scripts.scans.cache import DiskCache, Named

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Let the `BundleError` at the bottom of what MONAI raises come out alone."""
    try:
        yield
    except Exception as e:
        if found := root_bundle_error(e):
            raise found from None
        raise


def condition_tensor(condition: int | Sequence[float]) -> torch.Tensor:
    """An index as int64 (), a list of values as float32 (covariates)."""
    return torch.tensor(condition, dtype=torch.int64 if isinstance(condition, int) else torch.float32)


class VolumeDataset(Dataset):
    """Volumes with a cached deterministic part and a random part that is a function of (seed, draw).

    Args:
        data: [{"image": path, ...}, ...]; "condition" of an item, an index or a list of floats,
            passes by the transforms and the caches.
        transform: deterministic transforms, path -> {"image": tensor (C, *spatial), "voxel_size": mm}, run once a file
            where `cache` is not "none"; float16 at their end halves the memory (1500 volumes of 128^3: 6.3 GB).
        random_transform: run at each access, seeded by `seed` and the draw; None for no augmentation.
        cache: "memory", "disk" (in `cache_dir`) or "none".
        cache_dir: folder of the disk cache.
        seed: of the random transforms.
        num_workers: threads that fill the memory cache.

    An item is {"image": float32 tensor (C, *spatial), "draw": int}, with its "condition_image" and "condition" if it
    has one, and "other_condition", that of another item. It is asked for by (index, draw), see `DrawSampler`; a plain
    index is its own draw.

    Raises:
        BundleError: names a file that cannot be read or preprocessed.
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
        self.conditions = [item.get("condition") for item in data]
        data = [{key: value for key, value in item.items() if key != "condition"} for item in data]
        check_knobs(cache=cache)
        if cache == "memory":
            with plain_errors():
                self.volumes: monai.data.Dataset = CacheDataset(
                    data, Named(transform), num_workers=max(1, num_workers), copy_cache=False
                )
        elif cache == "disk":
            self.volumes = DiskCache(data, transform, cache_dir)
        else:
            self.volumes = monai.data.Dataset(data, Named(transform))
        self.random_transform = random_transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, draw = key if isinstance(key, tuple) else (key, key)
        with plain_errors():
            volume = self.volumes[index]
            item = {key: volume[key].float() for key in ("image", CONDITION_IMAGE) if key in volume}
        if self.random_transform is not None:
            # three words, so that the stream differs from the one that `SeededPrepareBatch` draws noise from
            state = np.random.SeedSequence([self.seed, draw, 1]).generate_state(1)
            self.random_transform.set_random_state(seed=int(state[0]))
            item = self.random_transform(item)
        # no MetaTensor, which random transforms make: each operation of the network would carry its history
        item = {key: convert_to_tensor(image, track_meta=False).contiguous() for key, image in item.items()}
        item["draw"] = draw
        other = (index + len(self.conditions) // 2) % len(self.conditions)
        conditions = {"condition": self.conditions[index], "other_condition": self.conditions[other]}
        return item | {key: condition_tensor(value) for key, value in conditions.items() if value is not None}

    def voxel_sizes(self) -> np.ndarray:
        """Physical size of the preprocessed voxels of up to 100 volumes (8 if nothing is cached), evenly chosen.

        Returns:
            (n, spatial dims), in mm.
        """
        most = 100 if isinstance(self.volumes, CacheDataset | PersistentDataset) else 8
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)) if len(self) else []
        return np.array([self.volumes[int(i)]["voxel_size"].numpy() for i in chosen])


def summarise(
    training: VolumeDataset,
    validation: VolumeDataset,
    spatial_shape: Sequence[int],
    path: str,
    covariates: Sequence[Mapping[str, Any]] = (),
    dataset_dir: str | None = None,
    data_description: Mapping[str, Any] | None = None,
) -> list[float]:
    """Write what was trained on (folder, counts, files, masks, physical voxel sizes of the cubes) to a JSON file.

    With classes, or one other word, it also counts them, and a file beside it lists those of each: dataset.json has
    dataset_glioma.json. `data_description`, the knobs that say which data they are, is for
    `scripts.scans.split.split_as_before`.

    Returns:
        the median voxel size in mm, a list of spatial dims numbers; without volumes 1 mm, and no file.
    """
    if not len(training):
        return [1.0] * len(spatial_shape)
    sizes = training.voxel_sizes()
    statistics = {name: getattr(np, name)(sizes, axis=0).round(4).tolist() for name in ("median", "mean", "min", "max")}
    summary = {
        "dataset_dir": dataset_dir,
        "spatial_shape": list(spatial_shape),
        "voxel_size_mm": statistics,
        "training": [item["image"] for item in training.volumes.data],
        "validation": [item["image"] for item in validation.volumes.data],
        "data_description": dict(data_description or {}),
    }
    items = [*training.volumes.data, *validation.volumes.data]
    if masks := {item["image"]: item["mask"] for item in items if "mask" in item}:
        summary["masks"] = masks
    written = {path: summary}
    for label, name in enumerate(covariates[0]["words"] if one_word(covariates) else ()):
        of_class = {
            side: [file for file, of in zip(summary[side], data.conditions, strict=True) if of == label]
            for side, data in (("training", training), ("validation", validation))
        }
        summary.setdefault("classes", {})[name] = {side: len(files) for side, files in of_class.items()}
        root, ending = os.path.splitext(path)
        written[f"{root}_{name}{ending}"] = of_class
    if idist.get_rank() > 0:
        return statistics["median"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for place, content in written.items():
        write_text(place, json.dumps(content, indent=4))
    return statistics["median"]
