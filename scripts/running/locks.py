"""One run at a time in a folder."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

import ignite.distributed as idist
from monai.utils import optional_import

from scripts.running.errors import BundleError

logger = logging.getLogger(__name__)
fcntl, has_fcntl = optional_import("fcntl")  # Windows has none: there nothing is locked
held: dict[str, TextIO] = {}  # by real path of the folder; the kernel frees them when the process ends, however it ends


def forget() -> None:
    """In a forked process (a loader's worker): leave the locks to the process that took them, whose end frees them."""
    for file in held.values():
        file.close()
    held.clear()


if has_fcntl:
    os.register_at_fork(after_in_child=forget)


@idist.one_rank_only(with_barrier=True)
def lock_folders(**folders: str) -> None:
    """Keep each folder (key = path) for this process until it ends; then remove what a killed run left half written.

    The lock is an exclusive `flock` on `<folder>/.lock`, which also names who holds it. A folder that this process
    holds already is left as it is. Of several processes of a run, rank 0 takes the locks, and the others wait for it.

    Raises:
        BundleError: another run holds a folder; names the key, the folder, and the process and host of that run.
    """
    if not has_fcntl:
        return
    for key, folder in folders.items():
        place = os.path.realpath(folder)
        if place not in held:
            lock(key, folder, place)
            remove_partial(**{key: folder})


def remove_partial(**folders: str) -> None:
    """Remove what `write_atomically` has left in folders, not below them, when a run was killed."""
    for folder in folders.values():
        for path in Path(folder).glob("*.partial"):
            logger.info(f"removed {path}, left by a run that was killed")
            path.unlink(missing_ok=True)


def lock(key: str, folder: str, place: str) -> None:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".lock")
    try:
        file = open(path, "a+")
    except OSError as e:
        raise BundleError(
            f"{key}: {path!r} cannot be opened ({e.strerror}); give a folder that you may write in"
        ) from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.seek(0)
        holder = file.read().strip() or "a process that has not yet given its name"
        file.close()
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
            logger.warning(f"{key}: {folder!r} cannot be locked ({e.strerror}); let no other run write there")
            return
        raise BundleError(
            f"{key}: another run is writing in {folder!r} ({holder}); wait for its end, or give another {key}"
        ) from e
    held[place] = file
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as e:  # a full disk: the lock itself needs no room
        logger.warning(f"{path}: {e.strerror}")
