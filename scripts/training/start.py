"""Where a training begins: new, with the weights of a file, or grown from a coarser network."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from scripts.diffusion.description import DESCRIBING, check_described, described
from scripts.diffusion.embedding import with_new_covariates
from scripts.diffusion.networks import unet_of
from scripts.diffusion.state_dicts import check_finite, check_fits, read_state_dict
from scripts.diffusion.wavelets import bands_of, grown
from scripts.diffusion.weights import load_weights
from scripts.running.condition_images import ConditionImage, channels_of, known_condition_images
from scripts.running.covariates import Covariate, known_covariates
from scripts.running.errors import BundleError
from scripts.training.checkpoints import check_space
from scripts.training.resume import check_resume

logger = logging.getLogger(__name__)


def prepare_weights(
    parts: Mapping[str, nn.Module],
    description: Mapping[str, Any],
    ckpt_dir: str,
    checkpoints_kept: int,
    init_ckpt: str | None = None,
    resumed_ckpt: str | None = None,
    covariates: Sequence[Covariate] = (),
    condition_images: Sequence[ConditionImage] = (),
) -> None:
    """Everything about weights and their places that can go wrong before any data are read.

    Args:
        parts: {"network", "ema"}, which receive the weights of `init_ckpt`.
        description: the knobs of `DESCRIBING` as they are now.
        ckpt_dir, checkpoints_kept: see `check_space`.
        init_ckpt: see `begin_with`.
        resumed_ckpt: see `check_resume`.
        covariates, condition_images: of the network, see `begin_with`.

    Raises:
        BundleError: see these functions.
    """
    check_space(ckpt_dir, parts["network"], checkpoints_kept)
    check_resume(resumed_ckpt, description)
    begin_with(init_ckpt, parts["network"], parts["ema"], description, covariates, condition_images)


def begin_with(
    ckpt_path: str | None,
    network: nn.Module,
    ema_network: nn.Module,
    expected: Mapping[str, Any] | None = None,
    covariates: Sequence[Covariate] = (),
    condition_images: Sequence[ConditionImage] = (),
) -> None:
    """Let a training begin with the weights of a file instead of random ones; None changes nothing.

    Fine-tuning: the file may come from a training of another `spatial_shape`, since the network is convolutional.
    Growing: it may come from a network of fewer wavelet levels and coarser voxels, see `grow`, or of other covariates
    or words, see `with_new_covariates`, or of other condition images: it then begins by making the same volumes.

    Args:
        ckpt_path, expected: see `load_weights`.
        network, ema_network: receive the weights.
        covariates, condition_images: of the network, see the modules of these names in `scripts.running`.
    """
    if ckpt_path is None:
        return
    state_dict = read_state_dict(ckpt_path) if os.path.isfile(ckpt_path) else {}
    before, shown = known_covariates(described(ckpt_path)), known_condition_images(described(ckpt_path))
    old, new = channels_of(shown), channels_of(condition_images)
    more = [(c["name"], c.get("words")) for c in before] != [(c["name"], c.get("words")) for c in covariates]
    bands = bands_of(state_dict)
    finer = getattr(unet_of(network), "out_channels", 0) > bands > 0
    if state_dict and (finer or more or old != new):
        # their words and covariates may be more, as `scripts.scans.participants.Covariates` has checked
        same = {key: value for key, value in (expected or {}).items() if key != "class_names"}
        if more:
            state_dict = with_new_covariates(state_dict, before, covariates, network.state_dict())
            logger.info(f"grown from the covariates {[c['name'] for c in before]} to {[c['name'] for c in covariates]}")
        if old != new:
            logger.info(f"grown from the condition images {old} to {new}, channel by channel")
        if finer:
            grow(state_dict, ckpt_path, network, same, old, new)
        else:
            state_dict = grown(state_dict, bands, old, new) if old != new else state_dict
            check_described(described(ckpt_path), {k: v for k, v in same.items() if DESCRIBING[k].fixed}, ckpt_path)
            check_finite(state_dict, ckpt_path)
            check_fits(network, state_dict, ckpt_path)
            network.load_state_dict(state_dict)
    else:
        load_weights(network, ckpt_path, expected={k: v for k, v in (expected or {}).items() if DESCRIBING[k].fixed})
    ema_network.load_state_dict(network.state_dict())
    logger.info(f"training begins with the weights of {ckpt_path}")


def grow(
    state_dict: dict,
    ckpt_path: str,
    network: nn.Module,
    expected: Mapping[str, Any],
    old: Sequence[Any] = (),
    new: Sequence[Any] = (),
) -> None:
    """Load a coarse network's weights into a `WaveletUNet` of more levels, whose volumes begin as the coarse ones.

    The coarse network may predict anything at any schedule: `WaveletUNet` was told which (`coarse_process`). `old` and
    `new` are the channels of the condition images, see `grown`.

    Raises:
        BundleError: nobody has written down what the coarse network predicts, its volumes are not of the side of the
            new ones' means, its weights are not finite, or the networks differ otherwise.
    """
    unet, description, spatial_shape = unet_of(network), described(ckpt_path), expected["spatial_shape"]
    levels = round(math.log2(unet.out_channels / bands_of(state_dict)) / len(spatial_shape))
    if not description:
        raise BundleError(
            f"init_ckpt: {ckpt_path!r} does not say how it was trained, and no JSON file beside it does; a network "
            "that is grown must know it; expected the model.json of that training"
        )
    coarse, wanted = description.get("spatial_shape"), [side // 2**levels for side in spatial_shape]
    if coarse not in (None, wanted):
        right = [side * 2**levels for side in coarse]
        raise BundleError(
            f"init_ckpt: {ckpt_path!r} was trained on volumes of {coarse}; with {levels} more of wavelet_levels it can "
            f"be grown to {right}, but spatial_shape is {list(spatial_shape)}"
        )
    same = {key: value for key, value in expected.items() if DESCRIBING[key].of_unet}
    check_described(description, same, ckpt_path)
    check_finite(state_dict, ckpt_path)
    weights = grown(state_dict, unet.out_channels, old, new)
    check_fits(network, weights, ckpt_path)
    network.load_state_dict(weights)
    logger.info(f"grown from {coarse or 'coarser volumes'} to {list(spatial_shape)}")
