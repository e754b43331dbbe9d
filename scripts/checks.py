"""Checks of the knobs before any long work begins; every function raises BundleError and returns nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.schedulers import NoiseSchedules

from scripts.diffusion import check_prediction_type
from scripts.errors import BundleError


def is_number(value: Any) -> bool:
    """Whether a knob is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(**knobs: float) -> None:
    """Every knob is a number above zero."""
    for key, value in knobs.items():
        if not is_number(value) or not value > 0:
            raise BundleError(f"{key}: {value!r} was given; it must be a number above 0")


def check_accumulation(accumulation_steps: int, **counts: int) -> None:
    """Every count of iterations is a multiple of `accumulation_steps`, so that no gradient is cut off or lost."""
    for key, value in counts.items():
        if value % accumulation_steps:
            right = -(-value // accumulation_steps) * accumulation_steps
            raise BundleError(
                f"{key}: {value} was given, but gradients are added over accumulation_steps = {accumulation_steps} "
                f"iterations; a multiple such as {right} would be right"
            )


def check_surge(max_grad_norm: float | None, surge_factor: float | None, surge_retries: int) -> None:
    """The knobs of `scripts.surge`."""
    for key, value, least in (("max_grad_norm", max_grad_norm, 0), ("surge_factor", surge_factor, 1)):
        if value is not None and not (is_number(value) and value > least):
            raise BundleError(f"{key}: {value!r} was given; it must be a number above {least}, or None to do without")
    if isinstance(surge_retries, bool) or not isinstance(surge_retries, int) or surge_retries < 0:
        raise BundleError(f"surge_retries: {surge_retries!r} was given; it must be a whole number, 0 or more")


def check_epochs(**lists: Sequence[int]) -> None:
    """Every knob is a list of epochs; 0 is before the first."""
    for key, value in lists.items():
        if not isinstance(value, (list, tuple)) or not all(type(i) is int and i >= 0 for i in value):
            raise BundleError(f"{key}: {value!r} was given; it must be a list of whole numbers, 0 or more")


def switch(**knob: bool | str) -> bool:
    """The truth of one knob, switch(resume=...): the command line gives `--resume false` as the word "false"."""
    ((key, value),) = knob.items()
    truth = {"true": True, "false": False}.get(str(value).lower())
    if truth is None:
        raise BundleError(f"{key}: {value!r} was given; it must be true or false")
    return truth


def check_network(
    spatial_shape: Sequence[int],
    channels: Sequence[int],
    attention_levels: Sequence[bool],
    num_head_channels: Sequence[int] | int,
    norm_num_groups: int,
    wavelet_levels: int = 0,
) -> None:
    """The sizes of a `DiffusionModelUNet`, in `wavelet_levels` of wavelets, fit each other and the volume."""
    if wavelet_levels not in (0, 1, 2) or isinstance(wavelet_levels, bool):
        raise BundleError(f"wavelet_levels: {wavelet_levels!r} was given; it must be 0, 1 or 2")
    if isinstance(num_head_channels, int):
        num_head_channels = [num_head_channels] * len(channels)
    for key, value in (("spatial_shape", spatial_shape), ("channels", channels)):
        if not isinstance(value, (list, tuple)) or not all(isinstance(i, int) and i > 0 for i in value):
            raise BundleError(f"{key}: {value!r} was given; it must be a list of whole numbers above 0")
    for key, value in (("attention_levels", attention_levels), ("num_head_channels", num_head_channels)):
        if len(value) != len(channels):
            raise BundleError(f"{key}: {list(value)} has {len(value)} entries, but channels has {len(channels)} levels")
    factor = 2 ** (wavelet_levels + len(channels) - 1)
    for side in spatial_shape:
        if side % factor:
            near = f"{side // factor * factor} or {(side // factor + 1) * factor}" if side > factor else factor
            raise BundleError(
                f"spatial_shape: {list(spatial_shape)} was given, but {side} is not divisible by {factor}, as a "
                f"network of {len(channels)} levels (key channels)"
                + (f" in {wavelet_levels} of wavelets" if wavelet_levels else "")
                + f" needs; {near} would be right, or fewer levels"
            )
    for width in channels:
        if width % norm_num_groups:
            raise BundleError(
                f"channels: {list(channels)} was given, but {width} is not divisible by norm_num_groups = "
                f"{norm_num_groups}; multiples of {norm_num_groups} would be right"
            )
    for level, (width, heads) in enumerate(zip(channels, num_head_channels)):
        if (attention_levels[level] or level == len(channels) - 1) and (heads < 1 or width % heads):
            where = "the middle block has attention" if level == len(channels) - 1 else "attention_levels is true there"
            raise BundleError(
                f"num_head_channels: {list(num_head_channels)} was given, but channels[{level}] = {width} cannot be "
                f"shared among heads of {heads} channels ({where}); a divisor such as {width} (one head) would be right"
            )


def check_diffusion(num_train_timesteps: int, schedule: str, prediction_type: str) -> None:
    """The words and numbers that define the diffusion process are known."""
    if not isinstance(num_train_timesteps, int) or num_train_timesteps < 2:
        raise BundleError(
            f"num_train_timesteps: {num_train_timesteps!r} was given; it must be a whole number, 2 or more"
        )
    known = tuple(NoiseSchedules.names)
    if schedule not in known:
        raise BundleError(f"schedule: {schedule!r} is unknown; it must be one of {known}")
    check_prediction_type(prediction_type)


def check_writable(**folders: str) -> None:
    """Every folder (key = path) exists or can be made, and a file can be written in it."""
    for key, folder in folders.items():
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise BundleError(
                f"{key}: nothing can be written in {folder!r} ({e.strerror}); give a folder that you may write in"
            ) from e


def check_sampling(
    num_samples: int, batch_size: int, voxel_size: Sequence[float], spatial_shape: Sequence[int]
) -> None:
    """The knobs of `inference.json` that shape its output."""
    for key, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BundleError(f"{key}: {value!r} was given; it must be a whole number, 1 or more")
    right = isinstance(voxel_size, (list, tuple)) and len(voxel_size) == len(spatial_shape)
    if not right or not all(isinstance(v, (int, float)) and 0 < v < float("inf") for v in voxel_size):
        raise BundleError(
            f"voxel_size: {voxel_size!r} was given; it must be {len(spatial_shape)} lengths in mm, each above 0"
        )


def resolved_device(device: str | torch.device | None) -> torch.device:
    """The device that a knob names; None is the GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def amp_dtype(
    amp: str, device: str | torch.device, spatial_shape: Sequence[int] = (), levels: int = 1
) -> torch.dtype | None:
    """The type that autocast uses, or None for plain float32.

    On a CPU, PyTorch 2.13 writes past its memory in the weight gradient of a 3D convolution in
    bfloat16 where a side of its input is 2: infinite weights, or a crash. A training whose network comes down to that
    is kept in float32.

    Args:
        amp: "auto" is bfloat16 on a GPU or CPU that has it in hardware, float16 on an older GPU, float32 on an older
            CPU; else one of "float32", "bfloat16", "float16" (float16 only on a GPU: its loss must be scaled).
        device: where the network runs.
        spatial_shape: of the volumes to train on; nothing where only the forward pass is needed, which is right.
        levels: of the network, and of wavelets around it, each of half the sides.
    """
    device = torch.device(device)
    choices = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    coarsest = [side // 2 ** (levels - 1) for side in spatial_shape]
    unsafe = device.type == "cpu" and len(coarsest) == 3 and min(coarsest) <= 2
    if amp == "auto":
        if device.type != "cuda":
            hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            return torch.bfloat16 if device.type == "cpu" and hardware and not unsafe else None
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if amp not in choices or (amp == "float16" and device.type != "cuda"):
        words = ("auto", "float32", "bfloat16") + (("float16",) if device.type == "cuda" else ())
        raise BundleError(f"amp: {amp!r} cannot be used on {device}; it must be one of {words}")
    if amp == "bfloat16" and unsafe:
        raise BundleError(
            f"amp: 'bfloat16' was given, but the coarsest of the network's {levels} levels has {coarsest} voxels, and "
            "PyTorch's bfloat16 gradients are wrong on a CPU where a side is 2 or less; auto or float32, a larger "
            "spatial_shape or fewer levels (key channels) would be right"
        )
    return choices[amp]
