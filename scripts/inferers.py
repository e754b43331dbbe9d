"""The forward pass of training in mixed precision on any device."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import Scheduler


class AutocastDiffusionInferer(DiffusionInferer):
    """MONAI's `DiffusionInferer` under autocast (MONAI's engines autocast on CUDA only).

    Args:
        scheduler: the diffusion scheduler, which adds the noise.
        amp_dtype: type for autocast, or None for plain float32; see `scripts.checks.amp_dtype`.
    """

    def __init__(self, scheduler: Scheduler, amp_dtype: torch.dtype | None = None) -> None:
        super().__init__(scheduler)
        self.amp_dtype = amp_dtype

    def __call__(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x_0 (B, C, *spatial) -> the network's prediction for its noisy version, float32."""
        with torch.autocast(inputs.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return super().__call__(inputs, *args, **kwargs).float()
