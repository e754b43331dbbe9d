"""What keeps a training from blowing up: gradients that are clipped, and the way back from a surge of the loss."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents, Trainer
from monai.utils import CommonKeys
from torch.utils.tensorboard import SummaryWriter

from scripts.running.errors import BundleError
from scripts.running.files import set_aside
from scripts.running.processes import gathered
from scripts.training.checkpoints import CheckpointHandler, ResumeHandler, checkpoints_in, iteration_of, newest_whole
from scripts.training.records import CsvRecord
from scripts.training.stop import Stop

logger = logging.getLogger(__name__)
NEWEST, EARLIER = 21, 200  # losses whose medians are compared
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # a disk that is full or gone
LOWERED = 0.5  # the learning rate after a surge, as a share of the one before


class GradientNorm:
    """Trainer handler: write the norm of the gradient at each step to TensorBoard, and clip it if that is asked for.

    g <- g min(1, max_norm / |g|), with |g| the L2 norm over all parameters together (Pascanu, Mikolov, Bengio 2013,
    Algorithm 1). It is a hook of the optimizer's step, which sees the sum of all `accumulation_steps`. A `GradScaler`
    leaves the gradients of a fused optimizer scaled until its kernel, and says by what factor in `grad_scale`.

    Args:
        optimizer: whose parameters they are.
        max_norm: the largest norm that is let through, above 0; None for any.
        summary_writer: gets "gradient_norm", before clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None, summary_writer: SummaryWriter) -> None:
        self.optimizer, self.max_norm, self.summary_writer = optimizer, max_norm, summary_writer
        self.warned = False

    def attach(self, engine: Engine) -> None:
        self.optimizer.register_step_pre_hook(partial(self, engine))

    def __call__(self, engine: Engine, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            norm = norm / scale
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        if torch.isfinite(norm):
            self.summary_writer.add_scalar("gradient_norm", norm, engine.state.iteration)
        elif scale is None and not self.warned:  # a GradScaler skips such a step
            self.warned = True
            logger.warning(
                f"the gradient is not finite at iteration {engine.state.iteration}, although the loss is: weights may "
                "be lost for good; --amp float32 would be the first thing to try"
            )


class LossSurge(BundleError):
    """What was seen, at which iteration, and the loss there."""

    def __init__(self, found: str, iteration: int, loss: float) -> None:
        super().__init__(found)
        self.iteration, self.loss = iteration, loss


class SurgeGuard:
    """Trainer handler that sees a surge of the loss and raises `LossSurge`, from which `train` goes back.

    A surge is a loss that is NaN or infinite, or a median of the newest 21 losses above `factor` times the median of
    the (up to) 200 before them. The loss of a batch depends on its timesteps, so one batch, or ten, say nothing; 11 of
    21 do. The losses are those of loss.csv, so that a resumed run judges as one that was never stopped.

    Args:
        losses: the record of the training loss.
        surges: record with the columns "surge" (1, 2, ...), "loss" and "learning_rate" (with which the run went on).
        factor: above 1; None looks for NaN only, and does not go back.
    """

    def __init__(self, losses: CsvRecord, surges: CsvRecord, factor: float | None) -> None:
        self.losses, self.surges, self.factor = losses, surges, factor
        self.window: deque[float] = deque(maxlen=NEWEST + EARLIER)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        iteration = engine.state.iteration
        self.surges.start(sys.maxsize if iteration else 0)  # a run that goes on keeps all of them
        self.window.clear()
        losses = [float(row["loss"]) for row in self.losses.rows() if int(row["iteration"]) <= iteration]
        self.window.extend(gathered(losses)[0])  # all processes judge by what rank 0 has read

    def __call__(self, engine: Engine) -> None:
        state, loss = engine.state, engine.state.output[CommonKeys.LOSS].item()
        if not math.isfinite(loss):
            where = f"at iteration {state.iteration} (epoch {state.epoch}, draws {state.batch['draw'].tolist()})"
            raise LossSurge(f"the loss is {loss} {where}", state.iteration, loss)
        self.window.append(loss)
        earlier, newest = np.split(np.array(self.window), [-NEWEST])
        if self.factor is not None and len(earlier) >= NEWEST:
            before, now = np.median(earlier), np.median(newest)
            if now > self.factor * before:
                raise LossSurge(
                    f"the loss has surged: {loss:.4g} at iteration {state.iteration}, and the median of the newest "
                    f"{NEWEST}, {now:.4g}, is {now / before:.3g} times that of the {len(earlier)} before, {before:.4g}",
                    state.iteration,
                    loss,
                )

    @idist.one_rank_only(with_barrier=True)
    def go_back(self, surge: LossSurge, checkpoints: CheckpointHandler, number: int, retries: int) -> None:
        """Prepare the files for a resume from before a surge, the one of this `number`. See `train`."""
        advice = "A lower learning_rate, a max_grad_norm such as 1, or --amp float32 would be the first things to try"
        if self.factor is None:
            raise BundleError(
                f"{surge}; the weights and checkpoints from before it are kept. {advice}; --resume true goes on from "
                "the newest checkpoint"
            )
        logger.warning(str(surge))
        folder, parts = checkpoints.ckpt_dir, checkpoints.parts
        after = [path for path in checkpoints_in(folder) if iteration_of(path) > surge.iteration - NEWEST]
        if after:
            names = ", ".join(os.path.basename(path) for path in after)
            logger.warning(f"written during the surge, moved to {set_aside(after, folder, 'surge')}: {names}")
        content, path = newest_whole(folder, (*parts, "iteration"))
        if content is None:
            raise BundleError(f"{surge}; there is no checkpoint from before it to go back to. {advice}")
        for saved, group in zip(content["optimizer"]["param_groups"], parts["optimizer"].param_groups):
            saved["lr"] = LOWERED * group["lr"]
        rate = content["optimizer"]["param_groups"][0]["lr"]
        self.note(surge, content["iteration"], rate)
        checkpoints.save(content)
        if number > retries:
            raise BundleError(
                f"{surge}; the run went back {retries} times (surge_retries) with half the learning rate each. "
                f"{advice}; --resume true goes on from {path} with {rate:.3g}"
            )
        logger.warning(f"going back to {path} with learning rate {rate:.3g} ({number} of {retries} times)")

    def note(self, surge: LossSurge, back: int, rate: float) -> None:
        """Copy what is given up, everything after iteration `back`, to surges.csv."""
        number = 1 + max((int(row["surge"]) for row in self.surges.rows()), default=0)
        given_up = [(int(row["iteration"]), row["loss"]) for row in self.losses.rows() if int(row["iteration"]) > back]
        for iteration, loss in [*given_up, (surge.iteration, repr(surge.loss))]:
            self.surges.add(iteration, number, loss, rate)


def train(trainer: Trainer, handlers: Sequence[Any], retries: int, stop: Stop | None = None) -> None:
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
        stop: ends the training early if asked to; None for a training that only a kill ends early.

    Raises:
        BundleError: a surge after the last retry, or one that there is no way back from; says what to try. A file
            could not be written, as on a full disk.
        SystemExit: it was ended early, see `scripts.training.stop.Stop`.
    """
    kinds = (ResumeHandler, SurgeGuard, CheckpointHandler)
    resume, guard, checkpoints = (next(h for h in handlers if isinstance(h, kind)) for kind in kinds)
    trainer.interrupt_resume_enabled = False  # ignite's other loop does not start again after an exception
    trainer.logger.setLevel(logging.CRITICAL)  # ignite would log that the run ends
    with stop.watch(trainer, checkpoints) if stop is not None else nullcontext():
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
