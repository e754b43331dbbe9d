"""Haar wavelets around a U-Net: the same volume for an eighth of the work, and a coarse network grown into a finer one.

K is the orthonormal Haar transform. In d dimensions it turns each block of 2^d voxels into one band of means (LLL)
and 2^d - 1 bands of details, at half the side. K e is white noise if e is, so noise, schedule, prediction types,
solvers and losses stay in voxels and know nothing of it; only the network works on bands. Each band b has a diffusion
process of its own. With the levels a', s' of the voxels and the size sigma_b of the band,

    (K x_t)_b = a' sigma_b m_b + s' e_b,    n_b = sqrt(sigma_b^2 a'^2 + s'^2),    m_b = (K x_0)_b / sigma_b,
    X_b = (K x_t)_b / n_b = a_b m_b + s_b e_b,    a_b = sigma_b a' / n_b,    s_b = s' / n_b,    a_b^2 + s_b^2 = 1.

For LLL of L levels sigma = 2^(d L / 2), so that m is the mean of a block: X is then what a network at the coarse size
was trained on, at the time at which its own schedule has the ratio s_b / a_b. The network is told that time, and its
output for LLL is what that coarse network predicts. So a coarse network is the exact beginning of a finer one.

For details sigma is their root mean square, and the network predicts v. That is the preconditioning of Karras et al.
2022 (Eq. 7: c_in = 1 / n_b, c_skip and c_out), up to the sign of the output.

Condition images, which have no noise, go beside the bands as they are: the voxels of each block as channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler, Scheduler
from monai.utils import unsqueeze_right
from torch import nn

from scripts.diffusion.embedding import with_covariates
from scripts.diffusion.process import index_at, levels_at, log_sigmas, sample_coefficients, training_timesteps
from scripts.running.covariates import Covariate
from scripts.running.errors import BundleError

DETAIL_RMS = (0.15, 0.055, 0.03)  # measured on T1-weighted brains of 64^3 in [-1, 1]
FIRST, LAST = "conv_in.conv.", "out.2.conv."  # the layers of a U-Net that meet the bands


def halved(x: torch.Tensor, mixed: bool) -> torch.Tensor:
    """(B, C, *spatial) -> (B, 2^d C, *spatial / 2): the voxels of each block of 2^d as channels.

    Args:
        x: every side even.
        mixed: by the orthonormal Haar matrix, so that the first C channels are sums of a block over sqrt(2^d); else the
            voxels as they are (space to depth).
    """
    for axis in range(2, x.ndim):
        even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
        x = torch.cat([even + odd, even - odd], 1) * 0.5**0.5 if mixed else torch.cat([even, odd], 1)
    return x


def doubled(y: torch.Tensor, mixed: bool) -> torch.Tensor:
    """The inverse of `halved`."""
    for axis in reversed(range(2, y.ndim)):
        even, odd = y.chunk(2, 1)
        if mixed:
            even, odd = (even + odd) * 0.5**0.5, (even - odd) * 0.5**0.5
        y = torch.stack([even, odd], axis + 1).flatten(axis, axis + 1)
    return y


def analysed(x: torch.Tensor, levels: int) -> torch.Tensor:
    """K x: one channel (B, 1, *spatial) -> bands (B, 2^(d levels), *spatial / 2^levels).

    Channel 0 is LLL of the coarsest level. Its details follow, then those of the finer levels, whose voxels are moved
    to the coarsest grid, so that the bands of fewer levels are the first channels of those of more.
    """
    low, details = x, []
    for _ in range(levels):
        y = halved(low, mixed=True)
        low, high = y[:, :1], y[:, 1:]
        details = [high, *(halved(finer, mixed=False) for finer in details)]
    return torch.cat([low, *details], 1)


def synthesised(bands: torch.Tensor, levels: int) -> torch.Tensor:
    """K^T: the inverse of `analysed`."""
    blocks = 2 ** (bands.ndim - 2)
    low, finer = bands[:, :1], bands[:, 1:]
    for _ in range(levels):
        high, finer = finer[:, : blocks - 1], finer[:, blocks - 1 :]
        low = doubled(torch.cat([low, high], 1), mixed=True)
        finer = doubled(finer, mixed=False)  # of no channels after the last level
    return low


def in_blocks(images: torch.Tensor, levels: int) -> torch.Tensor:
    """(B, C, *spatial) -> (B, 2^(d levels) C, *spatial / 2^levels): all voxels of a channel, then of the next."""
    blocks = images.split(1, 1)
    for _ in range(levels):
        blocks = [halved(block, mixed=False) for block in blocks]
    return torch.cat(list(blocks), 1)


def band_sizes(spatial_dims: int, levels: int, detail_rms: Sequence[float] = DETAIL_RMS) -> torch.Tensor:
    """sigma of each band, in the order of `analysed`: (2^(d levels),) float64.

    Args:
        detail_rms: root mean square of the details with 1, 2 (and 3) differences, at the finest level; those of the
            next level are the same in units of its own voxels.
    """
    finest = torch.tensor([detail_rms[i.bit_count() - 1] for i in range(1, 2**spatial_dims)], dtype=torch.float64)
    parts = [torch.tensor([2 ** (spatial_dims * levels / 2)], dtype=torch.float64)]
    for finer in range(levels):  # levels that are finer than the coarsest
        gain = 2 ** (spatial_dims * (levels - 1 - finer) / 2)
        parts.append((gain * finest).repeat(2 ** (spatial_dims * finer)))
    return torch.cat(parts)


class WaveletUNet(nn.Module):
    """A U-Net on Haar bands, with the input, output and state dict that it would have had on voxels.

    Args:
        unet: (B, r (1 + C), *spatial / 2^L), times (B,) -> (B, r, *spatial / 2^L) with r = 2^(d L) and C channels of
            condition images.
        wavelet_levels: L, 1 or 2.
        scheduler: of the voxels; gives their noise levels.
        prediction_type: what `forward` gives, see `scripts.diffusion.process`.
        coarse: process of LLL, see `coarse_process`.
        detail_rms: see `band_sizes`.

    Raises:
        BundleError: the U-Net has other channels, or `detail_rms` has too few numbers.
    """

    def __init__(
        self,
        unet: nn.Module,
        wavelet_levels: int,
        scheduler: Scheduler,
        prediction_type: str,
        coarse: dict[str, Any],
        detail_rms: Sequence[float] = DETAIL_RMS,
    ) -> None:
        super().__init__()
        spatial_dims = next(p.ndim for p in unet.parameters() if p.ndim in (4, 5)) - 2
        channels = 2 ** (spatial_dims * wavelet_levels)
        if unet.out_channels != channels or unet.in_channels % channels:
            raise BundleError(
                f"wavelet_levels: {wavelet_levels} in {spatial_dims}D takes a network of {channels} input and output "
                f"channels, but the U-Net has in_channels {unet.in_channels} and out_channels {unet.out_channels}"
            )
        if len(detail_rms) < spatial_dims:
            raise BundleError(f"detail_rms: {detail_rms!r} was given; it must be {spatial_dims} numbers")
        self.unet = unet
        self.wavelet_levels, self.prediction_type = wavelet_levels, prediction_type
        self.in_channels, self.out_channels = unet.in_channels // channels, 1
        self.num_class_embeds = unet.num_class_embeds
        self.register_buffer("sizes", band_sizes(spatial_dims, wavelet_levels, detail_rms), persistent=False)
        self.noise_gain = float(self.sizes[0])  # the voxels' noise-to-signal ratio over that of the coarse volume
        self.coarse, self.coarse_type = coarse, coarse["prediction_type"]
        self.levels_at = partial(levels_at, scheduler)  # MONAI's scheduler is a `Module` that cannot be scripted
        coarse_scheduler = scheduler_of(coarse)
        self.coarse_timesteps = coarse_scheduler.num_train_timesteps
        straight = isinstance(coarse_scheduler, RFlowScheduler)
        self.register_buffer("coarse_log_sigmas", None if straight else log_sigmas(coarse_scheduler), persistent=False)
        self.continuous = isinstance(scheduler, RFlowScheduler)
        if not self.continuous:  # whole timesteps: what depends on them is computed once
            times, coefficients = self.arithmetic(training_timesteps(scheduler))
            self.register_buffer("times", times.float(), persistent=False)
            self.register_buffer("coefficients", coefficients.float(), persistent=False)

    def arithmetic(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The U-Net's own times (B,), and (B, 3, r): c_in, c_x, c_f of each band, float64, with

        prediction = K^T (c_x K x_t + c_f unet(c_in K x_t, times)).
        """
        a, s = (level[:, None] for level in self.levels_at(timesteps))
        s = s.clamp(min=1e-6)  # rectified flow has a time without noise, at which its prediction has no meaning
        sizes = self.sizes
        n = (sizes**2 * a**2 + s**2).sqrt()
        a_b, s_b = sizes * a / n, s / n
        p_mean, q_mean = sample_coefficients(self.coarse_type, a_b[:, :1], s_b[:, :1])
        p_detail, q_detail = sample_coefficients("v_prediction", a_b[:, 1:], s_b[:, 1:])
        p_b, q_b = torch.cat([p_mean, p_detail], 1), torch.cat([q_mean, q_detail], 1)
        # (K x_0)_b = sigma_b (p_b X_b + q_b F_b) = p (K x_t)_b + q (K prediction)_b
        p, q = sample_coefficients(self.prediction_type, a, s)
        coefficients = torch.stack([1 / n, (sizes * p_b / n - p) / q, sizes * q_b / q], 1)
        a, s = a_b[:, 0], s_b[:, 0]
        if self.coarse_log_sigmas is None:  # rectified flow
            return self.coarse_timesteps * s / (a + s), coefficients
        return index_at(self.coarse_log_sigmas, a, s), coefficients

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_t (B, 1, *spatial) and timesteps (B,) of the voxels' schedule -> prediction (B, 1, *spatial).

        Condition images are further channels of x. Every side is a multiple of 2^(L + levels of the U-Net - 1).
        """
        if self.continuous:
            times, coefficients = (t.float() for t in self.arithmetic(timesteps))
        else:
            times, coefficients = self.times[timesteps.long()], self.coefficients[timesteps.long()]
        c_in, c_x, c_f = (unsqueeze_right(c, x.ndim) for c in coefficients.unbind(1))
        bands = analysed(x[:, :1], self.wavelet_levels)
        inputs = c_in * bands
        if self.in_channels > 1:
            inputs = torch.cat([inputs, in_blocks(x[:, 1:], self.wavelet_levels)], 1)
        output = self.unet(inputs, times, context=context, class_labels=class_labels)
        return synthesised(c_x * bands + c_f * output, self.wavelet_levels)

    def state_dict(self, *args, **kwargs):
        """The U-Net's own: no prefix, no tables."""
        return self.unet.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load the U-Net's own state dict."""
        return self.unet.load_state_dict(state_dict, strict=strict, assign=assign)


