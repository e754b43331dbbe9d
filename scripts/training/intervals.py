"""The base of trainer handlers that do something every so many iterations."""

from __future__ import annotations

from ignite.engine import Engine, Events


class IntervalHandler:
    """Calls itself every `interval` iterations, and once more at the end if the last iteration is not one of them."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.COMPLETED, self.at_end)

    def at_end(self, engine: Engine) -> None:
        if engine.state.iteration % self.interval:
            self(engine)

    def __call__(self, engine: Engine) -> None:
        raise TypeError(f"{type(self).__name__} does not say what to do")
