"""The forward pass of training, with class labels, in mixed precision on any device."""

from __future__ import annotations
