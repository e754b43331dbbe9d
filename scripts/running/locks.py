"""One run at a time in a folder."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from pathlib import Path

import ignite.distributed as idist
from filelock import FileLock, Timeout

from scripts.running.errors import BundleError

logger = logging.getLogger(__name__)
LOCKS: dict[str, FileLock] = {}  # by real path of the folder; the kernel frees them when the process ends, however


@idist.one_rank_only(with_barrier=True)
def lock_folders(**folders: str) -> None:
    """Keep each folder (key = path) for this process until it ends; then remove what a killed run left half written.

    The lock is on `<folder>/.lock`, which also names its process. A folder that this process has locked already is left
    as it is. Of several processes of a run, rank 0 takes the locks, and the others wait for it.

    Raises:
        BundleError: nothing can be written in a folder, or another run is writing there; names the key, the folder, and
            the process and host of that run.
    """
    for key, folder in folders.items():
        place = os.path.realpath(folder)
        if place not in LOCKS or not LOCKS[place].is_locked:  # a fork has the name, and not the lock
            check_writable(**{key: folder})
            lock(key, folder, place)
            remove_partial(**{key: folder})


def check_writable(**folders: str) -> None:
    """Every folder (key = path) exists or can be made, and a file can be written in it."""
    for key, folder in folders.items():
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise BundleError(
                f"{key}: nothing can be written in {folder!r} ({e.strerror}); give a folder that you may write in"
            ) from e


def remove_partial(**folders: str) -> None:
    """Remove what `write_atomically` has left in folders, not below them, when a run was killed."""
    for folder in folders.values():
        for path in Path(folder).glob("*.partial"):
            logger.info(f"removed {path}, left by a run that was killed")
            path.unlink(missing_ok=True)


def lock(key: str, folder: str, place: str) -> None:
    """Take the lock of one folder, whose real path is `place`."""
    path = Path(folder, ".lock")
    folder_lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False, preserve_lock_file=True)
    try:
        folder_lock.acquire()
    except Timeout:
        run = path.read_text().strip() or "a process that has not yet given its name"
        raise BundleError(
            f"{key}: another run is writing in {folder!r} ({run}); wait for its end, or give another {key}"
        ) from None
    except PermissionError as e:
        raise BundleError(
            f"{key}: {str(path)!r} cannot be opened ({e.strerror}); give a folder that you may write in"
        ) from e
    except OSError as e:  # a file system without locks
        logger.warning(f"{key}: {folder!r} cannot be locked ({e}); let no other run write there")
        return
    LOCKS[place] = folder_lock
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except OSError as e:  # a full disk: the lock itself needs no room
        logger.warning(f"{path}: {e.strerror}")
