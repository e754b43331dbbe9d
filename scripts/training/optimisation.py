"""What happens to weights and gradients at a step of the optimizer."""

from __future__ import annotations

import logging
from functools import partial

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from scripts.training.records import TrainingRecords

logger = logging.getLogger(__name__)


class RampedEMAHandler(EMAHandler):
    """Ignite's `EMAHandler` with a momentum that starts at 1 and falls to `momentum`: max(momentum, 9 / (8 + k)).

    The average then spans about the last tenth of the k steps of the optimizer so far, so that the EMA weights of a
    short run are not those of its random start. It is a function of the iteration alone, so a resumed run is exact.

    Args:
        model: the network that is trained.
        ema_model: a copy of it, without gradients, that other parts of a config can refer to.
        momentum: share of the newest weights, in (0, 1).
        accumulation_steps: iterations a step of the optimizer; the weights, and so the average, change with a step.
        load_path: not for this handler: train.json looks it up, and MONAI Label gives one in its place.
    """

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module,
        momentum: float,
        accumulation_steps: int = 1,
        load_path: str | None = None,
    ) -> None:
        super().__init__(model, momentum)
        self.ema_model, self.accumulation_steps = ema_model, accumulation_steps

    def attach(self, engine: Engine, name: str = "ema_momentum", warn_if_exists: bool = False) -> None:
        step = Events.ITERATION_COMPLETED(every=self.accumulation_steps)
        engine.add_event_handler(step, self.ramp, name)
        super().attach(engine, name, warn_if_exists, step)

    def ramp(self, engine: Engine, name: str) -> None:
        steps = engine.state.iteration // self.accumulation_steps
        setattr(engine.state, name, max(self.momentum, 9 / (8 + steps)))

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        """Ignite's update in one call for all tensors: ema += momentum (weights - ema). A U-Net has no buffers."""
        momentum = getattr(engine.state, name)
        torch._foreach_lerp_(list(self.ema_model.parameters()), list(self.model.parameters()), momentum)


class GradientNorm:
    """Trainer handler: write the norm of the gradient at each step to TensorBoard, and clip it if that is asked for.

    g <- g min(1, max_norm / |g|), with |g| the L2 norm over all parameters together (Pascanu, Mikolov, Bengio 2013,
    Algorithm 1). It is a hook of the optimizer's step, which sees the sum of all `accumulation_steps`. A `GradScaler`
    leaves the gradients of a fused optimizer scaled until its kernel, and says by what factor in `grad_scale`.

    Args:
        optimizer: whose parameters they are.
        max_norm: the largest norm that is let through, above 0; None for any.
        records: of the run; TensorBoard gets "gradient_norm", before clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None, records: TrainingRecords) -> None:
        self.optimizer, self.max_norm, self.records = optimizer, max_norm, records
        self.warned = False

    def attach(self, engine: Engine) -> None:
        self.optimizer.register_step_pre_hook(partial(self, engine))

    def __call__(self, engine: Engine, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            norm = norm / scale
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        if torch.isfinite(norm):
            self.records.summary_writer.add_scalar("gradient_norm", norm, engine.state.iteration)
        elif scale is None and not self.warned:  # a GradScaler skips such a step
            self.warned = True
            logger.warning(
                f"the gradient is not finite at iteration {engine.state.iteration}, although the loss is: weights may "
                "be lost for good; --amp float32 would be the first thing to try"
            )