def in_wavelets(
    unet: nn.Module,
    wavelet_levels: int,
    scheduler: Scheduler,
    schedule: str,
    prediction_type: str,
    description: dict[str, Any] | None = None,
    detail_rms: Sequence[float] = DETAIL_RMS,
    covariates: Sequence[Covariate] = (),
) -> nn.Module:
    """A `WaveletUNet`, or where `wavelet_levels` is 0 the U-Net itself; told these covariates as `class_labels`.

    Args:
        schedule: the name of the scheduler's noise schedule.
        description: what is known about the weights to begin with, see `coarse_process`.
    """
    unet = with_covariates(unet, covariates)
    if not wavelet_levels:
        return unet
    coarse = coarse_process(description or {}, scheduler, schedule)
    return WaveletUNet(unet, wavelet_levels, scheduler, prediction_type, coarse, detail_rms)


def scheduler_of(process: dict[str, Any]) -> Scheduler:
    """The MONAI scheduler of {"scheduler": class, "num_train_timesteps": T, "schedule": word}."""
    if process["scheduler"] == "RFlowScheduler":
        return RFlowScheduler(process["num_train_timesteps"])
    return DDPMScheduler(process["num_train_timesteps"], process["schedule"])


def coarse_process(description: dict[str, Any], scheduler: Scheduler, schedule: str) -> dict[str, Any]:
    """The process which the LLL band of a network belongs to, for `WaveletUNet` and model.json.

    That of the coarse network that it has grown from, if it has; else the schedule of the voxels, with v predicted.

    Args:
        description: what is known about the weights to begin with (a model.json); may be empty.
        scheduler, schedule: of the voxels.
    """
    if description.get("coarse"):
        return description["coarse"]
    if description and not description.get("wavelet_levels"):
        if missing := [key for key in ("num_train_timesteps", "schedule", "prediction_type") if key not in description]:
            raise BundleError(
                f"init_ckpt: what is known about the coarse weights (their model.json) lacks {', '.join(missing)}; a "
                "network that is grown must know it"
            )
        predicted = description["prediction_type"]
        straight = description.get("scheduler", "RFlowScheduler" if predicted == "rectified_flow" else "DDPMScheduler")
        return {
            "scheduler": straight,
            "num_train_timesteps": description["num_train_timesteps"],
            "schedule": description["schedule"],
            "prediction_type": predicted,
        }
    return {
        "scheduler": type(scheduler).__name__,
        "num_train_timesteps": scheduler.num_train_timesteps,
        "schedule": schedule,
        "prediction_type": "v_prediction",
    }


