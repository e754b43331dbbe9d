"""SIGTERM and Ctrl-C: who hears them, and the exit status of what they end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ignite.engine import Engine, Events
from monai.data.utils import worker_init_fn

logger = logging.getLogger(__name__)
TIME_LIMIT = 1  # a reason to stop; the other ones are the numbers of signals, which are greater
STATUS = {
    signal.SIGTERM: 128 + signal.SIGTERM,  # 143 and 130, what a shell says of a program that such a signal has ended
    signal.SIGINT: 128 + signal.SIGINT,
    TIME_LIMIT: 75,  # EX_TEMPFAIL of sysexits.h: try again later
}
NAME = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", TIME_LIMIT: "time_limit"}


def leave_signals_to_parent(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: its workers leave signals that everybody gets to the training.

    Ctrl-C, and SIGTERM of most schedulers, go to all processes of a job. A worker that ended would take the batch
    that is to be finished with it. It still ends when the training's own process says so or is gone.
    """
    worker_init_fn(worker_id)  # MONAI's, which this one takes the place of
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()


def end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def on_signals(react: Callable[[int], None]) -> Iterator[None]:
    """Hand SIGTERM and Ctrl-C to `react`, in the main thread, where Python has them; not in forks."""
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            react(number)

    main = threading.current_thread() is threading.main_thread()
    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def ending_at_once(engine: Engine, advice: Callable[[], str]) -> Iterator[None]:
    """While an engine runs, SIGTERM and Ctrl-C end the process at once, with statuses 143 and 130.

    For work whose results are kept one by one, each whole or not at all, so that there is nothing to be finished.
    However the run ends early, `advice` says what is there.
    """
    asked = 0

    def end(number: int) -> None:
        nonlocal asked
        asked = number
        raise SystemExit(STATUS[number])

    def again() -> None:  # Python drops what is raised within a destructor
        if asked:
            raise SystemExit(STATUS[asked])

    removable = engine.add_event_handler(Events.ITERATION_STARTED, again)
    with on_signals(end):
        try:
            yield
        except BaseException:
            why = f"stopped by {NAME[asked]} (exit status {STATUS[asked]})" if asked else "stopped"
            logger.warning(f"{why}: {advice()}")
            raise
        finally:
            removable.remove()
