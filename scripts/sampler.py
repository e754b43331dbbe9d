"""Reverse diffusion as one module: noise in, volume out.

Every solver is the same loop over timesteps with a table of coefficients from `scripts.solvers`, computed once in
float64 from the levels that are really visited; after the last timestep comes the data itself.
"""

from __future__ import annotations

import copy
from functools import partial
from unittest import mock

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.nets import diffusion_model_unet
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_dst_type, optional_import
from torch import nn

from scripts.diffusion import check_prediction_type, levels_at, sample_coefficients, training_timesteps
from scripts.errors import BundleError
from scripts.solvers import SOLVERS, visited

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")  # an environment made for MONAI Deploy may lack it


def check_solver(solver: str, num_inference_steps: int, num_train_timesteps: int) -> None:
    """Raises BundleError for an unknown solver or a number of steps that the training schedule does not have."""
    if solver not in SOLVERS:
        raise BundleError(f"solver: {solver!r} is unknown; it must be one of {tuple(SOLVERS)}")
    whole = isinstance(num_inference_steps, int) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= num_train_timesteps:
        raise BundleError(
            f"num_inference_steps: {num_inference_steps!r} was given; it must be a whole number from 1 to "
            f"num_train_timesteps = {num_train_timesteps}"
        )


def volume_seed(noise: torch.Tensor) -> int:
    """A 63-bit number that depends on every value of a tensor and on their order: a weighted sum, modulo 2^63."""
    values = (noise.flatten().double() * 4294967296.0).to(torch.int64)  # 2^32: keeps what distinguishes two noises
    weights = torch.arange(1, values.numel() + 1, device=values.device) * 0x9E3779B97F4A7C1
    return int((values * weights).sum().item()) & 0x7FFFFFFFFFFFFFFF


