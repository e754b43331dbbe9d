"""Ending a run early without losing anything: SIGTERM, Ctrl-C, and a time limit."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ignite.distributed as idist
from ignite.engine import Engine, Events

from scripts.running.errors import LoaderDied
from scripts.running.signals import NAME, STATUS, TIME_LIMIT, on_signals
from scripts.training.checkpoints import CheckpointHandler, bytes_of, checkpoints_in, iteration_of

logger = logging.getLogger(__name__)
SLOWEST_DISK = 20e6  # bytes a second, until a checkpoint has been written
ONE_PRESS = 1.0  # seconds in which a launcher may pass on the Ctrl-C that the terminal has sent to everybody


class Stop:
    """Ends a training after the iteration under way, once asked to: with a checkpoint, how to go on, and a status.

    Asked by SIGTERM, as schedulers send it before they take a node away (status 143), by Ctrl-C (130; a second one,
    a second or more after, stops at once), or by the time limit (75). All processes of a run stop after the same
    iteration, the last of an accumulated gradient, if one of them is asked. A validation or preview under way is
    finished first.

    Args:
        time_limit: minutes from the start within which the process should have ended; None for no limit. The longest
            iteration so far, with the validation, preview or checkpoint after it, and one more checkpoint must fit.
        started: `time.monotonic()` at the start, see `scripts.running.start.start`.
        accumulation_steps: iterations a step of the optimizer.
    """

    def __init__(self, time_limit: float | None, started: float, accumulation_steps: int = 1) -> None:
        self.deadline = None if time_limit is None else started + 60 * time_limit
        self.accumulation_steps = accumulation_steps
        self.asked = 0  # the reason; a signal's number is greater than that of the time limit
        self.asked_at = 0.0
        self.longest = 0.0  # seconds that the slowest iteration took, with everything after it
        self.last: float | None = None

    @contextmanager
    def watch(self, trainer: Engine, checkpoints: CheckpointHandler) -> Iterator[None]:
        """While the trainer runs, listen to signals and to the clock."""
        removable = trainer.add_event_handler(Events.GET_BATCH_STARTED, self, checkpoints)
        with on_signals(self.on_signal):
            try:
                yield
            except LoaderDied:
                if not self.asked:
                    raise
                # the signal that everybody got came while the loader processes were starting, and ended one of them
                raise self.ended(trainer, checkpoints, self.asked) from None
            finally:
                removable.remove()

    def on_signal(self, number: int) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self.asked_at = number, now
            twice = "; Ctrl-C once more stops at once" if number == signal.SIGINT else ""
            text = f"\n{NAME[number]}: a checkpoint follows after this iteration{twice}\n"
            os.write(2, text.encode())  # print and logging cannot interrupt themselves
        elif number == signal.SIGINT and now > self.asked_at + ONE_PRESS:
            raise KeyboardInterrupt("stopped at once; --resume true goes on from the newest checkpoint")

    def __call__(self, engine: Engine, checkpoints: CheckpointHandler) -> None:
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last = now
        room = (
            checkpoints.seconds or bytes_of([part.state_dict() for part in checkpoints.parts.values()]) / SLOWEST_DISK
        )
        if engine.state.iteration % self.accumulation_steps:
            return
        late = self.deadline is not None and now + self.longest + room > self.deadline
        asked = int(idist.all_reduce(int(self.asked or (TIME_LIMIT if late else 0)), "MAX"))
        if asked:
            self.end(engine, checkpoints, asked)

    def end(self, engine: Engine, checkpoints: CheckpointHandler, asked: int) -> None:
        if engine.state.iteration:
            checkpoints(engine)
        checkpoints.records.flush()
        idist.barrier()  # a launcher may end all processes as soon as one has ended
        raise self.ended(engine, checkpoints, asked)

    def ended(self, engine: Engine, checkpoints: CheckpointHandler, asked: int) -> SystemExit:
        """Say what there is to go on from; the exception to raise."""
        kept = "there was nothing to keep yet; the same command begins again"
        if newest := checkpoints_in(checkpoints.ckpt_dir)[:1]:
            kept = (
                f"{newest[0]} holds everything up to iteration {iteration_of(newest[0])}; the same command with "
                "--resume true goes on from it"
            )
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))  # torchrun begins again after any status but 0
        status = 0 if restarts and asked == TIME_LIMIT else STATUS[asked]
        logger.warning(
            f"stopped by {NAME[asked]} after iteration {engine.state.iteration} (exit status {status}): {kept}"
        )
        return SystemExit(status)
