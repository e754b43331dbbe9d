"""Checks of the knobs before any file is read; each raises a BundleError that names the key.

What a knob may be stands in one table, `KNOBS`; what several knobs must be to each other, in the functions of
`TOGETHER`. `check_knobs` looks at both, and is the first thing that a command does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from scripts.running.errors import BundleError
from scripts.running.knobs import KNOBS, NEW_OR_FIXED_SEED, SWITCH, TRUTH, Knob, is_whole


def check_knob(key: str, value: Any, knob: Knob) -> None:
    if not knob.fits(value):
        found = "is unknown" if knob.words else "was given"
        raise BundleError(f"{key}: {value!r} {found}; it must be {knob.right}")


def check_knobs(parameters: Mapping[str, Any] | None = None, seed_may_be_new: bool = False, **knobs: Any) -> None:
    """Every knob is what `KNOBS` says, and the functions of `TOGETHER` agree whose knobs are all given.

    Args:
        parameters: knobs by their keys, as a config has them.
        seed_may_be_new: `seed` may also be -1, a new one each time, as in sampling.
        knobs: the same, as keywords.
    """
    knobs = {**(parameters or {}), **knobs}
    for key, value in knobs.items():
        if key == "device":
            check_device(value)
        elif key == "seed" and seed_may_be_new:
            check_knob(key, value, NEW_OR_FIXED_SEED)
        else:
            check_knob(key, value, KNOBS[key])
    for check in TOGETHER:
        wanted = inspect.signature(check).parameters
        if all(key in knobs for key, parameter in wanted.items() if parameter.default is parameter.empty):
            check(**{key: knobs[key] for key in wanted if key in knobs})


def is_here(device: Any) -> bool:
    """Whether this machine, and this build of torch, has a device."""
    try:
        if not isinstance(device, (str, torch.device)) or torch.device(device).type == "meta":
            return False
        if torch.device(device).type == "cuda":  # a GPU that is busy is here too
            return (torch.device(device).index or 0) < torch.cuda.device_count()
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError):  # torch's for an unknown word, and for what it was built without
        return False
    return True


def check_device(device: str | torch.device) -> None:
    if not is_here(device):
        count = torch.cuda.device_count()
        found = {0: "there is no CUDA GPU here", 1: "there is one CUDA GPU here"}
        given = str(device) if isinstance(device, torch.device) else device
        right = ", ".join([*(f"cuda:{i}" for i in range(count)), "cpu"])
        raise BundleError(
            f"device: {given!r} was given, but {found.get(count, f'there are {count} CUDA GPUs here')}; {right}, "
            "or leave it out"
        )


def check_network(
    spatial_shape: Sequence[int],
    channels: Sequence[int],
    attention_levels: Sequence[bool],
    num_head_channels: Sequence[int] | int,
    norm_num_groups: int,
    wavelet_levels: int = 0,
) -> None:
    """The sizes of a `DiffusionModelUNet`, in `wavelet_levels` of wavelets, fit each other and the volume."""
    if is_whole(num_head_channels):
        num_head_channels = [num_head_channels] * len(channels)
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
                + f" needs; expected {near}, or fewer levels"
            )
    for width in channels:
        if width % norm_num_groups:
            raise BundleError(
                f"channels: {list(channels)} was given, but {width} is not divisible by norm_num_groups = "
                f"{norm_num_groups}; expected multiples of {norm_num_groups}"
            )
    if prod(side // factor for side in spatial_shape) * channels[-1] == norm_num_groups:
        raise BundleError(
            f"spatial_shape: {list(spatial_shape)} was given, but {len(channels)} levels (key channels) come down to "
            "one voxel, of which each group (norm_num_groups) has one channel, and one value cannot be normalised; "
            f"expected {[2 * side for side in spatial_shape]}, fewer levels or fewer groups"
        )
    for level, (width, heads) in enumerate(zip(channels, num_head_channels)):
        if (attention_levels[level] or level == len(channels) - 1) and (heads < 1 or width % heads):
            where = "the middle block has attention" if level == len(channels) - 1 else "attention_levels is true there"
            raise BundleError(
                f"num_head_channels: {list(num_head_channels)} was given, but channels[{level}] = {width} cannot be "
                f"shared among heads of {heads} channels ({where}); expected a divisor such as {width} (one head)"
            )


def check_accumulation(accumulation_steps: int, max_iterations: int, checkpoint_interval: int) -> None:
    """Both counts of iterations are multiples of `accumulation_steps`, so that no gradient is cut off or lost."""
    for key, value in (("max_iterations", max_iterations), ("checkpoint_interval", checkpoint_interval)):
        if value % accumulation_steps:
            right = -(-value // accumulation_steps) * accumulation_steps
            raise BundleError(
                f"{key}: {value} was given, but gradients are added over accumulation_steps = {accumulation_steps} "
                f"iterations; expected a multiple such as {right}"
            )


def check_preview_steps(preview_steps: int, num_train_timesteps: int) -> None:
    """A preview visits each timestep once at most."""
    if preview_steps > num_train_timesteps:
        raise BundleError(
            f"preview_steps: {preview_steps} was given; it must be a whole number from 1 to num_train_timesteps = "
            f"{num_train_timesteps}"
        )


def check_voxel_size(voxel_size: Sequence[float], spatial_shape: Sequence[int]) -> None:
    """There is a length for each side."""
    if len(voxel_size) != len(spatial_shape):
        raise BundleError(
            f"voxel_size: {voxel_size!r} was given; it must be {len(spatial_shape)} lengths in mm, each above 0"
        )


def check_class_table(class_names: Sequence[str] | None, class_table: str | None) -> None:
    """A table of classes goes with their names."""
    if class_table is not None and not class_names:
        raise BundleError(f"class_table: {class_table!r} was given without class_names, the list of its classes")


TOGETHER = (check_network, check_accumulation, check_preview_steps, check_voxel_size, check_class_table)


def as_bool(**knob: bool | str) -> bool:
    """The truth of one knob, as_bool(resume=...): the command line gives `--resume false` as the word "false"."""
    ((key, value),) = knob.items()
    check_knob(key, value, SWITCH)
    return TRUTH[str(value).lower()]


def resolved_device(device: str | torch.device | None) -> torch.device:
    """The device that a knob names; None is the GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return torch.device(device)
