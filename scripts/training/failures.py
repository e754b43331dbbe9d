"""What ends a training early, in one sentence that says what to change."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.utils.data import dataloader

from scripts.running.errors import BundleError, LoaderDied
from scripts.running.out_of_memory import out_of_memory


def death_of_loader(error: BaseException) -> str:
    """How a process of a data loader has ended, where that is what an error is about; else an empty string.

    torch raises RuntimeError, from a signal handler and so anywhere in the main program, or what ends the connection
    through which a batch was on its way: only then the data loader's own code is among the callers.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, RuntimeError) and re.search(r"DataLoader worker \(pid.*(killed|exited)", str(error)):
        return lines[0]
    called = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, (ConnectionError, EOFError)) and dataloader.__file__ in called:
        return lines[0]
    return ""


class Failures:
    """Trainer handler: what goes wrong in an iteration, or in a handler after it, ends the run with one sentence.

    It is one handler, since Ignite hands an error to the first one alone that raises. An error that there is nothing to
    say about comes out as it is.

    Args:
        parameters: the knobs of the config.
        amp_dtype: of autocast; None for float32.

    Raises:
        BundleError: the memory of the GPU does not suffice; a file could not be read in a loader process, which torch
            hands on as the text of a traceback.
        LoaderDied: a loader process has ended.
    """

    def __init__(self, parameters: Mapping[str, Any], amp_dtype: torch.dtype | None) -> None:
        wanted = ("batch_size", "spatial_shape", "amp", "activation_checkpointing", "accumulation_steps")
        self.knobs = {key: parameters[key] for key in wanted} | {"amp": amp_dtype or torch.float32}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EXCEPTION_RAISED, self)

    def __call__(self, engine: Engine, error: BaseException) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            where = f"at iteration {engine.state.iteration} of the training"
            raise out_of_memory(error, where, self.advice(), **self.knobs) from error
        if isinstance(error, BundleError) and str(error).startswith("Caught "):
            raise BundleError(str(error).rsplit("BundleError: ", 1)[-1].strip()) from None
        if reason := death_of_loader(error):
            raise LoaderDied(
                f"num_workers: a loader process has died ({reason}); if nobody stopped it, memory ran out: fewer "
                "num_workers, `--cache disk` or a smaller batch_size help, and --resume true goes on from "
                "the newest checkpoint"
            ) from error
        raise error

    def advice(self) -> list[str]:
        batch, steps = self.knobs["batch_size"], 2 * self.knobs["accumulation_steps"]
        half = f"--batch_size {batch // 2} --accumulation_steps {steps} (the same gradient, twice the iterations)"
        return [
            *(["--activation_checkpointing all"] if self.knobs["activation_checkpointing"] != "all" else []),
            *(["--amp auto"] if self.knobs["amp"] == torch.float32 else []),
            *([half] if batch > 1 and batch % 2 == 0 else ["--batch_size 1"] if batch > 1 else []),
            "a smaller spatial_shape",
            "fewer channels",
        ]
