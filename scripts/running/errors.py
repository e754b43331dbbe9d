"""What a user sees when an input cannot be used."""

from __future__ import annotations

import sys
from types import TracebackType


class BundleError(ValueError):
    """What the user gave cannot be used: one sentence with the file or key, what was found, what is right."""


class LoaderDied(BundleError):
    """A process of a data loader has ended before its time."""


def root_bundle_error(error: BaseException | None) -> BundleError | None:
    """The `BundleError` at the bottom of a chain of exceptions (MONAI wraps what a config raises), or None."""
    while error is not None:
        if isinstance(error, BundleError):
            return error
        error = error.__cause__ or error.__context__
    return None


def report_plainly() -> None:
    """Let an uncaught `BundleError` or Ctrl-C print its sentence instead of a traceback; the status stays 1 or 130.

    Programs that import the bundle (MONAI Label, a notebook) still catch the exception as it is.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        found = root_bundle_error(error)
        if issubclass(kind, KeyboardInterrupt):
            print(f"error: {str(error) or 'stopped by Ctrl-C'}", file=sys.stderr)
        elif found is None:
            previous(kind, error, trace)
        else:
            print(f"error: {found}", file=sys.stderr)

    if getattr(previous, "__qualname__", "") != hook.__qualname__:
        sys.excepthook = hook
