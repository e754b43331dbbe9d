"""Files that are whole or absent, whatever happens to the program that writes them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from scripts.running.errors import BundleError


def write_atomically(path: str, write: Callable[[str], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it: `path` is whole or absent.

    A kill can leave `<path>.partial`, which the next run overwrites or `scripts.running.locks.lock_folders` removes.

    Raises:
        BundleError: the disk is full or the folder cannot be written; what stood at `path` before is untouched, as it
            is where `write` raises something else, which comes out as it is.
    """
    temporary = f"{path}.partial"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if (found := system_error(e)) is not None:
            raise BundleError(f"{path!r} could not be written ({found}); earlier files are untouched") from e
        raise
    flush_folder(os.path.dirname(path) or ".")


def write_text(path: str, text: str) -> None:
    """Write a text in UTF-8, whole or not at all, see `write_atomically`."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def set_aside(paths: Iterable[str], folder: str, name: str) -> str:
    """Move files from below `folder` to a new `folder`/`name`_1 (2, 3, ...), whose path is returned; their own folders
    come along."""
    number = 1
    while os.path.exists(aside := os.path.join(folder, f"{name}_{number}")):
        number += 1
    os.makedirs(aside, exist_ok=True)  # several processes may come here at a time
    for path in paths:
        place = os.path.join(aside, os.path.relpath(path, folder))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.replace(path, place)
    return aside


def flush_folder(folder: str) -> None:
    """Let a rename in a folder survive a power failure, where the system and its file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_tensors(content: Any, path: str) -> None:
    """`torch.save` through a file of Python's, whose errors say what is wrong: torch's own says "unexpected pos"."""
    with open(path, "wb") as file:
        torch.save(content, file)


def system_error(error: BaseException) -> str | None:
    """Why the system could not write a file, in its words, where that is what an error is about; else None.

    What is raised while a file is being written may be about anything: a GPU, a result that is not right, a network.
    """
    if isinstance(error, ConnectionError):
        return None
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # torch writes by itself where it is given a path, and says so by the place in its code
    if isinstance(error, RuntimeError) and re.search(r"inline_container\.cc|PytorchStreamWriter", str(error)):
        cause = error.__context__  # what Python's file said first
        return system_error(cause) if isinstance(cause, OSError) else str(error).splitlines()[0]
    return None
