"""Training on several GPUs: one loss, one gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class _MeanOverRanks(torch.autograd.Function):
    """The mean of a scalar over all processes; the gradient is the own one, as `DistributedDataParallel` wants."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class MeanLoss(nn.Module):
    """A loss whose value is its mean over the batches of all processes, and whose gradient is that of the own batch.

    All processes so see one loss, that of the whole batch: in logs, in loss.csv, and where a surge is judged.

    Args:
        loss: (prediction, target) -> scalar, a mean over the batch.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return _MeanOverRanks.apply(self.loss(prediction, target))


def parallel(network: nn.Module, device: str | torch.device) -> DistributedDataParallel:
    """The network for the trainer: its gradients are the mean over all processes. The network itself is not changed.

    Weights are not sent round: every process has made or loaded the same ones, and a U-Net has no buffers.
    """
    device = torch.device(device)
    return DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )


class SyncAtStep:
    """Trainer handler: gradients that are added over several iterations go round once, with the last of them.

    Args:
        network: of `parallel`.
        accumulation_steps: iterations a step of the optimizer.
    """

    def __init__(self, network: DistributedDataParallel, accumulation_steps: int) -> None:
        self.network, self.accumulation_steps = network, accumulation_steps

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        # what DistributedDataParallel.no_sync sets
        self.network.require_backward_grad_sync = engine.state.iteration % self.accumulation_steps == 0
