"""A trainer handler that makes one of several processes fail, for tests."""

import ctypes
import os
import signal

import ignite.distributed as idist
from ignite.engine import Events


class Fault:
    """At the start of an iteration, on the ranks of `what`: {rank: "error", "kill", "wait" (in a C call), "nan", or a
    number, of the signal that torchrun gets}.

    Once, and only before torchrun has started the processes anew.
    """

    def __init__(self, what, iteration):
        self.what, self.iteration = what, iteration

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.iteration), self)

    def __call__(self, engine):
        kind = self.what.pop(str(idist.get_rank()), None)  # a run that goes back comes to this iteration again
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0":
            return
        if kind == "error":
            raise RuntimeError("an injected error")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "wait":
            ctypes.CDLL(None).sleep(600)  # without the interpreter's lock, as a collective operation waits
        if isinstance(kind, int):
            os.kill(os.getppid(), kind)
        if kind == "nan":
            engine.state.batch["image"].fill_(float("nan"))
