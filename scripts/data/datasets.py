"""Cached volumes, and samplers that make the data order and every random draw a function of seed and position."""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import io
import json
import logging
import os
import pickle
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai
import numpy as np
import torch
from monai.data import CacheDataset, NibabelReader, PersistentDataset
from monai.transforms import Compose, Transform
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset, Sampler

from scripts.data.find import header_of
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError, root_bundle_error
from scripts.running.files import save_tensors, system_error, write_text

logger = logging.getLogger(__name__)


def without_filenames(reader: NibabelReader) -> tuple:
    """How to pickle a reader without the names of the files that it has read last."""
    return object.__new__, (type(reader),), {key: value for key, value in vars(reader).items() if key != "filenames"}


def hash_of(content: Any) -> str:
    """A hash of a structure by its values alone; a plain pickle also tells which of its strings are one object."""
    pickled = io.BytesIO()
    pickler = pickle.Pickler(pickled)
    pickler.fast = True  # without that memory
    pickler.dispatch_table = copyreg.dispatch_table | {NibabelReader: without_filenames}
    pickler.dump(content)
    return hashlib.sha256(pickled.getvalue()).hexdigest()


def stamped_hashing(item: dict) -> bytes:
    """Cache key of {"image": path, ...}: the paths, and size and time of each file: one that was replaced is new."""
    files = sorted({file for path in item.values() for file in (path, header_of(path)) if os.path.isfile(file)})
    stats = [(file, os.stat(file)) for file in files]
    return hash_of([sorted(item.items()), [(file, s.st_size, s.st_mtime_ns) for file, s in stats]]).encode()


class Named(Transform):
    """Transforms as one, whose every failure is a sentence that names the file: it may have vanished since the start.

    Raises:
        BundleError
    """

    def __init__(self, transform: Callable[[dict], dict]) -> None:
        self.transform = transform

    def __call__(self, data: dict) -> dict:
        try:
            return self.transform(data)
        except Exception as e:  # every reader and transform raises its own
            if found := root_bundle_error(e):
                raise found from None
            cause: BaseException = e
            while cause.__cause__ is not None:  # MONAI says "applying transform ..." on the way
                cause = cause.__cause__
            reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:160]}"
            missing = [path for path in data.values() if isinstance(path, str) and not os.path.exists(path)]
            raise BundleError(
                f"{(missing or [data.get('image')])[0]!r} cannot be read now "
                f"({'there is no such file any more' if missing else reason}), although it was checked "
                "at the start; was it moved, changed, or its disk removed? With it back, --resume true goes on"
            ) from e


def version_of_code() -> str:
    """A hash of the code that preprocesses images: what was cached with another one is not used."""
    here = Path(__file__)
    sources = [here.with_name(name).read_bytes() for name in ("transforms.py", "images_2d.py")]
    return hashlib.sha256(repr([*sources, monai.__version__]).encode()).hexdigest()


class DiskCache(PersistentDataset):
    """`PersistentDataset` that several processes may fill at once, and that a kill or a full disk cannot spoil.

    The volume of a file lies in `cache_dir`/<hash of transforms, their code and MONAI's version>/<hash of path, size,
    time of change>.pt. A process writes it under a name that no other has and renames it (MONAI moves it from the
    system's temporary folder, which across two disks is a copy that others can see half done). What does not load whole
    is made anew; it is loaded with `weights_only`, so nothing in it is executed.
    """

    def __init__(self, data: Sequence[dict], transform: Callable, cache_dir: str) -> None:
        super().__init__(data, Named(transform), cache_dir, stamped_hashing)
        # the single transforms: a `Compose` holds a random state, which is another one in every run
        steps = transform.flatten().transforms if isinstance(transform, Compose) else [transform]
        parts = [step if isinstance(step, Transform) else getattr(step, "__qualname__", "") for step in steps]
        self.transform_hash = hash_of([*parts, version_of_code()])[:16]
        self.folder = self.cache_dir / self.transform_hash
        self.warned = False
        for path in self.folder.glob("*.partial"):
            with contextlib.suppress(OSError):
                if abandoned(path):
                    path.unlink()
        mention_others(str(self.cache_dir), self.transform_hash)

    def _cachecheck(self, item: dict) -> dict:
        path = self.folder / f"{self.hash_func(item).decode()}.pt"
        try:
            return torch.load(path, weights_only=True)
        except FileNotFoundError:
            pass
        except Exception as e:  # torch.load has many ways to fail on a damaged file
            logger.warning(f"cache: {str(path)!r} does not load ({type(e).__name__}) and is made anew")
        content = convert_to_tensor(self._pre_transform(deepcopy(item)), convert_numeric=False, track_meta=False)
        self.keep(content, path)
        return content

    def keep(self, content: dict, path: Path) -> None:
        """Write one volume; where that fails, training goes on without and it is said once."""
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.{os.getpid()}@{socket.gethostname()}.partial")
        try:
            self.folder.mkdir(exist_ok=True, parents=True)
            save_tensors(content, temporary)
            os.replace(temporary, path)
        except Exception as e:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if (found := system_error(e)) is None:
                raise
            if not self.warned:
                logger.warning(f"cache: {str(path)!r} could not be written ({found}); going on without it")
            self.warned = True


