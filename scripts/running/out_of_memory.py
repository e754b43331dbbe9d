"""What to change where the memory of a GPU does not suffice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from scripts.running.errors import BundleError


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
