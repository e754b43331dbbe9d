"""The whole sampler as one TorchScript archive, which other programs run without this bundle."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata

from scripts.running.files import write_atomically

logger = logging.getLogger(__name__)


def export_torchscript(
    ckpt_path: str,
    path: str,
    config_file: str | Sequence[str],
    meta_file: str,
    weights: str = "ema",
    knobs: dict[str, Any] | None = None,
) -> None:
    """Write a `DiffusionSampler` with its weights, metadata.json and inference.json as one TorchScript archive.

    `monai.bundle ckpt_export` writes the same network, but beside it each config as it stands, and that one looks up
    the voxel size in a file which no archive holds. Here one inference.json has everything filled in.

    Args:
        ckpt_path: weights in any layout that `scripts.training.checkpoints.load_weights` reads; they become float32.
        path: models/model.ts, say. The name stands inside the archive too, where MONAI Deploy looks for it.
        config_file: inference.json, or a list of it and of presets, which are merged.
        meta_file: metadata.json.
        weights: "ema" or "raw", for a checkpoint of a whole training run.
        knobs: other values of inference.json's keys, such as {"num_inference_steps": 50}.

    Raises:
        BundleError: knobs or weights that inference would refuse too, or `path` cannot be written.
    """
    parser = ConfigParser()
    parser.read_config(config_file)
    parser.read_meta(meta_file)
    parser.update(knobs or {})
    config = copy.deepcopy(parser.get())  # before anything of this machine enters
    metadata = config.pop(parser.meta_key)
    parser.update({"ckpt_path": ckpt_path, "weights": weights, "device": torch.device("cpu"), "compile": False})
    parser.get_parsed_content("initialize")
    config["description"] = parser.get_parsed_content("description")
    files = {"inference.json": json.dumps(config).encode()}
    scripted = torch.jit.script(parser.get_parsed_content("network_def").eval())

    def write(temporary: str) -> None:
        with TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
            archive = os.path.join(folder, os.path.basename(path))
            save_net_with_metadata(scripted, archive, False, meta_values=metadata, more_extra_files=files)
            os.replace(archive, temporary)

    write_atomically(path, write)
    logger.info(f"wrote {path}")