def abandoned(path: Path) -> bool:
    """Whether the process that was writing a temporary file of `DiskCache.keep` was killed, as far as can be known."""
    found = re.search(r"\.(\d+)@(.+)\.partial$", path.name)
    here = found and found[2] == socket.gethostname() and os.path.isdir("/proc/self")
    # an hour: of another machine, of a system without /proc, or the number has been given to another process
    return bool(here and not os.path.isdir(f"/proc/{found[1]}")) or path.stat().st_mtime < time.time() - 3600


@lru_cache  # once a process: training and validation share a folder
def mention_others(cache_dir: str, used: str) -> None:
    """Say what else a cache holds, which nobody may need any more; nothing is removed, another run may be using it."""
    others = [entry for entry in os.scandir(cache_dir) if entry.name != used]
    files = [f for e in others for f in (os.scandir(e) if e.is_dir() else [e]) if f.name.endswith(".pt")]
    if files:
        size = sum(file.stat().st_size for file in files) / 1e6
        logger.info(
            f"cache: {cache_dir!r} also holds {len(files)} volumes ({size:.0f} MB) of other settings or versions, "
            f"which may be deleted if no run needs them; here only {used} is used"
        )


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Let the `BundleError` at the bottom of what MONAI raises come out alone."""
    try:
        yield
    except Exception as e:
        if found := root_bundle_error(e):
            raise found from None
        raise


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
        self.labels = [item.get("class_label") for item in data]
        data = [{key: value for key, value in item.items() if key != "class_label"} for item in data]
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
    goes on exactly there. Of n processes, which must divide B, each takes every n-th draw, beginning with its rank:
    the batch is the same, whatever n is.

    Args:
        dataset: something with a length.
        batch_size: B, of all processes together.
        seed: of the permutations.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int = 0) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.iteration = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count, draw = len(self.dataset), self.iteration * self.batch_size + idist.get_rank()
        order, epoch = None, -1
        while count:
            if draw // count != epoch:
                epoch = draw // count
                order = np.random.default_rng([self.seed, epoch]).permutation(count)
            yield int(order[draw % count]), draw
            draw += idist.get_world_size()


class RepeatSampler(Sampler):
    """(index, draw) for every volume `repeats` times in a row, always the same: for validation.

    Of several processes each takes its share of the draws, all equally many: some draws come twice where they do not
    divide evenly.
    """

    def __init__(self, dataset: Dataset, repeats: int = 4) -> None:
        self.dataset, self.repeats = dataset, repeats

    def __len__(self) -> int:
        return -(-len(self.dataset) * self.repeats // idist.get_world_size())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, step, count = idist.get_rank(), idist.get_world_size(), len(self.dataset) * self.repeats
        draws = ((first + i * step) % count for i in range(len(self)))
        return ((draw // self.repeats, draw) for draw in draws)


def summarise(
    training: VolumeDataset,
    validation: VolumeDataset,
    spatial_shape: Sequence[int],
    path: str,
    class_names: Sequence[str] | None = None,
    dataset_dir: str | None = None,
    data_description: Mapping[str, Any] | None = None,
) -> list[float]:
    """Write what was trained on (folder, counts, files, physical voxel sizes of the cubes) to a JSON file.

    With classes it also counts them, and a file beside it lists those of each: dataset.json has dataset_glioma.json.
    `data_description`, the knobs that say which data they are, is for `scripts.data.find.split_as_before`.

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
    written = {path: summary}
    for label, name in enumerate(class_names or ()):
        of_class = {
            side: [file for file, of in zip(summary[side], data.labels, strict=True) if of == label]
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
