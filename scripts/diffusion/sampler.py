"""Reverse diffusion as one module: noise in, volume out.

Every solver is the same loop over timesteps with a table of coefficients from `scripts.diffusion.solvers`, computed
once in float64 from the levels that are really visited; after the last timestep comes the data itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from inspect import signature

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_dst_type, optional_import
from torch import nn

from scripts.diffusion.asked import conditions_of_text
from scripts.diffusion.background import without_haze
from scripts.diffusion.guidance import GuidedNetwork
from scripts.diffusion.networks import unet_of
from scripts.diffusion.process import levels_at, sample_coefficients, training_timesteps
from scripts.diffusion.scripting import with_traced_network
from scripts.diffusion.solvers import SOLVERS, visited
from scripts.running.checks import as_bool, check_knobs
from scripts.running.errors import BundleError

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")  # an environment made for MONAI Deploy may lack it


def check_solver(solver: str, num_inference_steps: int, num_train_timesteps: int, eta: float | None = None) -> None:
    """Raises BundleError for an unknown solver, a number of steps that the training schedule does not have, or an `eta`
    that is below 0 or that the solver does not take."""
    check_knobs(solver=solver, num_inference_steps=num_inference_steps, eta=eta)
    if num_inference_steps > num_train_timesteps:
        raise BundleError(
            f"num_inference_steps: {num_inference_steps!r} was given; it must be a whole number from 1 to "
            f"num_train_timesteps = {num_train_timesteps}"
        )
    if eta is not None and "eta" not in signature(SOLVERS[solver]).parameters:
        raise BundleError(f"eta: {eta!r} was given, but solver {solver!r} takes none; 'ddim' and 'dpmpp_2m_sde' do")


def volume_seed(noise: torch.Tensor) -> int:
    """A 63-bit number that depends on every value of a tensor and on their order: a weighted sum, modulo 2^63."""
    values = (noise.flatten().double() * 4294967296.0).to(torch.int64)  # 2^32: keeps what distinguishes two noises
    weights = torch.arange(1, values.numel() + 1, device=values.device) * 0x9E3779B97F4A7C1
    return int((values * weights).sum().item()) & 0x7FFFFFFFFFFFFFFF


class DiffusionSampler(GuidedNetwork):
    """The whole reverse diffusion as a module, `forward(noise, conditions=None) -> volume`.

    Its state dict is that of the network alone, so that a plain checkpoint of the network loads into it, and it can be
    scripted (`torch.jit.script`): the network is traced, the loop is compiled, and no device is fixed.

    Args:
        unet, amp_dtype, condition, guidance_scale, halve_batch_on_oom: see `GuidedNetwork`.
        scheduler: the MONAI scheduler of the training; only its noise levels are used.
        num_inference_steps: number of network evaluations, 1 .. num_train_timesteps.
        solver: one of `scripts.diffusion.solvers.SOLVERS`.
        prediction_type: what the network was trained to predict, see `scripts.diffusion.process`.
        timestep_spacing: one of `scripts.diffusion.solvers.SPACINGS`.
        sigma_max: with "logsnr", the noise-to-signal ratio to begin at; None for the noisiest timestep. With wavelets
            it is that of the coarse volume.
        eta: scale of the noise that "ddim" (0 by default) and "dpmpp_2m_sde" (1) add on the way; None for the default.
        clip_sample: clamp the predicted x_0 to [-1, 1] at every step (as Dorjsembe et al. do).
        background: at the end all is -1 but the largest region above this share of the range, see `without_haze`; 0 for
            the network's own background.
        progress: show a bar over the steps. Not used when scripted.

    Raises:
        BundleError: unknown solver or prediction type, impossible number of steps; see also `GuidedNetwork`.
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
        clip_sample: bool | str = True,
        background: float = 0.0,
        amp_dtype: torch.dtype | None = None,
        progress: bool = False,
        condition: int | Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        halve_batch_on_oom: bool | str = True,
    ) -> None:
        super().__init__(unet, condition, guidance_scale, amp_dtype, halve_batch_on_oom)
        check_solver(solver, num_inference_steps, scheduler.num_train_timesteps, eta)
        check_knobs(prediction_type=prediction_type, background=background)
        self.with_steps = partial(
            DiffusionSampler,
            scheduler=scheduler,
            solver=solver,
            prediction_type=prediction_type,
            timestep_spacing=timestep_spacing,
            sigma_max=sigma_max,
            eta=eta,
            clip_sample=clip_sample,
            background=background,
            amp_dtype=amp_dtype,
            progress=progress,
            condition=condition,
            guidance_scale=guidance_scale,
            halve_batch_on_oom=halve_batch_on_oom,
        )
        self.clip_sample, self.background = as_bool(clip_sample=clip_sample), float(background)
        self.progress = progress
        timesteps = training_timesteps(scheduler)
        a, s = levels_at(scheduler, timesteps)
        if sigma_max is not None:  # the coarse volume is to meet this ratio
            sigma_max = sigma_max * getattr(unet, "noise_gain", 1)
        chosen = visited(a.cpu().numpy(), s.cpu().numpy(), num_inference_steps, timestep_spacing, sigma_max)
        a, s = a.cpu()[chosen], s.cpu()[chosen]
        options = {} if eta is None else {"eta": eta}
        steps = SOLVERS[solver](np.append(a.numpy(), 1.0), np.append(s.numpy(), 0.0), **options)
        to_sample = torch.stack(sample_coefficients(prediction_type, a, s), 1)
        table = torch.cat([to_sample, torch.from_numpy(steps)], 1)  # p, q, c_x, c_0, c_1, c_z
        self.stochastic: bool = bool((table[:, 5] > 0).any())
        self.register_buffer("timesteps", timesteps.float()[chosen], persistent=False)
        self.register_buffer("table", table.float(), persistent=False)
        levels = torch.stack([a, s], 1)
        self.register_buffer("levels", levels.float(), persistent=False)  # signal and noise that the steps begin at

    def forward(
        self, noise: torch.Tensor, conditions: torch.Tensor | None = None, num_inference_steps: int | None = None
    ) -> torch.Tensor:
        """Standard normal noise (B, 1, *spatial) -> volumes of the same shape, in [-1, 1] where `clip_sample`.

        A network that is shown images takes them as further channels of the noise, see `GuidedNetwork`.

        Each volume's later noise comes from a generator of its own, which is derived from its first noise: a volume is
        the same whatever else is in the batch.

        Args:
            noise: where every volume begins.
            conditions: (B,) int64 or (B, covariates) float32, see `GuidedNetwork`; None for `condition`. When not
                scripted also a text, such as "{'age': 70}".
            num_inference_steps: of this call, where a client asks for another number than the sampler was made for.
                Not used when scripted: an archive has the steps that it was made with.
        """
        with torch.no_grad():
            x = noise
            if torch.jit.is_scripting():
                steps = range(self.timesteps.shape[0])
            else:
                if isinstance(conditions, str):
                    conditions = conditions_of_text(conditions, getattr(unet_of(self), "covariates", ()), x)
                if num_inference_steps not in (None, len(self.timesteps)):
                    sampler = self.with_steps(self.unet, num_inference_steps=num_inference_steps)
                    return sampler.to(x.device)(x, conditions)
                x = x.as_subclass(torch.Tensor)  # a MetaTensor would copy its metadata at every operation
                steps = range(len(self.timesteps))
                if self.progress and has_tqdm:
                    steps = tqdm(steps, "denoising", leave=False)
            asked, x = self.asked_of(x, conditions), self.without_images(x)
            x0, generators = torch.zeros_like(x), self.generators(x)
            for i in steps:
                x, x0 = self.step(i, x, x0, asked, generators)
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
        self,
        i: int,
        x: torch.Tensor,
        previous_x0: torch.Tensor,
        asked: tuple[torch.Tensor, torch.Tensor],
        generators: list[torch.Generator],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step i: (x at its level, x_0 of the step before) -> (x at the next level, x_0 of this step).

        After the last one x is the volume, whose background is made one.
        """
        x0 = self.sample(i, x, asked)
        x = self.onward(i, x, x0, previous_x0, generators)
        return (without_haze(x, self.background) if i == self.timesteps.shape[0] - 1 else x), x0

    def sample(self, i: int, x: torch.Tensor, asked: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The network's opinion of x_0 at step i."""
        c = self.table[i]
        x0 = c[0] * x + c[1] * self.predict(x, self.timesteps[i].repeat(x.shape[0]), asked)
        return x0.clamp(-1.0, 1.0) if self.clip_sample else x0

    def onward(
        self, i: int, x: torch.Tensor, x0: torch.Tensor, previous_x0: torch.Tensor, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """x at the level of step i -> x at the next level."""
        c = self.table[i]
        x = c[2] * x + c[3] * x0 + c[4] * previous_x0
        if self.stochastic:
            z: list[torch.Tensor] = []
            for generator in generators:
                z.append(torch.randn(x.shape[1:], generator=generator, device=x.device))
            x = x + c[5] * torch.stack(z)
        return x

    @torch.jit.unused
    def on_the_way(self, noise: torch.Tensor, conditions: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """x after each step, (B, 1, *spatial), one at a time: the last is what `forward` returns for the same."""
        noise = torch.as_tensor(noise).as_subclass(torch.Tensor)
        with torch.no_grad():
            asked, x = self.asked_of(noise, conditions), self.without_images(noise)
            x0, generators = torch.zeros_like(x), self.generators(x)
        for i in range(len(self.timesteps)):
            with torch.no_grad():  # not around the `yield`, where other code runs
                x, x0 = self.step(i, x, x0, asked, generators)
            yield x

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by `torch.jit.script`."""
        return with_traced_network(self)
