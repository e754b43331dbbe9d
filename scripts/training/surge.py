"""What keeps a training from blowing up: gradients that are clipped, and the way back from a surge of the loss."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import deque

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils import CommonKeys

from scripts.running.errors import BundleError
from scripts.running.files import set_aside
from scripts.running.processes import gathered
from scripts.training.checkpoints import CheckpointHandler, checkpoints_in, iteration_of, newest_whole
from scripts.training.records import TrainingRecords

logger = logging.getLogger(__name__)
NEWEST, EARLIER = 21, 200  # losses whose medians are compared
LOWERED = 0.5  # the learning rate after a surge, as a share of the one before


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
        records: of the run; what is given up goes into its surges.csv.
        factor: above 1; None looks for NaN only, and does not go back.
    """

    def __init__(self, records: TrainingRecords, factor: float | None) -> None:
        self.losses, self.surges, self.factor = records.losses, records.surges, factor
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
