"""A training run from its first check to its end."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

from monai.engines import Trainer

from scripts.running.errors import BundleError
from scripts.training.checkpoints import CheckpointHandler
from scripts.training.resume import ResumeHandler
from scripts.training.stop import Stop
from scripts.training.surge import LossSurge, SurgeGuard

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # a disk that is full or gone


def train(
    trainer: Trainer,
    handlers: Sequence[Any],
    retries: int,
    time_limit: float | None = None,
    started: float | None = None,
) -> None:
    """Train to the end, and go back from each surge of the loss.

    Going back is a resume from the newest good checkpoint, one from before the newest 21 losses: weights, EMA, moments,
    gradient scaler, iteration, and therefore data and noise, are as they were; the learning rate is half of the newest.
    It is first written into that checkpoint, so that a later resume keeps it, and model.pt becomes the EMA of that
    checkpoint again. Later checkpoints are moved to `ckpt_dir`/surge_1 (2, ...), and the rows of loss.csv that are
    given up to surges.csv.

    Args:
        trainer: with the handlers attached.
        handlers: among them a `ResumeHandler`, a `SurgeGuard` after it, and a `CheckpointHandler`.
        retries: how often to go back before stopping.
        time_limit, started: see `scripts.training.stop.Stop`; None for now.

    Raises:
        BundleError: a surge after the last retry, or one that there is no way back from; says what to try. A file
            could not be written, as on a full disk.
        SystemExit: it was ended early, see `scripts.training.stop.Stop`.
    """
    kinds = (ResumeHandler, SurgeGuard, CheckpointHandler)
    resume, guard, checkpoints = (next(h for h in handlers if isinstance(h, kind)) for kind in kinds)
    trainer.interrupt_resume_enabled = False  # ignite's other loop does not start again after an exception
    trainer.logger.setLevel(logging.CRITICAL)  # ignite would log that the run ends
    started = time.monotonic() if started is None else started
    with Stop(time_limit, started, trainer.accumulation_steps).watch(trainer, checkpoints):
        for number in count(1):
            try:
                return trainer.run()
            except LossSurge as surge:
                guard.go_back(surge, checkpoints, number, retries)
                resume.resume = True
            except OSError as e:
                if e.errno not in NO_ROOM:
                    raise
                raise BundleError(
                    f"output_dir: a file could not be written at iteration {trainer.state.iteration} ({e.strerror}); "
                    f"checkpoints in {checkpoints.ckpt_dir!r} are untouched: make room, then --resume true goes on"
                ) from e
