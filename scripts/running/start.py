"""What every command does first."""

from __future__ import annotations

import time

from scripts.running.arguments import check_arguments
from scripts.running.errors import report_plainly
from scripts.running.processes import check_alone, join, local_device


def start(overlay: str | None = None, together: bool = False) -> float:
    """Let errors be sentences, look at the options of the command line, and join the other processes, if there are any.

    Args:
        overlay: the config that lets several processes share the work; None where there is nothing to share.
        together: this is one of several processes that share the work; otherwise it must be alone.

    Returns:
        `time.monotonic()` at the beginning, in seconds, from which a time limit counts.

    Raises:
        BundleError: see `check_alone`, `local_device` and `check_arguments`.
    """
    beginning = time.monotonic()
    report_plainly()
    if together:
        join(local_device())
    else:
        check_alone(overlay)
    check_arguments()
    return beginning
