"""Weights in files: read in any layout, with what describes them, and loaded where they belong to a network."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.diffusion.description import check_described, described, labelled, warn_of_assumptions
from scripts.diffusion.embedding import without_unknown
from scripts.diffusion.networks import unet_of
from scripts.diffusion.state_dicts import check_finite, check_fits, read_state_dict
from scripts.running.covariates import known_covariates
from scripts.running.errors import BundleError
from scripts.running.files import save_tensors, write_atomically, write_text

logger = logging.getLogger(__name__)


OLD_NAMES = re.compile(r"(\.to_[qkv]|\.proj_attn|\.to_out\.0|upsampler\.conv(\.conv)?)\.(weight|bias)$")


def load_weights(
    network: nn.Module, ckpt_path: str, weights: str = "ema", expected: Mapping[str, Any] | None = None
) -> None:
    """Load the weights of a file that `read_state_dict` can read into a network.

    A state dict of a `monai-generative` 0.2 network is translated by MONAI's `load_old_state_dict`.

    Args:
        network: receives the weights, on its own device and in its own type; a `DiffusionSampler` passes them on.
        ckpt_path: the file.
        weights: "ema" or "raw", for a checkpoint of a whole training run.
        expected: knobs of `DESCRIBING` as they are now; compared with what the file, or the JSON file beside it, says.

    Raises:
        BundleError: no such file (says how to make one), torn, of another network, not finite, or trained with other
            knobs. Where nothing is known of a knob there is a warning.
    """
    if not os.path.isfile(ckpt_path):
        raise BundleError(
            f"ckpt_path: there are no weights at {ckpt_path!r}. They are made by `python -m monai.bundle run training "
            "--config_file configs/train.json --dataset_dir YOUR_SCANS`, or, as a small demonstration, by the first "
            "command of README.md; --ckpt_path names other ones"
        )
    expected, description = expected or {}, described(ckpt_path)
    check_described(description, expected, ckpt_path)
    state_dict = read_state_dict(ckpt_path, weights)
    check_finite(state_dict, ckpt_path)
    strangers = [name for name in state_dict if name not in network.state_dict()]
    if strangers and all(OLD_NAMES.search(name) for name in strangers):
        load_old(unet_of(network), state_dict, ckpt_path)
    else:
        check_fits(network, state_dict, ckpt_path)
        network.load_state_dict(state_dict)
    warn_of_assumptions(description, expected, ckpt_path)


def load_old(unet: nn.Module, state_dict: dict, path: str) -> None:
    """Load a `monai-generative` state dict into a `DiffusionModelUNet`, which must be built without the projection
    that such a network never applied."""
    if any(name.endswith(".attn.out_proj.weight") for name in unet.state_dict()):
        raise BundleError(
            f"{path!r} was trained with monai-generative, whose attention has no output projection; give "
            "--network_def#unet#unet#include_fc false --network_def#unet#unet#use_combined_linear false"
        )
    try:
        with contextlib.redirect_stdout(None):
            unet.load_old_state_dict(dict(state_dict))
    except (KeyError, RuntimeError) as e:
        raise BundleError(
            f"{path!r}, trained with monai-generative, does not belong to the network of this config: {str(e)[:300]}"
        ) from e


def save_weights(state_dict: Mapping[str, torch.Tensor], description: Mapping[str, Any], path: str) -> None:
    """Write a plain state dict with its description inside, as PyTorch or, by its name, as a safetensors file.

    "Unknown" adds nothing in what is written (`without_unknown`), so that programs which know no covariates, such as
    `monai.bundle.load`, find the network that is told nothing.

    Raises:
        BundleError: it cannot be written.
    """
    state_dict = without_unknown(state_dict, known_covariates(description))

    def write(temporary: str) -> None:
        if path.endswith(".safetensors"):
            import safetensors.torch  # here, as in `load_file`

            contiguous = {name: tensor.contiguous() for name, tensor in state_dict.items()}
            header = {"format": "pt", "description": json.dumps(dict(description))}  # the first is what others look for
            Path(temporary).write_bytes(safetensors.torch.save(contiguous, header))
        else:
            save_tensors(labelled(state_dict, description), temporary)

    write_atomically(path, write)


def release_weights(ckpt_path: str, path: str, weights: str = "ema") -> None:
    """Write the weights of a file that `read_state_dict` can read as a plain bfloat16 state dict, half the size.

    What training wrote about them goes into it, and beside it: `path` with .json.

    Args:
        ckpt_path: where they are.
        path: where they go, for example models/model.pt, or model.safetensors for a file of that kind.
        weights: "ema" or "raw", for a checkpoint of a whole training run.

    Raises:
        BundleError: weights that cannot be read or are not finite, or `path` cannot be written.
    """
    state_dict = read_state_dict(ckpt_path, weights)
    check_finite(state_dict, ckpt_path)
    description = described(ckpt_path)
    state_dict = without_unknown(state_dict, known_covariates(description))  # before rounding
    save_weights({name: t.to(torch.bfloat16) for name, t in state_dict.items()}, description, path)
    write_text(os.path.splitext(path)[0] + ".json", json.dumps(description, indent=4) + "\n")
