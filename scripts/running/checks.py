"""Checks of the knobs before any file is read; each raises a BundleError that names the key.

What a knob may be stands in one table, `KNOBS`; what several knobs must be to each other, in the functions of
`TOGETHER`. `check_knobs` looks at both, and is the first thing that a command does.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from math import inf, prod
from numbers import Integral, Real
from pydoc import locate
from typing import Any, NamedTuple

import torch
from monai.networks import nets
from monai.networks.schedulers import NoiseSchedules

from scripts.running.errors import BundleError

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
LARGEST_SEED = 2**63 - 1  # of an int64, as which it travels in a batch
LONGEST_NAME = 100  # bytes of a class, which becomes the name of a folder and a part of dataset_<name>.json
TRUTH = {"true": True, "false": False}


class Knob(NamedTuple):
    """What a knob may be."""

    fits: Callable[[Any], bool]
    right: str  # ends the sentence "it must be ..."
    words: tuple[str, ...] = ()  # all that it may be, where these are words


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a knob is a finite number; true and false are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and -inf < value < inf


def is_class_name(value: Any) -> bool:
    """A word that can be a folder, and is not taken for an index."""
    return (
        isinstance(value, str)
        and bool(re.fullmatch(r"[^\W\d_][^/\\]*", value))
        and value.isprintable()  # no line break, no NUL, no half of a character
        and len(value.encode()) <= LONGEST_NAME
    )


def whole(least: int) -> Knob:
    return Knob(lambda value: is_whole(value) and value >= least, f"a whole number, {least} or more")


def above(bound: float) -> Knob:
    return Knob(lambda value: is_number(value) and value > bound, f"a number above {bound}")


def share() -> Knob:
    return Knob(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


def word(*words: str) -> Knob:
    return Knob(lambda value: isinstance(value, str) and value in words, f"one of {words}", words)


def listed(entry: Knob, *lengths: int) -> Knob:
    """A list of some length, or of one of `lengths`."""
    count = " or ".join(map(str, lengths)) + " entries" if lengths else "entries"
    return Knob(
        lambda value: (
            isinstance(value, (list, tuple))
            and (len(value) in lengths if lengths else len(value) > 0)
            and all(map(entry.fits, value))
        ),
        f"a list of {count}, each {entry.right}",
    )


def or_none(knob: Knob, meaning: str) -> Knob:
    return Knob(lambda value: value is None or knob.fits(value), f"{knob.right}, or None {meaning}")


SWITCH = Knob(lambda value: str(value).lower() in TRUTH, "true or false")
PATH = Knob(lambda value: isinstance(value, (str, os.PathLike)) and bool(str(value)), "a path")
SEED = Knob(lambda value: is_whole(value) and 0 <= value <= LARGEST_SEED, "a whole number from 0 to 2^63 - 1")
NEW_OR_FIXED_SEED = Knob(
    lambda value: SEED.fits(value) or is_whole(value) and value == -1, f"{SEED.right}, or -1 for a new one each time"
)
SIZES = listed(whole(1))
PERCENTILES = Knob(
    lambda value: (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(map(is_number, value))
        and 0 <= value[0] < value[1] <= 100
    ),
    "a list of two percentiles, 0 <= lower < upper <= 100",
)
CLASS_NAMES = Knob(
    lambda value: (
        isinstance(value, (list, tuple)) and all(map(is_class_name, value)) and len(set(value)) == len(value)
    ),
    f"a list of different names, each beginning with a letter, without a slash and of at most {LONGEST_NAME} bytes, "
    "such as ['glioma', 'no_tumor']",
)
CLASS_LABEL = Knob(lambda value: value is None or isinstance(value, str) or whole(0).fits(value), "")
KNOBS = {
    # what the commands share
    "seed": SEED,
    "amp": word("auto", "float32", "bfloat16", "float16"),
    "channels_last": SWITCH,
    "compile": Knob(
        lambda value: isinstance(value, str) and value in COMPILE_MODES or SWITCH.fits(value),
        f"true, false or in {COMPILE_MODES}",
    ),
    "batch_size": whole(1),
    "num_workers": whole(0),
    "output_dir": PATH,
    "ckpt_dir": PATH,
    "ckpt_path": PATH,
    "resume": SWITCH,
    "skip_bad_files": SWITCH,
    # the network
    "spatial_shape": listed(whole(2), 2, 3),  # a side of one voxel has no contrast
    "network_class": Knob(
        lambda value: isinstance(value, str) and callable(getattr(nets, value, None) or located(value)),
        "a network of MONAI, such as DiffusionModelUNet, or the full name of a class",
    ),
    "channels": SIZES,
    "attention_levels": listed(Knob(lambda value: isinstance(value, bool), "True or False")),
    "num_head_channels": Knob(
        lambda value: whole(1).fits(value) or listed(whole(0)).fits(value),
        "a whole number, 1 or more, or a list of whole numbers, 0 or more",
    ),
    "num_res_blocks": Knob(
        lambda value: whole(1).fits(value) or SIZES.fits(value), "a whole number, 1 or more, or a list of these"
    ),
    "norm_num_groups": whole(1),
    "wavelet_levels": Knob(lambda value: is_whole(value) and value in (0, 1, 2), "0, 1 or 2"),
    "detail_rms": listed(above(0), 2, 3),
    # the diffusion process
    "num_train_timesteps": whole(2),
    "schedule": word(*NoiseSchedules.names),
    "prediction_type": word("epsilon", "sample", "v_prediction", "flow", "rectified_flow"),
    "timestep_sampling": word("uniform", "balanced", "lognormal"),
    # classes
    "class_names": or_none(CLASS_NAMES, "without classes"),
    "class_table": or_none(PATH, "for class folders"),
    "class_dropout": share(),
    "class_label": Knob(
        lambda value: CLASS_LABEL.fits(value) or listed(CLASS_LABEL).fits(value),
        "a class's name or index (class_names), None for no class, or a list of these",
    ),
    "guidance_scale": Knob(lambda value: is_number(value) and value >= 0, "a number, 0 or more"),
    # training
    "init_ckpt": or_none(PATH, "to begin anew"),
    "image_pattern": or_none(Knob(PATH.fits, "a pattern such as '*_T1w.nii.gz'"), "for all images"),
    "mask_suffix": or_none(Knob(PATH.fits, "the end of the masks' names"), "without masks"),
    "learning_rate": above(0),
    "max_iterations": whole(1),
    "time_limit": or_none(Knob(above(0).fits, "minutes, above 0"), "for no limit"),
    "ema_momentum": Knob(lambda value: is_number(value) and 0 < value <= 1, "a number above 0, at most 1"),
    "activation_checkpointing": Knob(
        lambda value: (
            isinstance(value, str)
            and value in ("none", "all")
            or isinstance(value, (list, tuple))
            and all(map(whole(0).fits, value))
        ),
        "'none', 'all' or a list of levels, 0 the finest",
    ),
    "accumulation_steps": whole(1),
    "max_grad_norm": or_none(above(0), "to do without"),
    "surge_factor": or_none(above(1), "to do without"),
    "surge_retries": whole(0),
    "val_fraction": Knob(lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1, for example 0.1"),
    "val_interval": whole(1),
    "preview_interval": whole(1),
    "preview_samples": whole(1),
    "preview_steps": whole(1),
    "preview_epochs": Knob(
        lambda value: isinstance(value, (list, tuple)) and all(map(whole(0).fits, value)),
        "a list of whole numbers, 0 or more",
    ),
    "checkpoint_interval": whole(1),
    "checkpoints_kept": whole(1),
    "crop_margin": whole(0),
    "percentiles": PERCENTILES,
    "flip_probability": share(),
    "cache": word("memory", "disk", "none"),
    # sampling
    "weights": word("ema", "raw"),
    "num_samples": whole(1),
    "halve_batch_on_oom": SWITCH,
    "solver": word("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "gaussian_2m"),
    "num_inference_steps": whole(1),
    "timestep_spacing": word("linspace", "trailing", "leading", "logsnr"),
    "sigma_max": or_none(above(0), "for the noisiest timestep"),
    "eta": or_none(Knob(lambda value: is_number(value) and value >= 0, "a number from 0"), "for the solver's own"),
    "clip_sample": SWITCH,
    "voxel_size": listed(Knob(above(0).fits, "a length in mm above 0"), 2, 3),
    # evaluation
    "max_volumes": or_none(whole(1), "for all"),
    "num_pairs": whole(1),
    "num_images": whole(1),
    "num_resamples": whole(1),
    "num_permutations": whole(99),
    "nearest_k": whole(1),
    "num_slices": whole(1),
    "size": or_none(whole(1), "for the network's own"),
    "resolution": whole(1),
    "explained": above(0),
    "max_components": whole(1),
    "candidates": whole(1),
    "neighbours": whole(1),
    "num_worst": whole(1),
    "duplicate": Knob(lambda value: is_number(value) and 0 < value <= 1, "a correlation above 0, at most 1"),
    "num_shown": whole(1),
    "num_extremes": whole(1),
    "num_bins": whole(2),
    "memory": above(0),
}


def located(name: str) -> Any:
    """What a full name such as "torch.optim.Adam" stands for; None where there is no such thing."""
    try:
        return locate(name)
    except Exception:  # pydoc's own: the module is there, and cannot be imported
        return None


def check_knob(key: str, value: Any, knob: Knob) -> None:
    if not knob.fits(value):
        found = "is unknown" if knob.words else "was given"
        raise BundleError(f"{key}: {value!r} {found}; it must be {knob.right}")


def check_knobs(seed_may_be_new: bool = False, **knobs: Any) -> None:
    """Every knob is what `KNOBS` says, and the functions of `TOGETHER` agree whose knobs are all given.

    Args:
        seed_may_be_new: `seed` may also be -1, a new one each time, as in sampling.
        knobs: by their keys.
    """
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
                + f" needs; {near} would be right, or fewer levels"
            )
    for width in channels:
        if width % norm_num_groups:
            raise BundleError(
                f"channels: {list(channels)} was given, but {width} is not divisible by norm_num_groups = "
                f"{norm_num_groups}; multiples of {norm_num_groups} would be right"
            )
    if prod(side // factor for side in spatial_shape) * channels[-1] == norm_num_groups:
        raise BundleError(
            f"spatial_shape: {list(spatial_shape)} was given, but {len(channels)} levels (key channels) come down to "
            "one voxel, of which each group (norm_num_groups) has one channel, and one value cannot be normalised; "
            f"{[2 * side for side in spatial_shape]}, fewer levels or fewer groups would be right"
        )
    for level, (width, heads) in enumerate(zip(channels, num_head_channels)):
        if (attention_levels[level] or level == len(channels) - 1) and (heads < 1 or width % heads):
            where = "the middle block has attention" if level == len(channels) - 1 else "attention_levels is true there"
            raise BundleError(
                f"num_head_channels: {list(num_head_channels)} was given, but channels[{level}] = {width} cannot be "
                f"shared among heads of {heads} channels ({where}); a divisor such as {width} (one head) would be right"
            )


def check_accumulation(accumulation_steps: int, max_iterations: int, checkpoint_interval: int) -> None:
    """Both counts of iterations are multiples of `accumulation_steps`, so that no gradient is cut off or lost."""
    for key, value in (("max_iterations", max_iterations), ("checkpoint_interval", checkpoint_interval)):
        if value % accumulation_steps:
            right = -(-value // accumulation_steps) * accumulation_steps
            raise BundleError(
                f"{key}: {value} was given, but gradients are added over accumulation_steps = {accumulation_steps} "
                f"iterations; a multiple such as {right} would be right"
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


TOGETHER = (check_network, check_accumulation, check_preview_steps, check_voxel_size)


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


def switch(**knob: bool | str) -> bool:
    """The truth of one knob, switch(resume=...): the command line gives `--resume false` as the word "false"."""
    ((key, value),) = knob.items()
    check_knob(key, value, SWITCH)
    return TRUTH[str(value).lower()]


def resolved_device(device: str | torch.device | None) -> torch.device:
    """The device that a knob names; None is the GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return torch.device(device)


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