def bands_of(state_dict: dict[str, torch.Tensor]) -> int:
    """How many channels the network of a state dict gives; 0 where it is no U-Net of MONAI's."""
    weight = state_dict.get(LAST + "weight")
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.ndim in (4, 5) else 0


def padded(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A tensor with zeros after its end along an axis."""
    zeros = tensor.new_zeros([size - n if i == axis else n for i, n in enumerate(tensor.shape)])
    return torch.cat([tensor, zeros], axis)


def grown(
    state_dict: dict[str, torch.Tensor], bands: int, old: Sequence[Any] = (), new: Sequence[Any] = ()
) -> dict[str, torch.Tensor]:
    """The weights of a network on few bands as those of one on more that ignores the new ones and gives 0 for them.

    It also ignores condition images that are new, and takes the mean of the voxels where the old one took a voxel.

    Args:
        state_dict: of a U-Net with at most `bands` output channels.
        bands: of the network to be.
        old, new: what names each channel of the condition images, of the old network and of that to be.
    """
    weights, before = dict(state_dict), bands_of(state_dict)
    for name in (LAST + "weight", LAST + "bias"):
        weights[name] = padded(state_dict[name], 0, bands)
    image, *shown = state_dict[FIRST + "weight"].split(before, 1)
    by_name, finer = dict(zip(old, shown, strict=True)), bands // before
    none = padded(image[:, :0], 1, bands)
    kernels = [by_name[key].repeat_interleave(finer, 1) / finer if key in by_name else none for key in new]
    weights[FIRST + "weight"] = torch.cat([padded(image, 1, bands), *kernels], 1)
    return weights
