"""What each knob may be, in one table."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from pydoc import locate
from typing import Any, NamedTuple

from monai.networks import nets
from monai.networks.schedulers import NoiseSchedules

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


def located(name: str) -> Any:
    """What a full name such as "torch.optim.Adam" stands for; None where there is no such thing."""
    try:
        return locate(name)
    except Exception:  # pydoc's own: the module is there, and cannot be imported
        return None


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
    "channels_last": Knob(
        lambda value: value == "auto" or SWITCH.fits(value), "true, false or auto (on a GPU, and on a CPU in float32)"
    ),
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
    "covariate_table": or_none(PATH, "for participants.tsv in dataset_dir"),
    "covariates": Knob(
        lambda value: (
            value is None
            or isinstance(value, (str, dict))
            or isinstance(value, (list, tuple))
            and all(isinstance(entry, (str, dict)) and entry for entry in value)
        ),
        "in training a list of columns, such as ['age', 'sex']; in sampling what to ask for, such as {'age': 70}",
    ),
    "condition_images": Knob(
        lambda value: (
            isinstance(value, dict) and all(isinstance(end, str) and end for pair in value.items() for end in pair)
        ),
        "what lies beside each image, such as {'labels': '_dseg', 't2': '_T2w'}, or {}",
    ),
    "made_condition": Knob(
        lambda value: value is None or isinstance(getattr(value, "condition_images", None), list),
        "a transform such as scripts.scans.degraded.LowResolutiond, or None",
    ),
    "condition_dir": or_none(PATH, "without images to go by"),
    "known": or_none(PATH, "without a scan to fill"),
    "known_mask": or_none(PATH, "without a scan to fill"),
    "class_label": Knob(
        lambda value: CLASS_LABEL.fits(value) or listed(CLASS_LABEL).fits(value),
        "a class's name or index (class_names), None for no class, or a list of these",
    ),
    "guidance_scale": Knob(lambda value: is_number(value) and value >= 0, "a number, 0 or more"),
    # training
    "init_ckpt": or_none(PATH, "to begin anew"),
    "image_pattern": or_none(Knob(PATH.fits, "a pattern such as '*_T1w.nii.gz'"), "for all images"),
    "exclude": Knob(
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(entry, str) and entry for entry in value),
        "a list of names or patterns, such as ['sub-07_T1w.nii.gz']",
    ),
    "brain_extraction": Knob(lambda value: value == "auto" or SWITCH.fits(value), "auto, true or false"),
    "mask_dir": PATH,
    "mask_suffix": or_none(Knob(PATH.fits, "the end of the masks' names"), "without masks"),
    "learning_rate": above(0),
    "max_iterations": whole(1),
    "time_limit": or_none(Knob(above(0).fits, "minutes, above 0"), "for no limit"),
    "ema_momentum": Knob(lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1"),
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
    "background": share(),
    "voxel_size": listed(Knob(above(0).fits, "a length in mm above 0"), 2, 3),
    # the page
    "host": Knob(lambda value: isinstance(value, str) and bool(value), "an address, such as 127.0.0.1"),
    "port": Knob(lambda value: is_whole(value) and 0 < value < 65536, "a whole number from 1 to 65535"),
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
