"""Noise, timesteps and conditions of a training or validation batch, as functions of seed and draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from monai.engines import DiffusionPrepareBatch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import RFlowScheduler, Scheduler
from monai.utils import unsqueeze_right

from scripts.diffusion.process import levels_at, target, timestep_at, training_timesteps
from scripts.running.checks import check_knobs
from scripts.running.condition_images import CONDITION_IMAGE
from scripts.running.covariates import Covariate, unknown_of


class SeededPrepareBatch(DiffusionPrepareBatch):
    """MONAI's `DiffusionPrepareBatch` for any prediction type, with reproducible noise.

    Each sample of a batch has its own generator, seeded by (seed, draw): the noise of a draw is the same whatever the
    batch size, the number of processes, or how often the run was stopped and resumed.

    Args:
        scheduler: the MONAI scheduler that holds `alphas_cumprod`.
        prediction_type: what the network predicts, see `scripts.diffusion.process`.
        seed: of all noise.
        timestep_sampling: how timesteps are drawn, with the noise-to-signal ratio sigma = s / a:
            "uniform": from [0, T) (Ho et al. 2020, Algorithm 1), or as an `RFlowScheduler` says;
            "balanced": half of the draws so, the other half uniformly in log sigma up to `sigma_max`;
            "lognormal": three quarters log sigma ~ N(-1.2, 1.2^2) (Karras et al. 2022, table 1), which hardly ever
                comes to where a whole brain is decided, and one quarter uniformly in log sigma from -1.2 to there.
        sigma_max: where both end; None for the noisiest timestep with any signal.
        num_strata: n > 0 draws the timestep of draw d uniformly from the (d mod n)-th of n equal parts of [0, T), so
            that validation covers all of them; `timestep_sampling` does not count then.
        covariates: what the network is told of each item, its "condition", see `scripts.running.covariates`.
        class_dropout: probability that a draw loses its condition, which becomes "unknown", so that the network learns
            both (Ho & Salimans 2022, Algorithm 1), and with it its condition image, which becomes 0. Of several
            covariates each may also be lost alone, as probably, and so may the condition image.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        prediction_type: str,
        seed: int = 0,
        timestep_sampling: str = "uniform",
        sigma_max: float | None = None,
        num_strata: int = 0,
        covariates: Sequence[Covariate] = (),
        class_dropout: float = 0.0,
    ) -> None:
        super().__init__(num_train_timesteps=scheduler.num_train_timesteps)
        check_knobs(prediction_type=prediction_type, timestep_sampling=timestep_sampling)
        self.scheduler, self.prediction_type, self.seed, self.num_strata = scheduler, prediction_type, seed, num_strata
        self.class_dropout, self.unknown = class_dropout, torch.tensor(unknown_of(covariates))
        self.condition_key = "condition" if covariates else None
        self.timestep_sampling = timestep_sampling
        whole = training_timesteps(scheduler)
        self.whole_range = int(whole[0]), int(whole[-1])
        a, s = levels_at(scheduler, whole)
        sigmas = (s / a)[a > 0]
        self.sigma_range = float(sigmas[0]), min(float(sigmas[-1]), sigma_max or float("inf"))

    def draw(self, draw: int, shape: torch.Size, device: torch.device) -> tuple[float, torch.Tensor]:
        """(timestep, noise of `shape` on `device`) of one sample; the timestep of rectified flow need not be whole."""
        state = np.random.SeedSequence([self.seed, draw, 0]).generate_state(2, np.uint64)
        u = state[0] / 2.0**64
        if self.num_strata:
            timestep = self.uniform_timestep((draw % self.num_strata + u) / self.num_strata)
        else:
            timestep = self.timestep(u)
        generator = torch.Generator(device).manual_seed(int(state[1]))
        return timestep, torch.randn(shape, generator=generator, device=device)

    def timestep(self, u: float) -> float:
        """The u-quantile, in (0, 1), of the timesteps that `timestep_sampling` names, or of one part of them."""
        if self.timestep_sampling == "uniform":
            return self.uniform_timestep(u)
        if self.timestep_sampling == "lognormal":
            if u >= 0.75:
                return self.log_uniform_timestep(math.exp(-1.2), 4 * u - 3)
            return self.timestep_of(math.exp(NormalDist(-1.2, 1.2).inv_cdf(max(u / 0.75, 1e-12))))
        return self.uniform_timestep(2 * u) if u < 0.5 else self.log_uniform_timestep(self.sigma_range[0], 2 * u - 1)

    def log_uniform_timestep(self, low: float, u: float) -> float:
        """The u-quantile of the timesteps that are uniform in log sigma from `low` up to `sigma_max`."""
        return self.timestep_of(low * (self.sigma_range[1] / low) ** u)

    def timestep_of(self, sigma: float) -> float:
        """The timestep at which s / a is nearest to `sigma`; a fraction where the scheduler takes one."""
        a = torch.tensor(1 / math.hypot(1, sigma), dtype=torch.float64)
        timestep = float(timestep_at(self.scheduler, a, sigma * a))
        if isinstance(self.scheduler, RFlowScheduler) and not self.scheduler.use_discrete_timesteps:
            return timestep
        first, last = self.whole_range
        return min(max(round(timestep), first), last)

    def uniform_timestep(self, u: float) -> float:
        """The u-quantile of all timesteps, or of those that an `RFlowScheduler` names."""
        if isinstance(self.scheduler, RFlowScheduler):
            return self.rectified_flow_timestep(u)
        return min(int(u * self.num_train_timesteps), self.num_train_timesteps - 1)

    def rectified_flow_timestep(self, u: float) -> float:
        """The u-quantile of the distribution of timesteps that an `RFlowScheduler` names: uniform or logit-normal."""
        if self.scheduler.sample_method == "logit-normal":
            normal = self.scheduler.distribution.base_dist.base_dist
            u = float(torch.sigmoid(normal.icdf(torch.tensor(u).clamp(1e-6, 1 - 1e-6))))
        timestep = u * self.num_train_timesteps
        return min(int(timestep) + 1, self.num_train_timesteps) if self.scheduler.use_discrete_timesteps else timestep

    def dropped(self, draw: int) -> list[bool]:
        """Whether a draw loses all that it is told and shown, each of its covariates, and its condition image."""
        # the third word sets this stream apart from the noise (0) and from the random transforms (1)
        words = np.random.SeedSequence([self.seed, draw, 2]).generate_state(2 + self.unknown.numel(), np.uint64)
        whole, *parts = (words / 2.0**64 < self.class_dropout).tolist()
        return [whole, *(whole or part for part in parts)]

    def kept(self, draw: int, condition: torch.Tensor) -> torch.Tensor:
        """The condition of one sample, or what is left of it where this draw drops it, or parts of it."""
        whole, *parts, _ = self.dropped(draw)
        return torch.where(torch.tensor(parts if self.unknown.ndim else whole), self.unknown, condition)

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict]:
        """{"image": (B, C, *spatial) in [-1, 1], "draw": (B,)} -> (x_0, target, (), {"noise", "timesteps"}).

        With covariates, "condition" of the batch, (B,) int64 or (B, covariates) float32, becomes "class_labels" of the
        last, as MONAI's U-Net calls it. A "condition_image" of the batch, (B, C, *spatial), becomes "condition" of the
        last, in the mode "concat" of MONAI's `DiffusionInferer`.
        """
        images = batchdata["image"].to(device=device, non_blocking=non_blocking, **kwargs)
        drawn = [self.draw(int(d), images.shape[1:], images.device) for d in batchdata["draw"]]
        timesteps = torch.tensor([t for t, _ in drawn]).to(images.device, non_blocking=non_blocking)
        noise = torch.stack([n for _, n in drawn])
        a, s = levels_at(self.scheduler, timesteps)
        a, s = (unsqueeze_right(level.to(images.dtype), images.ndim) for level in (a, s))
        wanted = target(self.prediction_type, images, noise, a, s)
        extra = {"noise": noise, "timesteps": timesteps}
        if self.condition_key:
            conditions = [self.kept(int(d), c) for d, c in zip(batchdata["draw"], batchdata[self.condition_key])]
            extra["class_labels"] = torch.stack(conditions).to(images.device, non_blocking=non_blocking)
        if CONDITION_IMAGE in batchdata:
            shown = batchdata[CONDITION_IMAGE].to(images, non_blocking=non_blocking)
            kept = torch.tensor([not self.dropped(int(d))[-1] for d in batchdata["draw"]]).to(images)
            extra |= {"condition": shown * unsqueeze_right(kept, shown.ndim), "mode": "concat"}
        return images, wanted, (), extra


class AutocastDiffusionInferer(DiffusionInferer):
    """MONAI's `DiffusionInferer` under autocast (MONAI's engines autocast on CUDA only), and with conditions.

    Args:
        scheduler: the diffusion scheduler, which adds the noise.
        amp_dtype: type for autocast, or None for plain float32; see `scripts.diffusion.acceleration.amp_dtype`.
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
        """x_0 (B, C, *spatial), conditions (B, ...) if any -> the prediction for its noisy version, float32.

        What else there may be, such as condition images, is as MONAI's inferer takes it.
        """
        if class_labels is not None:  # MONAI's own call has no way for them
            diffusion_model = partial(diffusion_model, class_labels=class_labels)
        with torch.autocast(inputs.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return super().__call__(inputs, diffusion_model, *args, **kwargs).float()
