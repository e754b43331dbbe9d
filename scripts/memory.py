"""What to change where the memory of a GPU does not suffice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from monai.utils import optional_import

from scripts.errors import BundleError

# the sampler imports this module, and an environment made for MONAI Deploy has no ignite
Engine, _ = optional_import("ignite.engine", name="Engine")
Events, _ = optional_import("ignite.engine", name="Events")


def numbers(error: torch.OutOfMemoryError) -> str:
    """What PyTorch says about sizes, "asked 2.00 GiB, free 1.06 GiB of 79.15 GiB", or the start of its message."""
    text = str(error)
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
    room = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    found = [f"asked {asked[1]}"] if asked else []
    found += [f"free {room[2]} of {room[1]}"] if room else []
    return ", ".join(found) or text.split(". ")[0][:200]


def out_of_memory(error: torch.OutOfMemoryError, where: str, advice: Sequence[str], **knobs: Any) -> BundleError:
    """The sentence for a user.

    Args:
        error: as PyTorch raised it.
        where: what was being done.
        advice: what would need less, the best first.
        knobs: key = value, as they are now.
    """
    values = ", ".join(f"{key} {str(value).removeprefix('torch.')}" for key, value in knobs.items())
    return BundleError(f"out of GPU memory {where} ({numbers(error)}) with {values}; {', or '.join(advice)} needs less")


class OutOfMemory:
    """Trainer handler: an iteration that does not fit into the GPU ends in a sentence that says what to change.

    Args:
        batch_size, spatial_shape, accumulation_steps, activation_checkpointing: as the config has them.
        amp_dtype: of autocast; None for float32.
    """

    def __init__(
        self,
        batch_size: int,
        spatial_shape: Sequence[int],
        amp_dtype: torch.dtype | None,
        activation_checkpointing: str | Sequence[int],
        accumulation_steps: int,
    ) -> None:
        self.knobs = {
            "batch_size": batch_size,
            "spatial_shape": list(spatial_shape),
            "amp": amp_dtype or torch.float32,
            "activation_checkpointing": activation_checkpointing,
            "accumulation_steps": accumulation_steps,
        }

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EXCEPTION_RAISED, self)

    def __call__(self, engine: Engine, error: BaseException) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            where = f"at iteration {engine.state.iteration} of the training"
            raise out_of_memory(error, where, self.advice(), **self.knobs) from error
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
