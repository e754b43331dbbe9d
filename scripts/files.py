"""Files that are whole or absent, whatever happens to the program that writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from scripts.errors import BundleError


def write_atomically(path: str, write: Callable[[str], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it: `path` is whole or absent.

    Raises:
        BundleError: the disk is full or the folder cannot be written; what stood at `path` before is untouched.
    """
    temporary = f"{path}.partial"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise BundleError(f"{path!r} could not be written ({e}); earlier files are untouched") from e
