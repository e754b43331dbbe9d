"""The sampler of inference.json with its weights, for other programs than `run`: exports, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser


def parser_of(config_file: str | Sequence[str], knobs: Mapping[str, Any] | None = None) -> ConfigParser:
    """A config file, or several that are merged, with other values of some keys; nothing is made yet."""
    parser = ConfigParser(ConfigParser.load_config_files(config_file))
    parser.update(dict(knobs or {}))
    return parser


def loaded(
    config_file: str | Sequence[str],
    ckpt_path: str,
    weights: str = "ema",
    knobs: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> ConfigParser:
    """inference.json, initialized: its `network_def` has the weights, in float32.

    Args:
        config_file: inference.json, or a list of it and of presets, which are merged.
        ckpt_path: weights in any layout that `scripts.diffusion.weights.load_weights` reads.
        weights: "ema" or "raw", for a checkpoint of a whole training run.
        knobs: other values of inference.json's keys, such as {"num_inference_steps": 50}.
        device: of the network.

    Raises:
        BundleError: knobs or weights that inference would refuse too.
    """
    parser = parser_of(config_file, knobs)
    parser.update({"ckpt_path": ckpt_path, "weights": weights, "device": torch.device(device), "compile": False})
    parser.get_parsed_content("initialize")
    return parser
