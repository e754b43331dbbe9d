"""Reverse diffusion as one module: noise in, volume out.

Every solver is the same loop over timesteps t_0 > t_1 > ... with its own table of coefficients,

    x_0 = p x + q network(x, t_i)          the network's opinion of the clean volume
    x  <- c_x x + c_0 x_0 + c_z z          z ~ N(0, I)

computed once in float64 from the levels that are really visited. After the last timestep comes the data itself
(alphas_cumprod = 1).
"""

from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.nets import diffusion_model_unet
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_dst_type
from torch import nn
from tqdm import tqdm

from scripts.diffusion import check_prediction_type, epsilon_coefficients, levels, posterior, sample_coefficients
from scripts.errors import BundleError

SOLVERS = ("ddpm", "ddim")


def check_solver(solver: str, num_inference_steps: int, num_train_timesteps: int) -> None:
    """Raises BundleError for an unknown solver or a number of steps that the training schedule does not have."""
    if solver not in SOLVERS:
        raise BundleError(f"solver: {solver!r} is unknown; it must be one of {SOLVERS}")
    whole = isinstance(num_inference_steps, int) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= num_train_timesteps:
        raise BundleError(
            f"num_inference_steps: {num_inference_steps!r} was given; it must be a whole number from 1 to "
            f"num_train_timesteps = {num_train_timesteps}"
        )


def visited_timesteps(num_inference_steps: int, num_train_timesteps: int) -> torch.Tensor:
    """T-1 ... 0, evenly spaced and rounded, descending: (num_inference_steps,) int64."""
    return torch.from_numpy(np.linspace(num_train_timesteps - 1, 0, num_inference_steps).round().astype(np.int64))


def solver_table(solver: str, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Coefficients (c_x, c_0, c_z) of every step, as a float64 tensor (steps, 3).

    Args:
        solver: "ddpm", ancestral sampling (Ho et al. 2020, Alg. 2, on any subsequence of the timesteps), or
            "ddim", deterministic (Song et al. 2021, Eq. 12 with eta = 0).
        alphas_cumprod: at the visited timesteps, noisiest first, float64 (steps,).
    """
    after = torch.cat([alphas_cumprod[1:], alphas_cumprod.new_ones(1)])
    if solver == "ddpm":
        c_x, c_0, variance = posterior(alphas_cumprod, after)
        return torch.stack([c_x, c_0, variance.sqrt()], 1)
    (a, s), (a_after, s_after) = levels(alphas_cumprod), levels(after)
    # x = a_after x_0 + s_after e with e = (x_t - a x_0) / s
    p, q = epsilon_coefficients("sample", a, s)
    return torch.stack([s_after * p, a_after + s_after * q, torch.zeros_like(a)], 1)


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
        scheduler: a MONAI scheduler; only its `alphas_cumprod` and `num_train_timesteps` are used.
        num_inference_steps: number of network evaluations, 1 .. num_train_timesteps.
        solver: one of `SOLVERS`.
        prediction_type: what the network was trained to predict, see `scripts.diffusion`.
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
        clip_sample: bool = True,
        amp_dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        check_solver(solver, num_inference_steps, scheduler.num_train_timesteps)
        check_prediction_type(prediction_type)
        self.unet = unet
        self.clip_sample = clip_sample
        self.amp_dtype = amp_dtype
        self.progress = progress
        timesteps = visited_timesteps(num_inference_steps, scheduler.num_train_timesteps)
        alphas_cumprod = scheduler.alphas_cumprod.cpu().double()[timesteps]
        table = torch.cat(
            [
                torch.stack(sample_coefficients(prediction_type, *levels(alphas_cumprod)), 1),
                solver_table(solver, alphas_cumprod),
            ],
            1,
        )
        self.stochastic: bool = bool((table[:, 4] > 0).any())
        self.register_buffer("timesteps", timesteps.float(), persistent=False)
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Standard normal noise (B, C, *spatial) -> volumes of the same shape, in [-1, 1] where `clip_sample`.

        Each volume's later noise comes from a generator of its own, which is derived from its first noise: a volume is
        the same whatever else is in the batch.
        """
        with torch.no_grad():
            x = noise
            generators: list[torch.Generator] = []
            if torch.jit.is_scripting():
                steps = range(self.timesteps.shape[0])
            else:
                x = x.as_subclass(torch.Tensor)  # a MetaTensor would copy its metadata at every operation
                steps = tqdm(range(len(self.timesteps)), "denoising", leave=False, disable=not self.progress)
            if self.stochastic:
                for i in range(x.shape[0]):
                    generator = torch.Generator(device=x.device)
                    generator.manual_seed(volume_seed(x[i]))
                    generators.append(generator)
            for i in steps:
                c = self.table[i]
                x0 = c[0] * x + c[1] * self.predict(x, self.timesteps[i].expand(x.shape[0]))
                if self.clip_sample:
                    x0 = x0.clamp(-1.0, 1.0)
                x = c[2] * x + c[3] * x0
                if self.stochastic:
                    z: list[torch.Tensor] = []
                    for generator in generators:
                        z.append(torch.randn(x.shape[1:], generator=generator, device=x.device))
                    x = x + c[4] * torch.stack(z)
            if not torch.jit.is_scripting():
                if isinstance(noise, MetaTensor):
                    x = convert_to_dst_type(x, noise)[0]
            return x

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The network's float32 output for x_t (B, C, *spatial) at timesteps (B,)."""
        if torch.jit.is_scripting():
            return self.unet(x, timesteps)
        else:
            with torch.autocast(x.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                return self.unet(x, timesteps).float()

    def state_dict(self, *args, **kwargs):
        """The network's own state dict: no prefix, no tables."""
        return self.unet.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load the network's own state dict."""
        return self.unet.load_state_dict(state_dict, strict=strict, assign=assign)

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
