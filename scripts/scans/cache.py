"""Preprocessed volumes on the disk, which several runs may share."""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import io
import logging
import os
import pickle
import re
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import monai
import torch
from monai.data import NibabelReader, PersistentDataset
from monai.transforms import Compose, Transform
from monai.utils import convert_to_tensor

from scripts.running.errors import BundleError, root_bundle_error
from scripts.running.files import save_tensors, system_error
from scripts.scans.find import header_of

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
    sources = [here.with_name(name).read_bytes() for name in ("transforms.py", "images_2d.py", "condition_images.py")]
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
