"""The forward pass of training, with class labels, in mixed precision on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import Scheduler


class AutocastDiffusionInferer(DiffusionInferer):
    """MONAI's `DiffusionInferer` under autocast (MONAI's engines autocast on CUDA only), and with class labels.

    Args:
        scheduler: the diffusion scheduler, which adds the noise.
        amp_dtype: type for autocast, or None for plain float32; see `scripts.running.checks.amp_dtype`.
    """

    def __init__(self, scheduler: Scheduler, amp_dtype: torch.dtype | None = None) -> None:
        super().__init__(scheduler)
        self.amp_dtype = amp_dtype

    def __call__(
        self,
        inputs: torch.Tensor,
        diffusion_model: Callable[..., torch.Tensor],
        *args: Any,
        class_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """x_0 (B, C, *spatial), class labels (B,) if any -> the network's prediction for its noisy version, float32."""
        if class_labels is not None:  # MONAI's own call has no way for them
            diffusion_model = partial(diffusion_model, class_labels=class_labels)
        with torch.autocast(inputs.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return super().__call__(inputs, diffusion_model, *args, **kwargs).float()
