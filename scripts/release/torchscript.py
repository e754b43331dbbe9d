"""The whole sampler as one TorchScript archive, which other programs run without this bundle."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata

from scripts.diffusion.loaded import loaded, parser_of
from scripts.running.files import write_atomically

logger = logging.getLogger(__name__)


def export_torchscript(
    ckpt_path: str,
    path: str,
    config_file: str | Sequence[str],
    meta_file: str,
    weights: str = "ema",
    knobs: Mapping[str, Any] | None = None,
) -> None:
    """Write a `DiffusionSampler` with its weights, metadata.json and inference.json as one TorchScript archive.

    `monai.bundle ckpt_export` writes the same network, but beside it each config as it stands, and that one looks up
    the voxel size in a file which no archive holds. Here one inference.json has what describes the weights in it.

    Args:
        ckpt_path, config_file, weights, knobs: see `loaded`.
        path: models/model.ts, say. The name stands inside the archive too, where MONAI Deploy looks for it.
        meta_file: metadata.json.

    Raises:
        BundleError: knobs or weights that inference would refuse too, or `path` cannot be written.
    """
    parser = loaded(config_file, ckpt_path, weights, knobs)
    config = parser_of(config_file, knobs).get()  # with nothing of this machine in it
    config.pop(parser.meta_key, None)
    config["description"] = parser.get_parsed_content("description")
    metadata = ConfigParser.load_config_file(meta_file)
    files = {"inference.json": json.dumps(config).encode()}
    scripted = torch.jit.script(parser.get_parsed_content("network_def").eval())

    def write(temporary: str) -> None:
        with TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
            archive = os.path.join(folder, os.path.basename(path))
            save_net_with_metadata(scripted, archive, False, meta_values=metadata, more_extra_files=files)
            os.replace(archive, temporary)

    write_atomically(path, write)
    logger.info(f"wrote {path}")