class DiffusionSampler(nn.Module):
    """The whole reverse diffusion as a module, `forward(noise) -> volume`.

    Its state dict is that of the network alone, so that a plain checkpoint of the network loads into it, and it can be
    scripted (`torch.jit.script`): the network is traced, the loop is compiled, and no device is fixed.

    Args:
        unet: a network (x, timesteps) -> prediction, such as MONAI's `DiffusionModelUNet`.
        scheduler: the MONAI scheduler of the training; only its noise levels are used.
        num_inference_steps: number of network evaluations, 1 .. num_train_timesteps.
        solver: one of `scripts.solvers.SOLVERS`.
        prediction_type: what the network was trained to predict, see `scripts.diffusion`.
        timestep_spacing: one of `scripts.solvers.SPACINGS`.
        sigma_max: with "logsnr", the noise-to-signal ratio to begin at; None for the noisiest timestep.
        eta: scale of the noise that "ddim" (0 by default) and "dpmpp_2m_sde" (1) add on the way; None for the default.
        clip_sample: clamp the predicted x_0 to [-1, 1] at every step (as Dorjsembe et al. do).
        amp_dtype: autocast the network to this type; None for float32. Not used when scripted.
        progress: show a bar over the steps. Not used when scripted.

    Raises:
        BundleError: unknown solver or prediction type, impossible number of steps.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Scheduler,
        num_inference_steps: int,
        solver: str = "ddpm",
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        sigma_max: float | None = None,
        eta: float | None = None,
        clip_sample: bool = True,
        amp_dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        check_solver(solver, num_inference_steps, scheduler.num_train_timesteps)
        check_prediction_type(prediction_type)
        self.with_steps = partial(
            DiffusionSampler,
            scheduler=scheduler,
            solver=solver,
            prediction_type=prediction_type,
            timestep_spacing=timestep_spacing,
            sigma_max=sigma_max,
            eta=eta,
            clip_sample=clip_sample,
            amp_dtype=amp_dtype,
            progress=progress,
        )
        self.unet = unet
        self.clip_sample = clip_sample
        self.amp_dtype = amp_dtype
        self.progress = progress
        timesteps = training_timesteps(scheduler)
        a, s = levels_at(scheduler, timesteps)
        chosen = visited(a.cpu().numpy(), s.cpu().numpy(), num_inference_steps, timestep_spacing, sigma_max)
        a, s = a.cpu()[chosen], s.cpu()[chosen]
        options = {} if eta is None else {"eta": eta}
        steps = SOLVERS[solver](np.append(a.numpy(), 1.0), np.append(s.numpy(), 0.0), **options)
        to_sample = torch.stack(sample_coefficients(prediction_type, a, s), 1)
        table = torch.cat([to_sample, torch.from_numpy(steps)], 1)  # p, q, c_x, c_0, c_1, c_z
        self.stochastic: bool = bool((table[:, 5] > 0).any())
        self.register_buffer("timesteps", timesteps.float()[chosen], persistent=False)
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, noise: torch.Tensor, num_inference_steps: int | None = None) -> torch.Tensor:
        """Standard normal noise (B, C, *spatial) -> volumes of the same shape, in [-1, 1] where `clip_sample`.

        Each volume's later noise comes from a generator of its own, which is derived from its first noise: a volume is
        the same whatever else is in the batch.

        Args:
            noise: where every volume begins.
            num_inference_steps: of this call, where a client asks for another number than the sampler was made for.
                Not used when scripted: an archive has the steps that it was made with.
        """
        with torch.no_grad():
            x = noise
            if torch.jit.is_scripting():
                steps = range(self.timesteps.shape[0])
            else:
                if num_inference_steps not in (None, len(self.timesteps)):
                    return self.with_steps(self.unet, num_inference_steps=num_inference_steps).to(x.device)(x)
                x = x.as_subclass(torch.Tensor)  # a MetaTensor would copy its metadata at every operation
                steps = range(len(self.timesteps))
                if self.progress and has_tqdm:
                    steps = tqdm(steps, "denoising", leave=False)
            generators = self.generators(x)
            x0 = torch.zeros_like(x)
            for i in steps:
                x, x0 = self.step(i, x, x0, generators)
            if not torch.jit.is_scripting():
                if isinstance(noise, MetaTensor):
                    x = convert_to_dst_type(x, noise)[0]
            return x

    def generators(self, noise: torch.Tensor) -> list[torch.Generator]:
        """A generator for each volume of a batch, seeded by its first noise; none for a deterministic solver."""
        generators: list[torch.Generator] = []
        if self.stochastic:
            for i in range(noise.shape[0]):
                generator = torch.Generator(device=noise.device)
                generator.manual_seed(volume_seed(noise[i]))
                generators.append(generator)
        return generators

    def step(
        self, i: int, x: torch.Tensor, previous_x0: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step i: (x at its level, x_0 of the step before) -> (x at the next level, x_0 of this step)."""
        c = self.table[i]
        x0 = c[0] * x + c[1] * self.predict(x, self.timesteps[i].repeat(x.shape[0]))
        if self.clip_sample:
            x0 = x0.clamp(-1.0, 1.0)
        x = c[2] * x + c[3] * x0 + c[4] * previous_x0
        if self.stochastic:
            z: list[torch.Tensor] = []
            for generator in generators:
                z.append(torch.randn(x.shape[1:], generator=generator, device=x.device))
            x = x + c[5] * torch.stack(z)
        return x, x0

    @torch.jit.unused
    @torch.no_grad()
    def trajectory(self, noise: torch.Tensor, every: int = 1) -> list[torch.Tensor]:
        """The volumes on the way: `noise`, x after every `every` steps, and the final volume, each (B, C, *spatial)."""
        x, x0, generators = noise, torch.zeros_like(noise), self.generators(noise)
        volumes = [x]
        for i in range(len(self.timesteps)):
            x, x0 = self.step(i, x, x0, generators)
            if (i + 1) % every == 0 or i + 1 == len(self.timesteps):
                volumes.append(x)
        return volumes

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The network's float32 output for x_t (B, C, *spatial) at timesteps (B,).

        On a CPU volume by volume: as fast as a batch, and with the same rounding whatever the batch is.
        """
        if torch.jit.is_scripting():
            return self.unet(x, timesteps)
        else:
            size = 1 if x.device.type == "cpu" else len(x)
            with torch.autocast(x.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                return torch.cat([self.unet(*part).float() for part in zip(x.split(size), timesteps.split(size))])

    def state_dict(self, *args, **kwargs):
        """The network's own state dict: no prefix, no tables."""
        return self.unet.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load the network's own state dict, or the average in a checkpoint of a whole training run.

        MONAI Label hands over what any file in models/ holds, and is not strict: it would go on with random weights.
        """
        return self.unet.load_state_dict(state_dict.get("ema", state_dict), strict=strict, assign=assign)

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by `torch.jit.script`: a copy of this module with the network replaced by its trace.

        A `DiffusionModelUNet` cannot be scripted, but its trace with (x, timesteps) is exact for all sizes, batches and
        timesteps. The timestep embedding is scripted first, since a trace of it would fix the device.
        """
        scriptable = copy.copy(self)
        scriptable._modules = dict(self._modules)
        conv = next(m for m in self.unet.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
        side = 2 ** len(getattr(self.unet, "block_out_channels", (0,) * 4))
        example = torch.randn(2, conv.in_channels, *[side] * (conv.weight.ndim - 2), device=conv.weight.device)
        embedding = torch.jit.script(diffusion_model_unet.get_timestep_embedding)
        with mock.patch.object(diffusion_model_unet, "get_timestep_embedding", embedding), torch.no_grad():
            unet = torch.jit.trace(self.unet.eval(), (example, torch.tensor([3.0, 1.0], device=example.device)))
        scriptable._modules["unet"] = unet
        return scriptable
