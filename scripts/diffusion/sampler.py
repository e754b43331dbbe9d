"""Reverse diffusion as one module: noise in, volume out.

Every solver is the same loop over timesteps with a table of coefficients from `scripts.diffusion.solvers`, computed
once in float64 from the levels that are really visited; after the last timestep comes the data itself.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from inspect import signature
from unittest import mock

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.nets import diffusion_model_unet
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_dst_type, optional_import
from torch import nn

from scripts.diffusion.networks import unet_of
from scripts.diffusion.process import levels_at, sample_coefficients, training_timesteps
from scripts.diffusion.solvers import SOLVERS, visited
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError
from scripts.running.out_of_memory import numbers, out_of_memory

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")  # an environment made for MONAI Deploy may lack it
logger = logging.getLogger(__name__)


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


class DiffusionSampler(nn.Module):
    """The whole reverse diffusion as a module, `forward(noise, class_labels=None) -> volume`.

    Its state dict is that of the network alone, so that a plain checkpoint of the network loads into it, and it can be
    scripted (`torch.jit.script`): the network is traced, the loop is compiled, and no device is fixed.

    A network with `num_class_embeds` n knows the classes 0 .. n - 2, and n - 1 is "no class". Its output is guided
    (Ho & Salimans 2022, Eq. 6, whose w is guidance_scale - 1):

        guided = unconditional + guidance_scale * (conditional - unconditional).

    They guide the noise, but for a given x_t every prediction type is an affine function of the noise, and the two
    weights of the outputs, 1 - scale and scale, add up to 1: guiding any of them is the same.

    Args:
        unet: a network (x, timesteps) -> prediction, such as MONAI's `DiffusionModelUNet`; with classes,
            (x, timesteps, class_labels=...) -> prediction.
        scheduler: the MONAI scheduler of the training; only its noise levels are used.
        num_inference_steps: number of network evaluations, 1 .. num_train_timesteps.
        solver: one of `scripts.diffusion.solvers.SOLVERS`.
        prediction_type: what the network was trained to predict, see `scripts.diffusion.process`.
        timestep_spacing: one of `scripts.diffusion.solvers.SPACINGS`.
        sigma_max: with "logsnr", the noise-to-signal ratio to begin at; None for the noisiest timestep. With wavelets
            it is that of the coarse volume.
        eta: scale of the noise that "ddim" (0 by default) and "dpmpp_2m_sde" (1) add on the way; None for the default.
        clip_sample: clamp the predicted x_0 to [-1, 1] at every step (as Dorjsembe et al. do).
        class_label: index of the class of all volumes where `forward` is given none; None for no class.
        guidance_scale: 1 takes the conditional output as it is, with one pass of the network a step; others take two.
        amp_dtype: autocast the network to this type; None for float32. Not used when scripted.
        progress: show a bar over the steps. Not used when scripted.
        halve_batch_on_oom: where a GPU's memory does not suffice for a pass of the network, take half as many volumes
            at a time from there on, down to one; the volumes are the same. Not used when scripted.

    Raises:
        BundleError: unknown solver or prediction type, impossible number of steps, a class that the network lacks,
            guidance of a network without classes; when called, a pass that the GPU's memory does not suffice for.
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
        class_label: int | None = None,
        guidance_scale: float = 1.0,
        halve_batch_on_oom: bool = True,
    ) -> None:
        super().__init__()
        check_solver(solver, num_inference_steps, scheduler.num_train_timesteps, eta)
        check_knobs(prediction_type=prediction_type, guidance_scale=guidance_scale)
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
            class_label=class_label,
            guidance_scale=guidance_scale,
            halve_batch_on_oom=halve_batch_on_oom,
        )
        self.unet = unet
        self.clip_sample = clip_sample
        self.amp_dtype = amp_dtype
        self.progress = progress
        self.halve_batch_on_oom = halve_batch_on_oom
        self.most: int = 0  # volumes of a pass that the memory suffices for; 0 where nothing speaks against any number
        self.num_class_embeds = getattr(unet, "num_class_embeds", None)
        self.no_class = (self.num_class_embeds or 1) - 1
        self.class_label = self.no_class if class_label is None else class_label
        self.guidance_scale = float(guidance_scale)
        if not 0 <= self.class_label <= self.no_class:
            raise BundleError(
                f"class_label: {class_label!r} was given, but the network knows {self.no_class} classes; an index from "
                f"0 to {self.no_class}, the last for no class, would be right"
            )
        if self.guidance_scale != 1 and not self.no_class:
            raise BundleError(
                f"guidance_scale: {guidance_scale!r} was given, but the network knows no classes; 1 would be right"
            )
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

    def forward(
        self, noise: torch.Tensor, class_labels: torch.Tensor | None = None, num_inference_steps: int | None = None
    ) -> torch.Tensor:
        """Standard normal noise (B, C, *spatial) -> volumes of the same shape, in [-1, 1] where `clip_sample`.

        Each volume's later noise comes from a generator of its own, which is derived from its first noise: a volume is
        the same whatever else is in the batch.

        Args:
            noise: where every volume begins.
            class_labels: (B,) indices of classes; None for `class_label`. A network without classes does not need them.
            num_inference_steps: of this call, where a client asks for another number than the sampler was made for.
                Not used when scripted: an archive has the steps that it was made with.
        """
        with torch.no_grad():
            x = noise
            if torch.jit.is_scripting():
                steps = range(self.timesteps.shape[0])
            else:
                if num_inference_steps not in (None, len(self.timesteps)):
                    sampler = self.with_steps(self.unet, num_inference_steps=num_inference_steps)
                    return sampler.to(x.device)(x, class_labels)
                x = x.as_subclass(torch.Tensor)  # a MetaTensor would copy its metadata at every operation
                steps = range(len(self.timesteps))
                if self.progress and has_tqdm:
                    steps = tqdm(steps, "denoising", leave=False)
            labels, generators = self.labels(x, class_labels), self.generators(x)
            x0 = torch.zeros_like(x)
            for i in steps:
                x, x0 = self.step(i, x, x0, labels, generators)
            if not torch.jit.is_scripting():
                if isinstance(noise, MetaTensor):
                    x = convert_to_dst_type(x, noise)[0]
            return x

    def labels(self, noise: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """The class of each volume of a batch, (B,) int64: those given, or `class_label`."""
        if class_labels is None:
            return torch.full((noise.shape[0],), self.class_label, dtype=torch.int64, device=noise.device)
        return class_labels

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
        class_labels: torch.Tensor,
        generators: list[torch.Generator],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step i: (x at its level, x_0 of the step before) -> (x at the next level, x_0 of this step)."""
        c = self.table[i]
        x0 = c[0] * x + c[1] * self.predict(x, self.timesteps[i].repeat(x.shape[0]), class_labels)
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
        x, x0 = noise, torch.zeros_like(noise)
        labels, generators = self.labels(noise, None), self.generators(noise)
        volumes = [x]
        for i in range(len(self.timesteps)):
            x, x0 = self.step(i, x, x0, labels, generators)
            if (i + 1) % every == 0 or i + 1 == len(self.timesteps):
                volumes.append(x)
        return volumes

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """The guided float32 output of the network for x_t (B, C, *spatial) at timesteps (B,) and class labels (B,)."""
        conditional = self.output(x, timesteps, class_labels)
        if self.guidance_scale == 1.0:
            return conditional
        unconditional = self.output(x, timesteps, torch.full_like(class_labels, self.no_class))
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def output(self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """One pass of the network, float32."""
        if torch.jit.is_scripting():
            return self.call(x, timesteps, class_labels)
        else:
            with torch.autocast(x.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                return self.output_in_parts(x, timesteps, class_labels)

    @torch.jit.unused
    def volumes_at_once(self, x: torch.Tensor) -> int:
        """How many volumes of a batch a pass takes.

        On a CPU one: as fast as a batch, and with the same rounding whatever the batch is.
        """
        size = 1 if x.device.type == "cpu" else len(x)
        return min(size, self.most or size)

    @torch.jit.unused
    def output_in_parts(self, *inputs: torch.Tensor) -> torch.Tensor:
        """A pass over as many volumes at a time as the memory suffices for."""
        while True:
            size = self.volumes_at_once(inputs[0])
            try:
                return torch.cat([self.call(*part).float() for part in zip(*(t.split(size) for t in inputs))])
            except torch.OutOfMemoryError as e:
                if size == 1 or not self.halve_batch_on_oom:
                    raise self.explained(e, size, inputs[0]) from e
                reason = numbers(e)
            # outside of the handler, whose exception holds the tensors of the pass
            self.most = size // 2
            torch.cuda.empty_cache()
            logger.warning(f"out of GPU memory with {size} volumes at a time ({reason}): going on with {self.most}")

    @torch.jit.unused
    def explained(self, error: torch.OutOfMemoryError, size: int, x: torch.Tensor) -> BundleError:
        advice = [f"--batch_size {size // 2}", "--halve_batch_on_oom true"] if size > 1 else []
        if self.amp_dtype is None:
            advice.append("--amp auto")
        knobs = {"batch_size": size, "spatial_shape": list(x.shape[2:]), "amp": self.amp_dtype or torch.float32}
        return out_of_memory(error, "in sampling", [*advice, "a smaller spatial_shape", "fewer channels"], **knobs)

    def call(self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """The network as it is. TorchScript compiles one branch only, for it sees whether the number is None."""
        if self.num_class_embeds is None:
            return self.unet(x, timesteps)
        else:
            return self.unet(x, timesteps, class_labels=class_labels)

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

        A `DiffusionModelUNet` cannot be scripted, but its trace with (x, timesteps), and class labels where it has
        classes, is exact for all sizes, batches, timesteps and classes. The timestep embedding is scripted first, since
        a trace of it would fix the device.
        """
        scriptable = copy.copy(self)
        scriptable._modules = dict(self._modules)
        weight = next(p for p in self.unet.parameters() if p.ndim in (4, 5))
        levels = len(getattr(unet_of(self), "block_out_channels", (0,) * 4))
        side = 2 ** (levels + getattr(self.unet, "wavelet_levels", 0))
        channels = getattr(self.unet, "in_channels", weight.shape[1])
        example = torch.randn(2, channels, *[side] * (weight.ndim - 2), device=weight.device)
        embedding = torch.jit.script(diffusion_model_unet.get_timestep_embedding)
        inputs = {"x": example, "timesteps": torch.tensor([3.0, 1.0], device=example.device)}
        if self.num_class_embeds is not None:
            inputs["class_labels"] = torch.tensor([0, self.no_class], device=example.device)
        with mock.patch.object(diffusion_model_unet, "get_timestep_embedding", embedding), torch.no_grad():
            unet = torch.jit.trace(self.unet.eval(), example_kwarg_inputs=inputs)
        scriptable._modules["unet"] = unet
        return scriptable
